"""Training speed on one GPU: presets, context lengths and attention backends, eager and compiled.

    PYTHONPATH=. python bench/gpu.py --presets phi2-chinese-0.2b phi2-chinese-0.35b-fast --contexts 512 2048

Needs torch alone (2.10 or newer), no network and no flash-attn. bf16 compute over fp32 weights, fused AdamW, rows of
random documents of 50 to 600 tokens, packed, padding not counted; forward, loss, backward, clipping, step. MFU: 6 FLOPs
a matrix parameter and 12 L D T a token (train/preflight.py), T the row also where documents are isolated and so less is
computed, over the maker's dense bf16 peak.
"""

import datetime
import gc
import statistics
import time
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from nanophi.cli import UserError, flag, run_command
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.train.distributed import World
from nanophi.train.loop import accumulate
from nanophi.train.losses import next_token_loss
from nanophi.train.optim import build_optimizers
from nanophi.train.packing import Packed
from nanophi.train.preflight import flops_per_token, peak_flops


@dataclass(kw_only=True)
class Config:
    presets: list[str] = flag(help="presets to train")
    contexts: list[int] = flag(help="tokens of a row")
    backends: list[str] | None = flag(None, help="attention backends (default: varlen sdpa causal)")
    tokens: int = flag(65536, at_least=1, help="tokens of a step, held at once")
    steps: int = flag(12, at_least=4, help="steps of each row; the first three are not counted")
    compile: bool = flag(True, help="also with torch.compile")
    device: Literal["cuda", "cpu"] = flag("cuda", help="cpu to try the bench itself")


def measure(cfg: Config, preset: str, context: int, backend: str, compiled: bool) -> list[str]:
    """Tokens a second, MFU and peak memory, as cells of the table."""
    torch.manual_seed(0)
    shape = PhiConfig.preset(preset, max_position_embeddings=context)
    model = Phi(shape, backend).to(cfg.device).train()
    if compiled:
        model.compile_blocks()
    rng = np.random.default_rng(0)
    documents = [
        rng.integers(7, shape.vocab_size, n) for n in rng.integers(50, 600, cfg.tokens // 200)
    ]
    rows = max(cfg.tokens // context, 1)
    batch = Packed(documents, context, rows, 0).batch_at(0)
    optimizers, world = build_optimizers(model, "adamw", 1e-4, 0.1), World(0, 1, cfg.device)
    loss_fn = torch.autocast(cfg.device, torch.bfloat16, cache_enabled=False)(next_token_loss)
    times = []
    for _ in range(cfg.steps):
        started = time.perf_counter()
        accumulate(model, loss_fn, batch, rows, world)
        world.clip(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        if cfg.device == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - started)
    speed = batch.real_tokens / statistics.median(times[3:])
    peak = peak_flops(cfg.device)
    share = f"{speed * flops_per_token(shape, context) / peak:.1%}" if peak else ""
    memory = torch.cuda.max_memory_allocated() / 1e9 if cfg.device == "cuda" else 0
    return [f"{speed:,.0f}", share, f"{memory:.1f}"]


def main(cfg: Config) -> None:
    if cfg.device == "cuda" and not torch.cuda.is_available():
        raise UserError("there is no CUDA device; --device cpu tries the bench itself")
    name = torch.cuda.get_device_name() if cfg.device == "cuda" else "CPU"
    print(
        f"{name}, torch {torch.__version__}, CUDA {torch.version.cuda}, {datetime.date.today()}\n"
    )
    print("| preset | context | attention | | tokens/s | MFU | peak GB |")
    print("|---|---|---|---|---|---|---|")
    for preset in cfg.presets:
        for context in cfg.contexts:
            for backend in cfg.backends or ["varlen", "sdpa", "causal"]:
                for compiled in (False, True) if cfg.compile else (False,):
                    torch._dynamo.reset()  # or the graphs of the rows before would count against this one's limit
                    gc.collect()  # compiled blocks are in cycles
                    if cfg.device == "cuda":
                        torch.cuda.empty_cache()
                        torch.cuda.reset_peak_memory_stats()
                    try:
                        cells = measure(cfg, preset, context, backend, compiled)
                    except Exception as error:  # one row that does not run must not cost the others
                        cells = [
                            f"{type(error).__name__}: {' '.join(str(error).split())[:60]}",
                            "",
                            "",
                        ]
                    how = "compiled" if compiled else "eager"
                    print(
                        f"| {preset} | {context} | {backend} | {how} | {' | '.join(cells)} |",
                        flush=True,
                    )


if __name__ == "__main__":
    run_command(Config, main)
