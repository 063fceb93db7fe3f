"""A loss that is no number costs a step, not the run; a streak ends it with the batch kept."""

import json
import sys
import types
from pathlib import Path

import pytest
import torch
from torch._dynamo.exc import TorchDynamoException

from nanophi.cli import UserError
from nanophi.infer.generate import generate
from nanophi.model.speed import speed_up
from nanophi.train import loop, precision, setup
from nanophi.train.distributed import World
from nanophi.train.faults import BAD_BATCH, MEMORY, STREAK, Faults, or_uncompiled
from nanophi.train.loop import train
from nanophi.train.losses import next_token_loss
from nanophi.train.run_files import STATE
from nanophi.train.rundir import RunDirectory
from tests.conftest import tiny_model
from tests.train.test_loop import config, pretraining, state, tensors


def broken_at(steps, value=float("nan")):
    """A loss that is `value` times too large at these steps (counted from 0)."""
    calls = iter(range(10**9))

    def loss_fn(model, batch):
        loss, count, sums = next_token_loss(model, batch)
        return (loss * value if next(calls) in steps else loss), count, sums

    return loss_fn


def lines_of(path):
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def test_a_step_without_a_finite_loss_is_skipped_and_counted(tmp_path, capsys):
    model, (_, data) = tiny_model(), pretraining(None)
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, broken_at({0}), data.batch_at, config(tmp_path, steps=1))
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    train(
        model,
        broken_at({1, 3}, float("inf")),
        data.batch_at,
        config(tmp_path, steps=6, overwrite=True),
    )
    lines = lines_of(tmp_path)
    assert [line["skipped"] for line in lines] == [0, 1, 1, 2, 2, 2]
    assert [line["loss"] is None for line in lines] == [False, True, False, True, False, False]
    assert all(torch.isfinite(p).all() for p in model.parameters())
    assert "step 2: loss inf, gradient nan: skipped" in capsys.readouterr().out
    assert state(tmp_path)["skipped"] == 2


def test_a_streak_ends_the_run_and_keeps_the_batch(tmp_path):
    model, (_, data) = tiny_model(), pretraining(None)
    bad = set(range(8, 100))
    with pytest.raises(
        UserError, match=f"{STREAK} steps in a row had a loss or gradient that is not finite"
    ):
        train(model, broken_at(bad), data.batch_at, config(tmp_path, steps=40))
    kept = torch.load(tmp_path / BAD_BATCH)
    assert torch.equal(kept["ids"], data.batch_at(8 + STREAK - 1).ids)
    assert state(tmp_path)["step"] % 7 == 0  # the checkpoint before
    assert all(torch.isfinite(t).all() for t in tensors(state(tmp_path)["model"]).values())


def test_a_jump_of_the_loss_is_said_once_it_is_known_what_is_usual():
    faults = Faults()
    for step in range(MEMORY):
        assert (
            faults.look_at({"step": step, "loss": 3 + 0.01 * (step % 5), "grad_norm": 1.0}, True)
            == []
        )
    (note,) = faults.look_at({"step": 99, "loss": 4.5, "grad_norm": 1.0}, True)
    assert note == "step 99: loss 4.500 jumped from about 3.020"
    assert faults.look_at({"step": 100, "loss": 3.3, "grad_norm": 1.0}, True) == []


def test_fp16_scales_the_loss_and_learns_from_overflow(tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "GROW_AFTER", 4)
    model, (_, data) = tiny_model(), pretraining(None)
    train(
        model,
        broken_at({1, 2}, float("inf")),
        data.batch_at,
        config(tmp_path, steps=8, dtype="float16"),
    )
    assert state(tmp_path)["scale"] == [
        precision.FIRST_SCALE / 4 * 2,
        1,
    ]  # halved twice, doubled after four sound steps
    plain, scaled = tmp_path / "plain", tmp_path / "scaled"
    for out, dtype in ((plain, "float32"), (scaled, "float16")):
        train(tiny_model(), next_token_loss, data.batch_at, config(out, steps=5, dtype=dtype))
    for a, b in zip(lines_of(plain), lines_of(scaled), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-3)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-2)


def test_a_full_disk_ends_the_run_or_is_only_said(tmp_path, monkeypatch, capsys):
    """The checkpoint before stays; with --keep-going training does too."""
    _, data = pretraining(None)
    save, export, failing = RunDirectory.save, RunDirectory.export, {14}

    def full(run):
        if run.step in failing:
            raise UserError("cannot write: No space left on device")
        save(run)

    def full_too(run, directory):
        if run.step == 9:
            raise OSError(28, "No space left on device")
        export(run, directory)

    monkeypatch.setattr(RunDirectory, "save", full)
    monkeypatch.setattr(RunDirectory, "export", full_too)
    with pytest.raises(UserError, match="No space left"):
        train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path))
    assert state(tmp_path)["step"] == 7
    train(
        tiny_model(),
        next_token_loss,
        data.batch_at,
        config(tmp_path, keep_going=True, keep_at=0.45, overwrite=True),
    )
    assert state(tmp_path)["step"] == 20
    said = capsys.readouterr().out
    assert all(
        f"step {step} could not be written, the checkpoint before it stays" in said
        for step in (9, 14)
    )


