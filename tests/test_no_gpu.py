"""bench/no_gpu.py, where PyTorch is built for CUDA and there is no GPU. Elsewhere it is skipped."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
HEADERS = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "include/cuda_runtime_api.h"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        torch.version.cuda is None or torch.cuda.is_available(),
        reason="for a PyTorch with CUDA, on a machine without a GPU",
    ),
    pytest.mark.skipif(
        not (HEADERS.exists() and shutil.which("g++")), reason="needs g++ and CUDA's headers"
    ),
]


def table(*words):
    """The rows of what it prints, as dicts."""
    command = [sys.executable, str(ROOT / "bench/no_gpu.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=600, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "a wait inside a recording" not in done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    names, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    return [dict(zip(names, row, strict=True)) for row in rows]


def test_a_training_step():
    rows = table("--count", "demo")
    ours = [row for row in rows if row["side"] == "nanophi"]
    assert [row[""] for row in ours] == ["compiled", "compiled", "eager"]
    for row in ours:
        assert row["waits"] == "1"
        assert row["of these wait"] == "0"
        assert float(row["peak GB"]) <= float(row["estimated"])
    launches = [int(row["launches"].replace(",", "")) for row in ours]
    assert launches[0] < 0.8 * launches[2]


def test_a_token_of_an_answer():
    rows = table("--decode", "demo")
    for row in rows:
        if row["by"] == "generate":
            assert (row["graphs played"], row["waits"]) == ("1.00", "0.06")
        else:
            assert float(row["launches"]) > 1
