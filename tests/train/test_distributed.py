"""Two ranks train as one process would: the same gradients, exact resume, one of them killed or
interrupted.
"""

import atexit
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import warnings
from datetime import timedelta
from itertools import pairwise

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from nanophi.cli import UserError
from nanophi.model.checkpoint import load
from nanophi.train import distributed
from nanophi.train.distributed import (
    ALONE,
    World,
    join,
    leave_together,
    part_like,
    put_together,
    whole,
)
from nanophi.train.split_state import put_back
from tests.train import ranks
from tests.train.test_loop import state, tensors


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """The work by one process: this one."""
    out = tmp_path_factory.mktemp("one")
    ranks.gradients(out, ALONE)
    ranks.divided(out, ALONE)
    for name in ranks.OPTIMIZERS:
        ranks.run(out / name, **ranks.sharded(name))
    ranks.run(out / "bf16", steps=4, optimizer="adamw", micro_batch=4)
    for name, loss in ranks.PREFERENCES.items():
        ranks.run(out / name, *ranks.preferences(loss), **ranks.settings_of("one process"))
    return out


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """The same work by two ranks, in one launch. One of them is killed and replaced."""
    out = tmp_path_factory.mktemp("two")
    assert "resume:" in torchrun(2, out)
    return out


@pytest.fixture(scope="module")
def four(two, tmp_path_factory):
    """The work that ranks divide, by four of them, who also go on with the model of two."""
    out = tmp_path_factory.mktemp("four")
    shutil.copytree(two / ranks.HALF, out / "half")
    shutil.copytree(two / "odd", out / "odd-of-two")
    torchrun(4, out)
    return out


def torchrun(count, out):
    """What so many ranks have printed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", str(count), "--max-restarts", "1", ranks.__file__, str(out)]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def largest_difference(a, b):
    assert a.keys() == b.keys()
    return max((a[name] - b[name]).abs().max().item() for name in a)


def lines_of(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
def test_gradients_are_those_of_one_process(one, two, dtype, tolerance):
    whole = torch.load(one / f"{dtype}-8.pt")
    for out in (one, two):
        for micro_batch in ranks.MICRO_BATCHES:
            got = torch.load(out / f"{dtype}-{micro_batch}.pt")
            assert largest_difference(got, whole) < tolerance


def test_two_ranks_end_where_one_process_does(one, two):
    weights = [tensors(state(out / "plain")["model"]) for out in (one, two)]
    assert largest_difference(*weights) < 1e-9
    lines = [lines_of(out / "plain") for out in (one, two)]
    assert len(lines[0]) == len(lines[1]) == 20
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-9) for a, b in zip(*lines, strict=True))
    assert json.loads((two / "plain" / "run.json").read_text())["ranks"] == 2


@pytest.mark.parametrize("count", [2, 4])
def test_what_ranks_divide_has_the_bits_of_one_process(one, two, four, count):
    """Validation, the thoughts of the reference, and Muon's matrices: whole, or in rows."""
    expected = torch.load(one / "divided-0.pt")
    for rank in range(count):
        found = torch.load({2: two, 4: four}[count] / f"divided-{rank}.pt")
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("sums", ["sums", "sums in bf16"])
def test_gradients_are_summed_while_backward_goes_on(two, four, count, sums):
    """They leave from the last layer to the first, and the first message before backward ends. A
    weight without a gradient holds up its bucket, not the run; a frozen one is not sent.
    """
    in_bf16 = sums == "sums in bf16"
    expected = dict.fromkeys("abcd", torch.zeros(ranks.NUMBERS))
    for rank in range(count):
        weights, factors = ranks.weights_and_factors(rank)
        factor = sum(factors) + (2 * ranks.ROUNDED if in_bf16 else 0)
        product = torch.stack([weights[name] for name in ("a", "frozen", "b", "c", "d")]).prod(0)
        for name in expected:
            expected[name] = expected[name] + factor * product / weights[name]
    sent = torch.bfloat16 if in_bf16 else torch.float32
    for rank in range(count):
        found = torch.load({2: two, 4: four}[count] / f"divided-{rank}.pt")[sums]
        for name, value in expected.items():
            assert torch.allclose(found[name], value, rtol=2**-6 if in_bf16 else 0, atol=0)
            assert torch.equal(found[name], found[name].to(sent).float())
        assert not found["unused"].any()
        assert found["events"] == [
            *(f"gradient of {name}" for name in "dcba"),  # of the first micro-batch
            "gradient of d",
            "gradient of c",
            f"120 of {sent}",
            "gradient of b",
            "gradient of a",
            f"120 of {sent}",
            f"60 of {sent}",
        ]