def test_saving_by_the_clock(tmp_path, monkeypatch):
    clock = iter(range(0, 10**6, 30))  # half a minute between looks
    monkeypatch.setattr(loop.time, "monotonic", lambda: next(clock))
    _, data = pretraining(None)
    saved = []
    monkeypatch.setattr(RunDirectory, "save", lambda run: saved.append(run.step))
    train(
        tiny_model(),
        next_token_loss,
        data.batch_at,
        config(tmp_path, steps=12, save_every=100, save_minutes=2),
    )
    assert len(saved) > 2
    assert saved[-1] == 12
    assert not (tmp_path / STATE).exists()


def test_where_compiling_fails_the_step_is_done_without(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda module, **_: setattr(module, "_compiled_call_impl", broken),
    )

    def broken(*args, **named):
        raise RuntimeError("no C++ compiler\nand a page of more")

    _, data = pretraining(None)
    plain, compiled = tmp_path / "plain", tmp_path / "compiled"
    train(tiny_model(), next_token_loss, data.batch_at, config(plain, steps=3))
    train(tiny_model(), next_token_loss, data.batch_at, config(compiled, steps=3, compile=True))
    assert (
        "torch.compile failed, going on without it: RuntimeError: no C++ compiler\n"
        in capsys.readouterr().out
    )
    weights = zip(
        *(tensors(state(out)["model"]).values() for out in (plain, compiled)), strict=True
    )
    assert all(torch.equal(a, b) for a, b in weights)


def test_a_validation_that_cannot_be_compiled_is_done_without(capsys):
    """Only the first training step had a way back: a run died at its first validation, which is
    compiled by itself, and would have died where a later step has another shape.
    """
    compiled = True

    def uncompile():
        nonlocal compiled
        compiled = False

    def evaluate(error):
        if compiled:
            raise error
        return 1.5

    guarded = or_uncompiled(evaluate, uncompile, print)
    assert guarded(RuntimeError("no such kernel")) == 1.5
    compiled = True
    assert guarded(TorchDynamoException("other shapes")) == 1.5
    assert capsys.readouterr().out.count("torch.compile failed, going on without it: ") == 2
    compiled = True
    with pytest.raises(RuntimeError, match="the disk"):  # the compiler is not to blame
        guarded(RuntimeError("the disk"))
    for error in (UserError("wrong"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)):
            or_uncompiled(evaluate, uncompile, print)(error)
    assert compiled


# torch's compiler warns of torch's own code.
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")
def test_compiled_blocks_learn_the_same(tmp_path, capsys):
    """A warning that was an error here made compiling fail: this compared two plain runs."""
    _, data = pretraining(None)
    for name, compile in (("plain", False), ("compiled", True)):
        train(
            tiny_model(),
            next_token_loss,
            data.batch_at,
            config(tmp_path / name, steps=3, compile=compile),
        )
    assert "torch.compile failed" not in capsys.readouterr().out
    a, b = ([line["loss"] for line in lines_of(tmp_path / name)] for name in ("plain", "compiled"))
    assert a == pytest.approx(b, abs=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@torch.no_grad()
def test_sampling_from_a_compiled_model_compiles_nothing():
    """Each length of the cache was compiled, until the limit of recompilations also left validation
    uncompiled.
    """
    from torch._dynamo.utils import counters

    model = tiny_model()
    speed_up(model, compile=True)
    ids = torch.arange(7, 39).view(2, 16)
    model(ids)
    compiled = counters["stats"]["unique_graphs"]
    assert compiled > 0
    generate(model, [7, 8, 9], max_new_tokens=4)
    assert counters["stats"]["unique_graphs"] == compiled
    model(ids[:1, :8])
    assert counters["stats"]["unique_graphs"] > compiled


def test_tensorboard_is_written_where_it_is_installed(tmp_path, monkeypatch):
    """Its folder was once opened before an old run was deleted, and deleted with it."""
    seen = []

    class SummaryWriter:
        def __init__(self, folder, purge_step=None):
            self.folder = Path(folder)
            self.folder.mkdir(parents=True)
            (self.folder / "events.out.tfevents.1").write_bytes(b"")
            seen.append(("open", purge_step))

        def add_scalar(self, name, value, step):
            assert self.folder.exists()
            seen.append((name, step))

    monkeypatch.setitem(
        sys.modules, "torch.utils.tensorboard", types.SimpleNamespace(SummaryWriter=SummaryWriter)
    )
    _, data = pretraining(None)
    train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path, steps=2))
    assert seen[0] == ("open", 1)
    assert ("loss", 2) in seen
    train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path, steps=1, overwrite=True))


def test_more_ranks_than_samples_are_refused(tmp_path, monkeypatch):
    """An empty part would have other metrics than the rest, and the ranks would wait for each other
    for ever.
    """
    monkeypatch.setattr(setup, "join", lambda device: World(0, 8, "cpu"))
    _, data = pretraining(None)
    with pytest.raises(UserError, match="a step has 4 samples for 8 ranks: raise --batch-tokens"):
        train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path))


def test_ranks_that_see_other_checkpoints_are_refused(tmp_path, monkeypatch):
    class Parted(World):
        def gather(self, value):
            return [value, 500]

    monkeypatch.setattr(setup, "join", lambda device: Parted(0, 2, "cpu"))
    _, data = pretraining(None)
    with pytest.raises(
        UserError,
        match=r"the ranks would begin at steps \[0, 500\]: --out must be a directory all see",
    ):
        train(tiny_model(), next_token_loss, data.batch_at, config(tmp_path))
