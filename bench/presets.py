"""What the presets need: parameters and memory, computed from the shapes, and the speed on this
machine, measured.

    python bench/presets.py --measure demo phi2-chinese-0.2b

Memory to train is that of fp32 weights, gradients and optimizer states (Muon 4 bytes per parameter,
AdamW 8). Activations come on top; their size depends on --micro-batch. The time on a GPU is
computed: 6 FLOPs per parameter and token at a stated utilization.
"""

import statistics
import time
from dataclasses import dataclass

import torch
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.model.config import PRESETS, PhiConfig
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train.distributed import World
from nanophi.train.losses import next_token_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.step import training_step

PEAK_FLOPS = 989e12  # an H100's dense bf16
UTILIZATION = 0.4  # what a well-fed small model reaches
TOKENS = 1e9  # of the run whose time is computed
CONTEXT = 512  # tokens of a row


@dataclass(kw_only=True)
class Config:
    measure: list[str] | None = flag(None, help="presets whose training speed is measured here")
    rows: int = flag(4, at_least=1, help="rows of 512 tokens in a step")
    steps: int = flag(4, at_least=2, help="steps to measure, the first being left out")


def main(cfg: Config) -> None:
    print_head(
        "preset",
        "parameters",
        "weights GB",
        "to train GB",
        "1 B tokens, one H100",
        "tokens/s here",
    )
    for name in PRESETS:
        with torch.device("meta"):
            model = Phi(PhiConfig.preset(name))
            state_bytes = training_bytes(model)
        parameters = sum(p.numel() for p in model.parameters())
        hours = 6 * parameters * TOKENS / (PEAK_FLOPS * UTILIZATION) / 3600
        speed = ""
        if name in (cfg.measure or []):
            speed = f"{tokens_per_s(name, cfg.rows, cfg.steps):,.0f}"
        print_row(
            f"`{name}`",
            f"{parameters:,}",
            f"{parameters * 4 / 1e9:.2f}",
            f"{state_bytes / 1e9:.2f}",
            f"{hours:.2f} h",
            speed,
        )


def training_bytes(model: Phi) -> int:
    """Weights, gradients and optimizer states of a model, which may be on the meta device."""
    total = 0
    for optimizer in build_optimizers(model, "muon", 1e-3, 0.1):
        parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        state = 4 if type(optimizer).__name__ == "Muon" else 8  # bytes per parameter
        total += parameters * (4 + 4 + state)  # weight + gradient + state
    return total


def tokens_per_s(name: str, rows: int, steps: int) -> float:
    """Training speed on this machine: forward, backward and optimizer on random tokens."""
    model = Phi(PhiConfig.preset(name)).train()
    speed_up(model)
    ids = torch.randint(7, model.cfg.vocab_size, (rows, CONTEXT + 1)).numpy()
    batch = Packed(list(ids), CONTEXT, rows, 0).batch_at(0)
    optimizers = build_optimizers(model, "muon", 1e-3, 0.1)
    world = World(0, 1, "cpu")
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        training_step(model, optimizers, next_token_loss, batch, rows, world)
        times.append(time.perf_counter() - started)
    return rows * CONTEXT / statistics.median_high(times[1:])


if __name__ == "__main__":
    run_command(Config, main)