@pytest.mark.parametrize("name", ["whole-parts", "killed"])
def test_resumed_equals_unbroken_on_two_ranks(two, name):
    """With dropout: each rank's random generator is part of the state. The second run goes on after
    one of its ranks was killed.
    """
    assert largest_difference(*(tensors(state(two / run)) for run in ("whole", name))) == 0


def test_two_ranks_leave_in_order(two):
    """Two of ten runs ended in SIGABRT with all their files written: a thread of gloo's let go of
    its last tensor while the interpreter was already on its way out. The group was never taken
    down, because something still held it.
    """
    for rank in (0, 1):
        threads = (two / f"threads-{rank}").read_text()
        assert "gloo" not in threads
        assert threads or sys.platform != "linux"


def test_an_interrupt_that_one_rank_hears_stops_all(two):
    assert [(two / f"code-{rank}").read_text() for rank in (0, 1)] == ["143", "143"]
    assert state(two / "interrupted")["step"] == 6


@pytest.mark.parametrize("name", ranks.OPTIMIZERS)
def test_sharded_equals_one_process(one, two, name):
    """Weights, losses, what is resumed, what is exported on the way: the same files as one process
    writes.
    """
    whole, sharded = (weights_of(out / name) for out in (one, two))
    assert len(whole) > 40
    assert largest_difference(whole, sharded) < 1e-6
    assert largest_difference(sharded, weights_of(two / f"{name}-parts")) == 0
    for a, b in zip(lines_of(one / name), lines_of(two / name), strict=True):
        assert [b["loss"], b.get("val_loss")] == pytest.approx(
            [a["loss"], a.get("val_loss")], abs=1e-6
        )
    for folder in (f"{name}/best", name, f"{name}-early"):
        (a, _), (b, _) = (load(out / folder) for out in (one, two))
        assert largest_difference(a.state_dict(), b.state_dict()) < 1e-6


@pytest.mark.parametrize("name", ranks.IN_BF16)
def test_gradients_that_travel_in_bf16_are_rounded(one, two, name):
    """Those of the first step have a hundredth of its norm to spare, and another last digit."""
    exact, rounded = (
        [line["grad_norm"] for line in lines_of(out)] for out in (one / "bf16", two / name)
    )
    assert rounded == pytest.approx(exact, rel=1e-2)
    assert rounded[0] != pytest.approx(exact[0], rel=1e-6)
    assert state(two / name)["settings"]["reduce_dtype"] == "bfloat16"


@pytest.mark.parametrize("name", ranks.PREFERENCES)
def test_each_preference_loss_is_that_of_one_process(one, two, name):
    """With prompts that are shared, whole and split models, and runs that go on."""
    whole, by_two = (weights_of(out / name) for out in (one, two))
    assert largest_difference(whole, by_two) < 1e-6
    assert largest_difference(by_two, weights_of(two / f"{name}-parts")) == 0
    for a, b in zip(lines_of(one / name), lines_of(two / name), strict=True):
        for measure in ("loss", "margin", "rewards_chosen", "logps_rejected", "accuracy"):
            assert b[measure] == pytest.approx(a[measure], abs=1e-4)


def test_any_number_of_ranks_goes_on_with_a_split_state(two, four, tmp_path):
    """Written by two ranks, read by one process and by four; and the other way round."""
    shutil.copytree(two / ranks.HALF, tmp_path / "half")
    assert len(list((tmp_path / "half").glob("train_state-000010/rows-*"))) == 2
    ranks.run(tmp_path / "half", **ranks.sharded("adamw"), resume="yes")
    assert not list((tmp_path / "half").glob("train_state-*"))
    whole = weights_of(two / "adamw")
    assert largest_difference(whole, weights_of(tmp_path / "half")) < 1e-6
    parts = [path.name for path in (four / "half").glob("train_state-000010/*")]
    assert sorted(parts) == [f"rows-0000{rank}-of-00004.safetensors" for rank in (1, 2, 3, 4)]
    assert largest_difference(weights_of(two / ranks.HALF), weights_of(four / "half")) == 0
    assert largest_difference(whole, weights_of(two / "of-one")) == 0


