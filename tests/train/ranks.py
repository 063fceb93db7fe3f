"""What test_distributed.py does alone, and runs with two ranks: `torchrun ranks.py OUT`.

All of it stands in one launch, because to start a process costs more than to train tiny models.
"""

import atexit
import contextlib
import os
import signal
import sys
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanophi.train.distributed import World, join
from nanophi.train.loop import train
from nanophi.train.losses import (
    PREFERENCE_LOSSES,
    LossFn,
    make_dpo_loss_fn,
    next_token_loss,
    validate,
)
from nanophi.train.packing import Packed
from nanophi.train.preferences import Pairs
from nanophi.train.reference import reference_logps
from nanophi.train.step import training_step
from tests.conftest import tiny_model
from tests.train.test_loop import config, random_documents, random_pairs

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
    cfg = config(out, overwrite=resume is None, **({"micro_batch": 2, "eval_every": 5} | options))

    def evaluate(model):
        return validate(model, loss_fn, [data.batch_at(1)])

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
    return {"optimizer": name, "micro_batch": 4, "clip": 0.5, "keep_at": 0.5}


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
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"
    # Rank 1 dies; torchrun starts all ranks anew, and they come here a second time.
    kind = send_to_rank_1(signal.SIGKILL, 12, world) if first_attempt else Packed
    run(out / "killed", documents(kind), resume="auto", dropout=0.1)

    gradients(out, world)
    whole_and_resumed(out / "whole", dropout=0.1)
    for name in OPTIMIZERS:
        whole_and_resumed(out / name, **sharded(name), shard=True)
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
