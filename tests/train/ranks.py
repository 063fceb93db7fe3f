"""What test_distributed.py does alone, and runs with two ranks: `torchrun ranks.py OUT`.

All of it stands in one launch, because to start a process costs more than to train tiny models.
Four ranks do `divided`, and go on with a model that two have split.
"""

import atexit
import contextlib
import os
import shutil
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from safetensors import SafetensorError
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanophi.cli import UserError
from nanophi.train import distributed, rundir, split_state
from nanophi.train.distributed import (
    World,
    by_all_ranks,
    by_ranks_of_rows,
    chunk_sizes,
    distribute,
    is_distributed,
    join,
    whole,
)
from nanophi.train.held_out import divergence
from nanophi.train.loop import train
from nanophi.train.losses import (
    PREFERENCE_LOSSES,
    LossFn,
    make_dpo_loss_fn,
    next_token_loss,
    validate,
)
from nanophi.train.optim import orthogonalize
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs
from nanophi.train.reference import reference_logps
from nanophi.train.run_files import STATE
from nanophi.train.rundir import RunDirectory
from nanophi.train.split_state import likes_of, put_back, take_out, write_rows
from nanophi.train.state import seal
from nanophi.train.step import training_step
from tests.conftest import tiny_model
from tests.train.test_loop import config, random_documents, random_pairs, state

DTYPES = (torch.float32, torch.float64)
MICRO_BATCHES = (8, 4, 1)
OPTIMIZERS = ("muon", "adamw", "adafactor")


def documents(kind: type[Packed] = Packed) -> Packed:
    return kind(random_documents(), 32, 8, seed=1)


def run(
    out: Path,
    data: Packed | Pairs | None = None,
    loss_fn: LossFn = next_token_loss,
    **options,
) -> None:
    """Train a tiny model into `out`."""
    data = data or documents()
    model = tiny_model(resid_pdrop=options.pop("dropout", 0.0))
    model.to(options.pop("weights", torch.float32))
    stop_at = options.pop("stop_at", None)
    resume = options.pop("resume", None)
    divides = options.pop("divides", False)
    cfg = config(out, overwrite=resume is None, **({"micro_batch": 2, "eval_every": 5} | options))

    def evaluate(model):
        if divides:
            return validate(model, loss_fn, data.in_order(), join("cpu"))
        return validate(model, loss_fn, [data.batch_at(1)])  # it knows nothing of ranks

    train(
        model,
        loss_fn,
        data.batch_at,
        cfg,
        evaluate,
        data_id=data.data_id,
        stop_at=stop_at,
        resume=resume,
    )


def gradients(out: Path, world: World) -> None:
    """The gradients of one step, whatever the micro-batch, and where 20 steps lead."""
    for dtype in DTYPES:
        for micro_batch in MICRO_BATCHES:
            model = tiny_model().to(dtype)
            batch = documents().batch_at(0, part=world.part(8))
            means = training_step(model, [], next_token_loss, batch, micro_batch, world).means
            if world.first:
                found = {name: p.grad for name, p in model.named_parameters()}
                found["loss"] = torch.tensor(means["loss"])
                torch.save(found, out / f"{dtype}-{micro_batch}.pt")
    # AdamW, because Muon iterates in fp32 and magnifies what rounding does.
    run(out / "plain", weights=torch.float64, optimizer="adamw")


