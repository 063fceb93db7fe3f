"""What the presets need: parameters and memory computed from the shapes, speed on this machine measured.

    python bench/presets.py --measure demo phi2-chinese-0.2b

Memory to train is that of fp32 weights, gradients and optimizer states (Muon 4 bytes a parameter, AdamW 8); activations
come on top, by --micro-batch. The time on a GPU is computed: 6 FLOPs a parameter and token at a stated utilization.
"""

import time
from dataclasses import dataclass

import torch

from nanophi.cli import flag, run_command
from nanophi.model.config import PRESETS, PhiConfig
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train.distributed import World
from nanophi.train.losses import next_token_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.step import training_step

PEAK_FLOPS, UTILIZATION = 989e12, 0.4  # an H100's dense bf16; what a well-fed small model reaches
TOKENS = 1e9  # of the run whose time is computed


@dataclass(kw_only=True)
class Config:
    measure: list[str] | None = flag(None, help="presets whose training speed is measured here")
    rows: int = flag(4, at_least=1, help="rows of 512 tokens in a step")
    steps: int = flag(4, at_least=2, help="steps to measure, the first being left out")


def training_bytes(model: Phi) -> int:
    """Weights, gradients and optimizer states of a model, which may be on the meta device."""
    total = 0
    for optimizer in build_optimizers(model, "muon", 1e-3, 0.1):
        parameters = sum(p.numel() for group in optimizer.param_groups for p in group["params"])
        total += parameters * (4 + 4 + (4 if type(optimizer).__name__ == "Muon" else 8))
    return total


def tokens_per_s(name: str, rows: int, steps: int) -> float:
    """Training speed on this machine: forward, backward and optimizer on random tokens."""
    model = Phi(PhiConfig.preset(name)).train()
    speed_up(model)
    ids = torch.randint(7, model.cfg.vocab_size, (rows, 513)).numpy()
    batch = Packed(list(ids), 512, rows, 0).batch_at(0)
    optimizers = build_optimizers(model, "muon", 1e-3, 0.1)
    times = []
    for _ in range(steps):
        started = time.perf_counter()
        training_step(model, optimizers, next_token_loss, batch, rows, World(0, 1, "cpu"))
        times.append(time.perf_counter() - started)
    return rows * 512 / sorted(times[1:])[len(times[1:]) // 2]


def main(cfg: Config) -> None:
    print(
        "| preset | parameters | weights GB | to train GB | 1 B tokens, one H100 | tokens/s here |"
    )
    print("|---|---|---|---|---|---|")
    for name in PRESETS:
        with torch.device("meta"):
            model = Phi(PhiConfig.preset(name))
            state = training_bytes(model)
        parameters = sum(p.numel() for p in model.parameters())
        hours = 6 * parameters * TOKENS / (PEAK_FLOPS * UTILIZATION) / 3600
        speed = (
            f"{tokens_per_s(name, cfg.rows, cfg.steps):,.0f}" if name in (cfg.measure or []) else ""
        )
        print(
            f"| `{name}` | {parameters:,} | {parameters * 4 / 1e9:.2f} | {state / 1e9:.2f} | {hours:.2f} h | {speed} |"
        )


if __name__ == "__main__":
    run_command(Config, main)