@pytest.mark.parametrize("count", [2, 4])
def test_rows_that_ranks_cannot_divide_evenly(two, four, count):
    """They are put together here, and by torch."""
    folder = {2: two, 4: four}[count] / "odd"
    saved = torch.load(folder / "saved.pt")
    put_back(saved, folder, {}, ALONE)
    assert saved["model"].keys() == saved["expected"].keys()
    assert largest_difference(saved["model"], saved["expected"]) == 0
    assert len(list(folder.glob("rows-*"))) == count
    by_torch = {f"model.{name}": torch.zeros_like(t) for name, t in saved["expected"].items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is one process
        dcp.load(by_torch, storage_reader=dcp.HuggingFaceStorageReader(str(folder)), no_dist=True)
    assert all(torch.equal(by_torch[f"model.{name}"], t) for name, t in saved["expected"].items())


def test_older_states_of_a_split_model_are_whole(two):
    """They hold links to the rows of their step."""
    for step in (7, 10, 14):
        older = two / "adamw-parts" / f"step-{step:06d}"
        saved = state(older)
        assert (saved["step"], len(saved["parts"])) == (step, 2)
        assert [path.name for path in older.glob("train_state-*")] == [f"train_state-{step:06d}"]
    assert [path.name for path in (two / "adamw").glob("train_state-*")] == ["train_state-000020"]


def test_what_breaks_a_save_of_one_rank_is_said_by_all_and_leaves_the_state_before(two):
    """A flipped bit, which rank 1 finds; no space on the disk of rank 1; and a kill when the rows
    are written and train_state.pt is not.
    """
    for name, message in (
        ("damaged", "rows-00002-of-00002.* is damaged"),
        ("full", "cannot write"),
    ):
        told = {(two / f"{name}-{rank}.txt").read_text() for rank in (0, 1)}
        assert len(told) == 1
        assert re.search(message, told.pop())
    assert largest_difference(weights_of(two / "adamw"), weights_of(two / "full")) == 0
    assert [path.name for path in (two / "full").glob("train_state-*")] == ["train_state-000020"]


def weights_of(out):
    """The weights and the states of the optimizers."""
    found = tensors(state(out))
    return {path: t for path, t in found.items() if path.startswith(("/model", "/optimizers"))}


def test_a_part_of_a_whole_is_the_whole_where_nothing_is_sharded():
    x = torch.arange(6.0).view(3, 2)
    assert whole(x) is part_like(x, like=torch.zeros(3, 2)) is x
    assert put_together({"a": [x, 1]}, keep=False) == {"a": [x, 1]}


RANKS = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.fixture
def variables(monkeypatch):
    """Sets variables of the environment beside those of the first of two ranks."""

    def put(**values):
        for name, value in (RANKS | values).items():
            monkeypatch.setenv(name, value)

    return put


def test_a_missing_rank_ends_in_one_line(monkeypatch, variables):
    monkeypatch.setattr(distributed, "JOINING", timedelta(seconds=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    variables(MASTER_PORT=str(port))
    with pytest.raises(
        UserError, match=r"2 ranks should train together and did not all come: .*1/2 clients"
    ):
        join("cpu")


def test_nccl_is_told_the_gpu_and_left_by_those_that_have_not_failed(monkeypatch, variables):
    """It warned that `destroy_process_group` was not called, and guessed which GPU is whose."""
    began, ended = [], []
    monkeypatch.setattr(dist, "rendezvous", lambda *args, **named: iter([(dist.HashStore(), 1, 2)]))
    monkeypatch.setattr(
        dist, "init_process_group", lambda *args, **named: began.append((*args, named))
    )
    monkeypatch.setattr(dist, "get_rank", lambda: 1)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    variables(RANK="1", LOCAL_RANK="1")
    assert join("cuda") == World(1, 2, "cuda:1")
    ((backend, named),) = began
    assert (backend, named["device_id"]) == ("nccl", torch.device("cuda:1"))

    registered = []
    monkeypatch.setattr(atexit, "register", registered.append)
    leave_together()
    assert not registered  # there is no group
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: ended.append("in order"))
    leave_together()
    (leave,) = registered
    monkeypatch.setattr(sys, "last_value", RuntimeError("failed alone"), raising=False)
    leave()
    assert not ended
    monkeypatch.setattr(sys, "last_value", None)
    leave()
    assert ended == ["in order"]


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
    assert world.add(torch.tensor([1.0, 2.0])).tolist() == [1.0, 2.0]
    assert world.gather("x") == ["x"]


def test_more_ranks_than_gpus_are_refused(monkeypatch, variables):
    variables(WORLD_SIZE="4")
    with pytest.raises(UserError, match="LOCAL_RANK, which says whose GPU is whose, is missing"):
        join("cuda")
    variables(WORLD_SIZE="4", LOCAL_RANK="3")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="rank 3 has no GPU of its own: this machine has 2"):
        join("cuda")
    with pytest.raises(UserError, match="--device cuda:1: of 4 ranks each has a GPU of its own"):
        join("cuda:1")
