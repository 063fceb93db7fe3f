"""What is installed from a wheel does the work of the repository, from any directory."""

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from tests.conftest import PREFERENCES, QUESTION, RAW, SFT, write

ROOT = Path(__file__).parent.parent
SCRIPTS = ["train_tokenizer", "pretrain", "sft", "dpo", "generate"]
SOURCES = ["nanophi", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]


def run(*command, **options) -> str:
    ran = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, timeout=600, **options
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, without the network."""
    source = tmp_path_factory.mktemp("source")
    for name in [*SOURCES, *(f"{script}.py" for script in SCRIPTS)]:
        if (ROOT / name).is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "*.tmp")
            shutil.copytree(ROOT / name, source / name, ignore=ignored)
        else:
            shutil.copy(ROOT / name, source / name)
    out = tmp_path_factory.mktemp("wheel")
    pytest.importorskip("setuptools", reason="wheels are built by setuptools")
    options = ["--no-deps", "--no-build-isolation", "--no-index", "--quiet"]
    run(sys.executable, "-m", "pip", "wheel", *options, "-w", out, source)
    (made,) = out.glob("*.whl")
    return made


def test_a_wheel_has_all_that_runs(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {"nanophi/py.typed", "nanophi/infer/page.html"} <= names
    assert {f"nanophi/scripts/{script}.py" for script in SCRIPTS} <= names
    modules = {path.relative_to(ROOT).as_posix() for path in (ROOT / "nanophi").rglob("*.py")}
    assert modules <= names
    assert not [name for name in names if name.startswith(("tests/", "generate", "sft"))]


@pytest.mark.slow
def test_the_five_scripts_work_from_a_wheel(wheel, tmp_path):
    """Text to chat, in a directory that knows nothing of the repository."""
    site = tmp_path / "site"
    options = ["--no-deps", "--no-index", "--quiet", "--target", site]
    run(sys.executable, "-m", "pip", "install", *options, wheel)
    work = tmp_path / "work"
    work.mkdir()
    environment = os.environ | {"PYTHONPATH": str(site)}

    def command(name, *flags) -> str:
        return run(sys.executable, site / "bin" / f"nanophi-{name}", *flags, cwd=work,
                   env=environment)  # fmt: skip

    found = run(sys.executable, "-c", "import nanophi; print(nanophi.__file__)", cwd=work,
                env=environment)  # fmt: skip
    assert found.startswith(str(site))
    write(work / "raw.jsonl", [{"text": text} for text in RAW])
    write(work / "sft.jsonl", SFT)
    write(work / "dpo.jsonl", PREFERENCES)
    small = ["--batch-tokens", 128, "--context", 128, "--warmup", 1, "--device", "cpu"]
    command("train-tokenizer", "--input", "raw.jsonl", "--out", "tokenizer", "--vocab-size", 400)
    shards = ["--input", "raw.jsonl", "--tokenizer", "tokenizer", "--out", "tokens"]
    run(sys.executable, "-m", "nanophi.text.shards", *shards, cwd=work, env=environment)
    command("pretrain", "--data", "tokens", "--tokenizer", "tokenizer", "--out", "pretrain",
            "--preset", "demo", "--width", 64, "--layers", 2, "--heads", 2, "--mlp", 128,
            "--steps", 4, *small)  # fmt: skip
    command("sft", "--init-from", "pretrain", "--data", "sft.jsonl", "--out", "sft", "--steps", 4,
            *small)  # fmt: skip
    command("dpo", "--init-from", "sft", "--data", "dpo.jsonl", "--out", "dpo", "--steps", 2,
            "--batch-pairs", 3, "--warmup", 1, "--device", "cpu")  # fmt: skip
    assert command("generate", "--model", "dpo", "--prompt", QUESTION, "--max-new-tokens", 4)
    assert json.loads((work / "dpo" / "run.json").read_text())["steps"] == 2
