"""Flags from dataclasses, and what a person sees who makes a mistake."""

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

from nanophi.cli import Progress, UserError, duration, flag, parser_for, run_command

ROOT = Path(__file__).resolve().parents[1]


@dataclass(kw_only=True)
class Config:
    data: list[str] = flag(help="files")
    steps: int | None = flag(None, help="steps")
    lr: float = flag(0.5, above=0, help="rate, 100% of it")
    mode: Literal["a", "b"] = flag("a", help="which")
    bos: bool = flag(False, help="put it")
    resume: str | None = flag(None, const="yes", help="go on")


def parse(*argv):
    return Config(**vars(parser_for(Config, "").parse_args(argv)))


def test_flags_become_typed_fields():
    assert parse("--data", "x", "y") == Config(data=["x", "y"])
    cfg = parse("--data", "x", "--steps", "7", "--lr", "1e-3", "--mode", "b", "--bos")
    assert (cfg.steps, cfg.lr, cfg.mode, cfg.bos) == (7, 1e-3, "b", True)
    assert parse("--data", "x", "--no-bos").bos is False
    assert parse("--data", "x", "--resume").resume == "yes"
    assert parse("--data", "x", "--resume", "auto").resume == "auto"


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["--data", "x", "--step", "7"],
        ["--data", "x", "--mode", "c"],
        ["--typo"],
        ["--data", "x", "--lr", "nan"],
    ],
)
def test_wrong_flags_exit_2(argv, capsys):
    """--step for --steps is an error: an abbreviation works until a second flag begins alike."""
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err


def test_every_default_stands_in_help():
    text = parser_for(Config, "").format_help()
    assert "(default: 0.5)" in text
    assert "(default: a)" in text


def raise_user_error(cfg):
    raise UserError("no such thing; do this")


def raise_programmers_error(cfg):
    raise ValueError("a bug")


def test_users_mistake_is_one_line_and_a_bug_is_not_hidden(capsys):
    with pytest.raises(SystemExit) as stop:
        run_command(Config, raise_user_error, ["--data", "x"])
    assert stop.value.code == 2
    assert capsys.readouterr().err == "error: no such thing; do this\n"
    with pytest.raises(ValueError, match="a bug"):
        run_command(Config, raise_programmers_error, ["--data", "x"])


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["train_tokenizer.py", "--input", "no-such-file", "--out", "x"],
            "no such file, directory or glob: no-such",
        ),
        (
            ["pretrain.py", "--data", "no", "--tokenizer", "no", "--out", "new"],
            "no tokenizer.json in no; python",
        ),
        (
            ["sft.py", "--init-from", "no", "--data", "x", "--out", "new"],
            "no model in no: config.json is missing",
        ),
        (
            ["dpo.py", "--init-from", "no", "--data", "x", "--out", "new", "--resume"],
            "nothing to resume in new",
        ),
        (["generate.py", "--model", "no", "--prompt", "x"], "no model in no"),
        (["generate.py", "--model", "no"], "--prompt TEXT or --chat"),
        (
            ["-m", "nanophi.text.clean", "--input", "no.jsonl", "--out", "x.jsonl"],
            "no such file, directory or glob: no.",
        ),
    ],
)
def test_scripts_name_the_mistake(command, expected, tmp_path):
    script = command[0] if command[0] == "-m" else str(ROOT / command[0])
    done = subprocess.run(
        [sys.executable, script, *command[1:]], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert expected in done.stderr
    assert done.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_reader_that_goes_away_is_no_success(tmp_path):
    """`pretrain.py | head && sft.py` went on with half a model: the broken pipe had ended in exit
    code 0.
    """
    code = (
        "from tests.test_cli import *; "
        "run_command(Config, lambda cfg: [print(i) for i in range(10**5)], ['--data', 'x'])"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    writer.stdout.readline()
    writer.stdout.close()
    assert writer.wait(timeout=60) == 141
    assert writer.stderr.read() == b""
    writer.stderr.close()


def test_progress_prints_plain_lines_without_a_terminal(capsys):
    with Progress("merges", 4, every_s=0.0) as bar:
        bar.update(1, "count 17")
    assert capsys.readouterr().err.startswith("merges 1/4  eta ")
    with Progress("documents", None, every_s=0.0) as bar:
        bar.update(3)
    assert capsys.readouterr().err == "documents 3\n"


def test_durations():
    assert [duration(s) for s in (7, 738, 9000)] == ["7s", "12.3m", "2.5h"]
