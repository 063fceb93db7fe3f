"""Two ranks train as one process would: the same gradients, exact resume, one of them killed or
interrupted.
"""

import json
import os
import socket
import subprocess
import sys
from datetime import timedelta
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from nanophi.cli import UserError
from nanophi.model.checkpoint import load
from nanophi.train import distributed
from nanophi.train.distributed import World, join, part_like, put_together, whole
from tests.train.test_loop import state, tensors

ROOT = Path(__file__).resolve().parents[2]


def torchrun(out, task, *flags, ranks=2):
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        str(ranks),
        *flags,
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*command, str(ROOT / "tests/train/ranks.py"), str(out), task],
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The same work by one process and by two."""
    found = {}
    for ranks in (1, 2):
        found[ranks] = tmp_path_factory.mktemp(f"ranks{ranks}")
        done = torchrun(found[ranks], "gradients", ranks=ranks)
        assert done.returncode == 0, done.stderr
    return found


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [("torch.float32", 1e-6), ("torch.float64", 1e-10)]
)
def test_gradients_are_those_of_one_process(folders, dtype, tolerance):
    whole = torch.load(folders[1] / f"{dtype}-8.pt")
    for ranks in (1, 2):
        for micro_batch in (8, 4, 1):
            got = torch.load(folders[ranks] / f"{dtype}-{micro_batch}.pt")
            assert got.keys() == whole.keys()
            assert max((got[name] - whole[name]).abs().max().item() for name in whole) < tolerance


def test_two_ranks_end_where_one_process_does(folders):
    one, two = (tensors(state(folders[ranks] / "plain")["model"]) for ranks in (1, 2))
    assert max((one[name] - two[name]).abs().max().item() for name in one) < 1e-9
    lines = [
        [
            json.loads(line)
            for line in (folders[ranks] / "plain" / "metrics.jsonl").read_text().splitlines()
        ]
        for ranks in (1, 2)
    ]
    assert len(lines[0]) == len(lines[1]) == 20
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-9) for a, b in zip(*lines, strict=True))
    assert json.loads((folders[2] / "plain" / "run.json").read_text())["ranks"] == 2


def test_resumed_equals_unbroken_on_two_ranks(folders):
    """With dropout: each rank's random generator is part of the state."""
    whole, parts = (tensors(state(folders[2] / name)) for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def assert_no_threads_of_gloo(out):
    """Two of ten runs ended in SIGABRT with all their files written: a thread of gloo's let go of
    its last tensor while the interpreter was already on its way out. The group was never taken
    down, because something still held it.
    """
    for rank in (0, 1):
        threads = (out / f"threads-{rank}").read_text()
        assert "gloo" not in threads
        assert threads or sys.platform != "linux"


def test_two_ranks_leave_in_order(folders):
    assert_no_threads_of_gloo(folders[2])


@pytest.mark.slow
def test_a_killed_rank_is_replaced_and_the_result_the_same(folders, tmp_path):
    done = torchrun(tmp_path, "killed", "--max-restarts", "1")
    assert done.returncode == 0, done.stderr
    assert "resume:" in done.stdout
    whole, killed = (
        tensors(state(folder)) for folder in (folders[2] / "whole", tmp_path / "killed")
    )
    assert all(torch.equal(whole[name], killed[name]) for name in whole)


@pytest.mark.slow
def test_an_interrupt_that_one_rank_hears_stops_all(tmp_path):
    done = torchrun(tmp_path, "interrupted")
    assert done.returncode == 0, done.stderr
    assert [(tmp_path / f"code-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert state(tmp_path / "interrupted")["step"] == 6


@pytest.mark.parametrize(
    "name",
    ["muon", *(pytest.param(name, marks=pytest.mark.slow) for name in ("adamw", "adafactor"))],
)
def test_sharded_equals_one_process(tmp_path, name):
    """Weights, losses, what is resumed, what is exported on the way: the same files as one process
    writes.
    """
    for ranks in (1, 2):
        done = torchrun(tmp_path / str(ranks), f"sharded {name}", ranks=ranks)
        assert done.returncode == 0, done.stderr
    assert_no_threads_of_gloo(tmp_path / "2")
    one, two = (tmp_path / str(ranks) / name for ranks in (1, 2))
    whole, sharded = tensors(state(one)), tensors(state(two))
    weights = [path for path in whole if path.startswith(("/model", "/optimizers"))]
    assert len(weights) > 40
    assert max((whole[path] - sharded[path]).abs().max().item() for path in weights) < 1e-6
    resumed = tensors(state(two.with_name(f"{name}-parts")))
    assert all(torch.equal(sharded[path], resumed[path]) for path in weights)
    for lines in zip(
        *((out / "metrics.jsonl").read_text().splitlines() for out in (one, two)), strict=True
    ):
        a, b = map(json.loads, lines)
        assert [b["loss"], b.get("val_loss")] == pytest.approx(
            [a["loss"], a.get("val_loss")], abs=1e-6
        )
    for folder in ("best", "", f"../{name}-early"):
        (a, _), (b, _) = (load(out / folder) for out in (one, two))
        assert all(
            (p - q).abs().max() < 1e-6 for p, q in zip(a.parameters(), b.parameters(), strict=True)
        )


def test_a_part_of_a_whole_is_the_whole_where_nothing_is_sharded():
    x = torch.arange(6.0).view(3, 2)
    assert whole(x) is part_like(x, like=torch.zeros(3, 2)) is x
    assert put_together({"a": [x, 1]}, keep=False) == {"a": [x, 1]}


def test_a_missing_rank_ends_in_one_line(monkeypatch):
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(
        UserError, match=r"2 ranks should train together and did not all come: .*1/2 clients"
    ):
        join("cpu")
    monkeypatch.delenv("MASTER_ADDR")
    with pytest.raises(UserError, match="MASTER_ADDR expected, but not set; use torchrun"):
        join("cpu")


def test_parts_cover_all_samples():
    for size in (1, 2, 3, 7):
        for samples in (1, 5, 8):
            parts = [World(rank, size, "cpu").part(samples) for rank in range(size)]
            assert parts[0][0] == 0
            assert parts[-1][1] == samples
            assert all(a[1] == b[0] for a, b in pairwise(parts))


def test_a_world_of_one_needs_nothing(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    world = join("cpu")
    assert (world.rank, world.size, world.device, world.first) == (0, 1, "cpu", True)
    assert world.add([1.0, 2.0]) == world.largest([1.0, 2.0]) == [1.0, 2.0]
    assert world.gather("x") == ["x"]


def test_more_ranks_than_gpus_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("LOCAL_RANK", "3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="rank 3 has no GPU of its own: this machine has 2"):
        join("cuda")
    with pytest.raises(UserError, match="--device cuda:1: of 4 ranks each has a GPU of its own"):
        join("cuda:1")
