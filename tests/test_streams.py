"""Odd terminals, pipes, file names and signals, seen from outside: each command is a process."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanophi import cli

from .conftest import write

ROOT = Path(__file__).resolve().parents[1]
ROWS = [{"text": "春天来了，小草从土里探出头来。", "source": "\ud83d"}, {"\ud83d": 1}]


def run(command: str, folder: Path, **environment: str) -> subprocess.CompletedProcess:
    """Run a command of the shell, in which `python` is this one."""
    return subprocess.run(
        ["bash", "-c", command.replace("python ", f"{sys.executable} ")],
        cwd=folder,
        capture_output=True,
        timeout=600,
        env={**os.environ, "PYTHONPATH": str(ROOT)} | environment,
    )


@pytest.fixture
def folder(tmp_path):
    lines = [json.dumps(row) for row in ROWS]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines))
    (tmp_path / os.fsdecode(b"bad\xff.jsonl")).write_text('{"no": 1}')
    return tmp_path


STATS = "python -m nanophi.text.stats --input . --no-duplicates"
CLEAN = "python -m nanophi.text.clean --input rows.jsonl --out o.jsonl"


@pytest.mark.parametrize(
    ("command", "environment"),
    [
        (f"{CLEAN} >&-", {}),
        (f"{CLEAN} 2>&-", {}),
        (f"{CLEAN} <&- >&- 2>&-", {}),
        (STATS, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}),
        (STATS, {"PYTHONIOENCODING": "gbk"}),
        (f"{CLEAN} && test -s o.jsonl", {"RANK": "3", "WORLD_SIZE": "x", "COLUMNS": "0"}),
    ],
)
def test_no_stream_ends_a_command(folder, command, environment):
    """With standard output closed, `clean` ended with 1 though its file was written; with standard
    error closed, at its beginning. A terminal that is not UTF-8, half a character in a row's
    "source", or a file name that is no text ended it in a UnicodeEncodeError.
    """
    done = run(command, folder, **environment)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr
    if command == STATS:
        assert "bad" in done.stdout.decode("gbk", "replace")  # the file that was skipped is named


def test_sigterm_cleans_up(folder):
    """A killed `clean` left its temporary files: only Ctrl-C removed them."""
    os.mkfifo(folder / "pipe")
    rows = [{"text": f"第{number}天，天气很好。"} for number in range(20_000)]
    write(folder / "many.jsonl", rows)
    before = set(os.listdir(folder))
    flags = "--input many.jsonl --out o.jsonl --dropped d.jsonl"
    process = subprocess.Popen(
        [sys.executable, "-m", "nanophi.text.clean", *flags.split()],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    while not any(name.endswith(".tmp") for name in os.listdir(folder)):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=600) == 143
    assert set(os.listdir(folder)) == before


def test_a_bar_without_a_standard_error(monkeypatch):
    """`pythonw` and some notebooks have none: `None.isatty`."""
    monkeypatch.setattr(sys, "stderr", None)
    with cli.Progress("rows", 3) as bar:
        bar.update()


@pytest.mark.parametrize(
    ("environment", "first"),
    [
        ({}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
        ({"RANK": "1"}, True),
        ({"RANK": "1", "WORLD_SIZE": "1"}, True),
    ],
)
def test_a_rank_alone_is_the_first(monkeypatch, environment, first):
    """A cluster that sets RANK and starts one process got a run that printed and wrote nothing."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cli.is_first_rank() is first
