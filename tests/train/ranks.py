"""What tests/train/test_distributed.py runs under torchrun, or alone: `ranks.py OUT TASK`."""

import atexit
import contextlib
import os
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from nanophi.train.distributed import join
from nanophi.train.loop import train
from nanophi.train.losses import next_token_loss, validate
from nanophi.train.packing import Packed
from nanophi.train.step import training_step
from tests.conftest import tiny_model
from tests.train.test_loop import config, random_documents

out, task = Path(sys.argv[1]), sys.argv[2]


@atexit.register
def write_threads():
    """What runs beside Python when it ends, after `join` has tidied up."""
    threads = []
    for thread in Path("/proc/self/task").glob("*"):
        with contextlib.suppress(OSError):  # it has just ended
            threads.append((thread / "comm").read_text())
    (out / f"threads-{os.environ.get('RANK', 0)}").write_text("".join(threads))


world = join("cpu")
data = Packed(random_documents(), 32, 8, seed=1)


def run(name: str, **options):
    model = tiny_model(resid_pdrop=options.pop("dropout", 0.0)).to(
        options.pop("weights", torch.float32)
    )
    stop_at, resume = options.pop("stop_at", None), options.pop("resume", None)
    cfg = config(
        out / name, overwrite=resume is None, **({"micro_batch": 2, "eval_every": 5} | options)
    )

    def evaluate(model):
        return validate(model, next_token_loss, [data.batch_at(1)])

    train(
        model,
        next_token_loss,
        data.batch_at,
        cfg,
        evaluate,
        data_id=data.data_id,
        stop_at=stop_at,
        resume=resume,
    )


if task == "gradients":
    for dtype in (torch.float32, torch.float64):
        for micro_batch in (8, 4, 1):
            model = tiny_model().to(dtype)
            batch = data.batch_at(0)
            means = training_step(model, [], next_token_loss, batch, micro_batch, world).means
            if world.first:
                gradients = {name: p.grad for name, p in model.named_parameters()} | {
                    "loss": torch.tensor(means["loss"])
                }
                torch.save(gradients, out / f"{dtype}-{micro_batch}.pt")
    run(
        "plain", weights=torch.float64, optimizer="adamw"
    )  # Muon iterates in fp32 and magnifies what rounding does
    run("whole", dropout=0.1)
    run("parts", dropout=0.1, stop_at=9)
    run("parts", dropout=0.1, resume="yes")
elif task.startswith(
    "sharded "
):  # by one process: whole, in the micro-steps that the ranks would take
    optimizer, shard = task.split()[1], world.size > 1
    run(optimizer, optimizer=optimizer, shard=shard, micro_batch=4, clip=0.5, keep_at=0.5)
    run(f"{optimizer}-parts", optimizer=optimizer, shard=shard, micro_batch=4, clip=0.5, stop_at=9)
    run(
        f"{optimizer}-parts",
        optimizer=optimizer,
        shard=shard,
        micro_batch=4,
        clip=0.5,
        resume="yes",
    )
elif (
    task == "killed"
):  # rank 1 dies at step 12 of the first attempt; torchrun starts all ranks anew
    first_attempt = os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    class Fatal(Packed):
        def batch_at(self, step):
            if first_attempt and step == 12 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().batch_at(step)

    data = Fatal(random_documents(), 32, 8, seed=1)
    run("killed", resume="auto", dropout=0.1)
elif task == "interrupted":  # one rank hears of it, all save the same step

    class Interrupting(Packed):
        def batch_at(self, step):
            if step == 5 and world.rank == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return super().batch_at(step)

    data = Interrupting(random_documents(), 32, 8, seed=1)
    try:
        run("interrupted")
    except SystemExit as stop:
        (out / f"code-{world.rank}").write_text(str(stop.code))
