"""Flags from dataclasses, and what a person sees who makes a mistake."""

import dataclasses
import importlib
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest

import dpo
import generate
import pretrain
import sft
import train_tokenizer
from nanophi import chinese
from nanophi.cli import (
    Progress,
    UserError,
    duration,
    flag,
    parser_for,
    run_command,
    shows_chinese,
)
from nanophi.columns import display_width
from nanophi.text import clean

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
        ["--data", "x", "--lr", "inf"],
        ["--data", "x", "--lr", "-1e999"],
        ["--data", "x", "--steps", "9" * 1000],
        ["--data", "x", "--steps", "9" * 5000],
        ["--data", "x", "--steps", "x" * 5000],
        ["--data", "x", "--steps", str(2**63)],
        ["--data", "x", "--steps", "1e3"],
        ["--data", "x", ""],
        ["--data", " "],
        ["--data", "x", "--resume", ""],
        ["--data", "x", "--data", "y"],
        ["--data", "x", "--data=y"],
        ["--data", "x", "--bos", "--no-bos"],
        ["--data", "x", "--mode", "a\nb"],
    ],
)
def test_wrong_flags_exit_2(argv, capsys):
    """--step for --steps is an error: an abbreviation works until a second flag begins alike.

    `--input a --input b` read b alone, `--input ''` the whole working directory, `--epochs inf`
    and numbers of a thousand digits ended in tracebacks.
    """
    with pytest.raises(SystemExit) as stop:
        parse(*argv)
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error:")
    assert message.count("\n") == 1
    assert len(message) < 600


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
    ("script", "flags", "expected"),
    [
        (train_tokenizer, "--input no-such-file --out x", "no such file, directory or glob: no-su"),
        (pretrain, "--data no --tokenizer no --out new", "no tokenizer.json in no; python"),
        (sft, "--init-from no --data x --out new", "no model in no: config.json is missing"),
        (dpo, "--init-from no --data x --out new --resume", "nothing to resume in new"),
        (generate, "--model no --prompt x", "no model in no"),
        (generate, "--model no", "--prompt TEXT, --chat or --serve"),
        (clean, "--input no.jsonl --out x.jsonl", "no such file, directory or glob: no."),
    ],
)
def test_scripts_name_the_mistake(script, flags, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run_command(script.Config, script.main, flags.split())
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert expected in message
    assert message.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_script_ends_as_its_main_does(tmp_path):
    done = subprocess.run(
        [sys.executable, ROOT / "generate.py", "--model", "no", "--prompt", "x"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no model in no")
    assert done.stderr.count("\n") == 1


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
    assert writer.wait(timeout=600) == 141
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


# ---- help in Chinese

COMMANDS = [
    "train_tokenizer", "pretrain", "sft", "dpo", "generate", "examples.demo",
    "nanophi.text.clean", "nanophi.text.corpus", "nanophi.text.dedup", "nanophi.text.shards",
    "nanophi.text.stats", "nanophi.train.plot", "nanophi.model.card", "nanophi.infer.evaluate",
    "nanophi.infer.gguf", "nanophi.infer.pairs",
]  # fmt: skip
CHINESE = re.compile("[\u4e00-\u9fff]")


def helps_of(config: type) -> list[str]:
    """The English help of every flag, those of tables too."""
    helps = []
    for field in dataclasses.fields(config):
        rows = field.metadata.get("table")
        if rows is None:
            helps.append(field.metadata.get("help", ""))
        else:
            helps += [row.help for row in rows.values()]
    return [text for text in helps if text]


def test_every_command_is_known_here():
    """A command that this list lacks would have no Chinese help, and nobody would notice."""
    sources = [*ROOT.glob("*.py"), *ROOT.glob("nanophi/*/*.py"), ROOT / "examples" / "demo.py"]
    found = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for path in sources
        if "    run_command(Config, main)" in path.read_text(encoding="utf-8")
    }
    assert found == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_the_help_of_every_command_is_chinese_where_one_reads_chinese(name, monkeypatch):
    monkeypatch.setenv("NANOPHI_LANG", "zh")
    module = importlib.import_module(name)
    for text in helps_of(module.Config):
        assert CHINESE.search(chinese.help_of(text)), f"nanophi/chinese.py has no row for {text!r}"
    text = parser_for(module.Config, module.__doc__).format_help()
    assert "用法：" in text
    assert "(default" not in text
    assert CHINESE.search(chinese.description(module.__doc__)), "the description is English"
    widest = max(text.splitlines(), key=display_width)
    assert display_width(widest) <= 100, widest


def test_no_row_of_the_chinese_tables_is_left_over():
    modules = [importlib.import_module(name) for name in COMMANDS]
    helps = {text for module in modules for text in helps_of(module.Config)}
    known = helps | {text.partition(": ")[0] + ":" for text in helps}
    assert set(chinese.HELP) - known == set()
    firsts = {module.__doc__.split("\n")[0] for module in modules}
    assert set(chinese.DESCRIPTIONS) - firsts == set()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"NANOPHI_LANG": "zh"}, True),
        ({"NANOPHI_LANG": "en", "LANG": "zh_CN.UTF-8"}, False),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LC_ALL": "C", "LANG": "zh_CN.UTF-8"}, False),
        ({}, False),
    ],
)
def test_the_environment_chooses_the_language_of_the_help(environment, expected, monkeypatch):
    for name in ("NANOPHI_LANG", "LC_ALL", "LC_MESSAGES", "LANG"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert shows_chinese() is expected