def whole_and_resumed(out: Path, *of, **options) -> None:
    """The same run without a break, and with one."""
    run(out, *of, **options)
    parts = out.with_name(f"{out.name}-parts")
    run(parts, *of, **options, stop_at=options.get("steps", 20) // 2)
    run(parts, *of, **options, resume="yes")


# Runs whose gradients travel in bf16.
IN_BF16 = ("bf16", "bf16-shard")
TRAVELLING = {"reduce_dtype": "bfloat16", "micro_batch": 4}

# The runs of preferences: each loss with a model that is split, and one with a whole model.
PREFERENCES = {f"{loss}-shard": loss for loss in PREFERENCE_LOSSES} | {"hinge": "hinge"}


def preferences(loss: str) -> tuple[Pairs, LossFn]:
    """Pairs that share their prompts, with what the reference thinks of them, and their loss."""
    pairs = Pairs(random_pairs(16), 8, seed=1, share=True)
    pairs.reference = reference_logps(tiny_model(), pairs, 8)
    return pairs, make_dpo_loss_fn(loss=loss, sft_weight=0.1)


def settings_of(name: str) -> dict:
    """Settings of a run of preferences."""
    return {"optimizer": "adamw", "steps": 6, "micro_batch": 4, "shard": name.endswith("-shard")}


def sharded(name: str) -> dict:
    """Settings of a run whose model is split. One process takes the micro-steps of two ranks."""
    return {
        "optimizer": name,
        "micro_batch": 4,
        "clip": 0.5,
        "keep": 3,
        "keep_at": 0.5,
        "divides": True,
    }


# ---- the state of a split model


class Odd(torch.nn.Module):
    """Five rows, and one: of four ranks, one or three have none."""

    def __init__(self):
        super().__init__()
        self.model = torch.nn.Module()
        self.model.layers = torch.nn.ModuleList([torch.nn.Linear(3, 5), torch.nn.Linear(2, 1)])

    def hidden(self) -> None:
        """`distribute` wraps it."""


def odd_rows(out: Path, world: World) -> None:
    """Write rows that ranks cannot divide evenly. Read them, and those that two ranks wrote."""
    torch.manual_seed(0)
    model = Odd()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    distribute(model, world)
    likes = likes_of(model.state_dict(), [])
    saved = {"model": dict(model.state_dict()), "optimizers": []}
    saved["parts"] = world.gather(write_rows(out / "odd", take_out(saved), world))
    if world.first:
        torch.save(saved | {"expected": expected}, out / "odd" / "saved.pt")
    world.gather(None)
    for folder in out.glob("odd*"):
        saved = torch.load(folder / "saved.pt")
        put_back(saved, folder, likes, world)
        for name, tensor in saved["model"].items():
            assert is_distributed(tensor)
            assert torch.equal(whole(tensor), expected[name])


HALF = "adamw-parts/step-000010"  # a state that two ranks have written
SPLIT = sharded("adamw") | {"shard": True, "resume": "yes"}


def begin_with(state: Path, out: Path, world: World) -> None:
    """Copy a state into a directory of its own."""
    if world.first:
        shutil.copytree(state, out)
    world.gather(None)


def refused(out: Path, world: World, **options) -> None:
    """Write down what a run dies of. It must leave the state as it was."""
    before = {path: path.read_bytes() for path in out.glob("train_state*/*")}
    before[out / STATE] = (out / STATE).read_bytes()
    message = "nothing"
    try:
        run(out, **SPLIT | options)
    except UserError as error:
        message = str(error)
    world.gather(None)  # until rank 0 has tidied up
    assert {*before} == {*out.glob("train_state*/*"), out / STATE}
    assert all(path.read_bytes() == content for path, content in before.items())
    (out.parent / f"{out.name}-{world.rank}.txt").write_text(message)
    world.gather(None)


def broken_saves(out: Path, world: World) -> None:
    """A part is damaged, the disk of one rank is full, a kill comes before train_state.pt."""
    for name in ("damaged", "full", "of-one"):
        begin_with(out / HALF, out / name, world)
    if world.first:
        (rows,) = (out / "damaged").glob("*/rows-00002-of-00002.safetensors")
        flipped = bytearray(rows.read_bytes())
        flipped[-1] ^= 1
        rows.write_bytes(flipped)
        # One process would have written such a file.
        saved = state(out / "of-one")
        torch.save(saved | {"parts": None}, out / "of-one" / STATE)
        seal(out / "of-one" / STATE)
    world.gather(None)
    refused(out / "damaged", world)

    def full(*args, **named):
        raise SafetensorError("no space left")

    with patch.object(split_state, "save_file", full if world.rank == 1 else save_file):
        refused(out / "full", world, stop_at=11)

    def killed(*args):
        raise KeyboardInterrupt

    with (
        patch.object(rundir, "put_together", killed),
        patch.object(rundir, "delete_parts"),
        patch.object(RunDirectory, "_write_again"),
        contextlib.suppress(KeyboardInterrupt),
    ):
        run(out / "full", **SPLIT, stop_at=11)
    world.gather(None)
    for name in ("full", "of-one"):
        run(out / name, **SPLIT)


# ---- work that ranks divide


def divided(out: Path, world: World) -> None:
    """What all ranks have after work that they divide."""
    model = tiny_model()
    found = validate(model, next_token_loss, documents().in_order(), world)
    found = {name: torch.tensor(value, dtype=torch.float64) for name, value in found.items()}
    for count in (1, 7):
        pairs = Pairs(random_pairs(count), 2, seed=1)
        found[f"reference of {count}"] = reference_logps(model, pairs, 2, world)
        kl = divergence(model, tiny_model(seed=1), pairs, world)
        found[f"divergence on {count}"] = torch.tensor(kl, dtype=torch.float64)
    for stack in stacks():
        name = str(list(stack.shape))
        found[f"by all ranks {name}"] = by_all_ranks(orthogonalize, stack)
        found[f"of rows {name}"] = iterated_by_rows(stack, world)
    if world.size > 1:
        found["sums"] = summed_gradients(world)
        found["sums in bf16"] = summed_gradients(replace(world, reduce_dtype=torch.bfloat16))
    torch.save(found, out / f"divided-{world.rank}.pt")


def stacks() -> list[torch.Tensor]:
    """Matrices whose number and rows two or four ranks can and cannot divide evenly."""
    torch.manual_seed(0)
    return [torch.randn(n, rows, 6) for n, rows in ((1, 4), (4, 8), (5, 5), (3, 2))]


def iterated_by_rows(stack: torch.Tensor, world: World) -> torch.Tensor:
    """The whole of it, put together from the rows that each rank gets."""
    if world.size == 1:
        return orthogonalize(stack)
    ends = torch.tensor(chunk_sizes(stack.shape[1], world.size)).cumsum(0).tolist()
    first = ends[world.rank - 1] if world.rank else 0
    rows = stack[:, first : ends[world.rank]]
    return torch.cat(world.gather(by_ranks_of_rows(orthogonalize, rows, stack.shape[1])), 1)


NUMBERS = 60  # of each weight below; a bucket holds more than one of them, and less than two
ROUNDED = 257.0  # is 256 in bf16


def weights_and_factors(rank: int) -> tuple[dict[str, torch.Tensor], list[torch.Tensor]]:
    """Weights of a product, and what each of two micro-batches of a rank is multiplied by.

    All are small whole numbers, so that sums have no rounding in any order.
    """
    weights = {name: torch.full((NUMBERS,), 1.0 + i) for i, name in enumerate("abcd")}
    weights["frozen"] = torch.full((NUMBERS,), 3.0)
    weights["unused"] = torch.full((NUMBERS,), 3.0)
    dice = torch.Generator().manual_seed(rank)
    return weights, [torch.randint(-2, 3, (NUMBERS,), generator=dice) for _ in range(2)]


def summed_gradients(world: World) -> dict[str, Any]:
    """Gradients that are summed over the ranks during backward, and the order of events."""
    weights, factors = weights_and_factors(world.rank)
    events: list[str] = []
    for name in "abcd":
        weights[name].requires_grad_()
        weights[name].register_post_accumulate_grad_hook(
            lambda p, name=name: events.append(f"gradient of {name}")
        )
    weights["unused"].requires_grad_()
    trained = [weights[name] for name in ("a", "unused", "b", "c", "d")]
    send = dist.all_reduce

    def sending(message, *args, **named):
        events.append(f"{message.numel()} of {message.dtype}")
        return send(message, *args, **named)

    with patch.object(distributed, "BUCKET", 100), patch.object(dist, "all_reduce", sending):
        for number, factor in enumerate(factors):
            product = factor + (ROUNDED if world.reduce_dtype else 0)
            with world.adding_gradients(None, trained, last=number == 1):
                for name in ("a", "frozen", "b", "c", "d"):
                    product = product * weights[name]
                product.sum().backward()
    assert weights["frozen"].grad is None
    gradients = {name: weights[name].grad for name in ("a", "b", "c", "d", "unused")}
    return gradients | {"events": events}


# ---- data and signals


def send_to_rank_1(name: signal.Signals, at: int, world: World) -> type[Packed]:
    """Data at whose step `at` rank 1 gets a signal."""

    class Signalling(Packed):
        def batch_at(self, step):
            if step == at and world.rank == 1:
                os.kill(os.getpid(), name)
            return super().batch_at(step)

    return Signalling


def main(out: Path) -> None:
    world = join("cpu")
    divided(out, world)
    odd_rows(out, world)
    if world.size == 4:
        run(out / "half", **SPLIT, stop_at=10)  # what is read is written
        return
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    # Rank 1 dies; torchrun starts all ranks anew, and they come here a second time.
    kind = send_to_rank_1(signal.SIGKILL, 12, world) if first_attempt else Packed
    run(out / "killed", documents(kind), resume="auto", dropout=0.1)

    gradients(out, world)
    whole_and_resumed(out / "whole", dropout=0.1)
    for name in OPTIMIZERS:
        whole_and_resumed(out / name, **sharded(name), shard=True)
    broken_saves(out, world)
    for name in IN_BF16:
        run(out / name, steps=4, optimizer="adamw", shard=name.endswith("shard"), **TRAVELLING)
    for name, loss in PREFERENCES.items():
        whole_and_resumed(out / name, *preferences(loss), **settings_of(name))
    # One rank hears of it, all save the same step.
    try:
        run(out / "interrupted", documents(send_to_rank_1(signal.SIGTERM, 5, world)))
    except SystemExit as stop:
        (out / f"code-{world.rank}").write_text(str(stop.code))


def write_threads(out: Path) -> None:
    """What runs beside Python when it ends, after `join` has tidied up."""
    threads = []
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has just ended
            threads.append((thread / "comm").read_text())
    (out / f"threads-{os.environ['RANK']}").write_text("".join(threads))


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    atexit.register(partial(write_threads, folder))
    main(folder)
