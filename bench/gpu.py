"""Training speed on one GPU: presets, context lengths and attention backends, eager and compiled.

    PYTHONPATH=. python bench/gpu.py --presets phi2-chinese-0.2b --contexts 512 2048

It needs torch alone (2.10 or newer), no network and no flash-attn. Compute is bf16 over fp32
weights, the optimizer is fused AdamW. Rows are packed from random documents of 50 to 600 tokens,
and padding is not counted. A step is forward, loss, backward, clipping and update.

MFU is the share of the maker's dense bf16 peak: 6 FLOPs per matrix parameter and token, and
12 L D T per token for attention (train/preflight.py). T is the row, also where documents are
isolated and less is computed.
"""

import datetime
import gc
import statistics
import time
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal

import numpy as np
import torch
from table import print_head, print_row

from nanophi.cli import UserError, flag, run_command
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.model.speed import speed_up
from nanophi.train.distributed import World
from nanophi.train.losses import next_token_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Batch, Packed
from nanophi.train.preflight import flops_per_token, peak_flops
from nanophi.train.step import training_step


@dataclass(kw_only=True)
class Config:
    presets: list[str] = flag(help="presets to train")
    contexts: list[int] = flag(help="tokens of a row")
    backends: list[str] | None = flag(None, help="attention backends (default: varlen sdpa causal)")
    tokens: int = flag(65536, at_least=1, help="tokens of a step, held at once")
    steps: int = flag(12, at_least=4, help="steps of each row; the first three are not counted")
    compile: bool = flag(True, help="also with torch.compile")
    device: Literal["cuda", "cpu"] = flag("cuda", help="cpu to try the bench itself")


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu tries the bench itself")
    device_name = torch.cuda.get_device_name() if cfg.device == "cuda" else "CPU"
    print(
        f"{device_name}, torch {torch.__version__}, CUDA {torch.version.cuda}, "
        f"{datetime.date.today()}\n"
    )
    print_head("preset", "context", "attention", "", "tokens/s", "MFU", "peak GB")
    backends = cfg.backends or ["varlen", "sdpa", "causal"]
    stances = (False, True) if cfg.compile else (False,)
    for preset, context, backend, compiled in product(cfg.presets, cfg.contexts, backends, stances):
        forget_the_row_before(cfg.device)
        try:
            cells = measure(cfg, preset, context, backend, compiled)
        except Exception as error:  # A row that does not run must not cost the others.
            message = " ".join(str(error).split())
            cells = [f"{type(error).__name__}: {message[:60]}", "", ""]
        print_row(preset, str(context), backend, "compiled" if compiled else "eager", *cells)


def forget_the_row_before(device: str) -> None:
    """Free the graphs and the memory of the row before, and reset its peak."""
    torch._dynamo.reset()  # Otherwise its graphs count against the limit of this row.
    gc.collect()  # Compiled blocks are in reference cycles.
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def measure(cfg: Config, preset: str, context: int, backend: str, compiled: bool) -> list[str]:
    """The cells of a row: tokens a second, MFU and peak memory in GB."""
    torch.manual_seed(0)
    shape = PhiConfig.preset(preset, max_position_embeddings=context)
    model = Phi(shape, backend).to(cfg.device).train()
    speed_up(model, compile=compiled)
    batch = random_batch(shape, context, cfg.tokens)

    tokens_per_s = batch.real_tokens / median_step_seconds(model, batch, cfg)
    peak = peak_flops(cfg.device)
    mfu = f"{tokens_per_s * flops_per_token(shape, context) / peak:.1%}" if peak else ""
    memory_gb = 0.0
    if cfg.device == "cuda":
        memory_gb = torch.cuda.max_memory_allocated() / 1e9
    return [f"{tokens_per_s:,.0f}", mfu, f"{memory_gb:.1f}"]


def random_batch(shape: PhiConfig, context: int, tokens: int) -> Batch:
    """Rows of `context` tokens, `tokens` together, packed from random documents."""
    rng = np.random.default_rng(0)
    lengths = rng.integers(50, 600, tokens // 200)
    documents = [rng.integers(7, shape.vocab_size, length) for length in lengths]
    rows = max(tokens // context, 1)
    return Packed(documents, context, rows, 0).batch_at(0)


def median_step_seconds(model: Phi, batch: Batch, cfg: Config) -> float:
    """Median of the steps behind the first three, the whole batch at once."""
    optimizers = build_optimizers(model, "adamw", 1e-4, 0.1)
    world = World(0, 1, cfg.device)
    autocast = partial(torch.autocast, cfg.device, torch.bfloat16, cache_enabled=False)
    times = []
    for _ in range(cfg.steps):
        started = time.perf_counter()
        training_step(model, optimizers, next_token_loss, batch, len(batch), world, 1.0, autocast)
        if cfg.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


if __name__ == "__main__":
    run_command(Config, main)
