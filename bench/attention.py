"""Attention alone: documents of a row isolated from each other, against plain causal attention,
where they see each other.

    python bench/attention.py

16 heads of 60 dimensions, forward and backward, fp32 on one CPU thread. The times are medians over
--repeats; the ways take turns.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.model.attention import AttentionPlan, attend, same_document

HEADS = 16
HEAD_DIM = 60

# Name -> rows, tokens of a row, documents in all rows.
CASES = {"4 x 512, 12 documents": (4, 512, 12), "1 x 2048, 12 documents": (1, 2048, 12)}


@dataclass(kw_only=True)
class Config:
    repeats: int = flag(15, at_least=3, help="runs of each")
    threads: int = flag(1, at_least=1, help="of torch")


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    print_head("batch", "way", "ms", "of causal")
    for name, (rows, row_tokens, documents) in CASES.items():
        times = measure(rows, row_tokens, documents, cfg.repeats)
        causal_s = statistics.median(times["causal, leaking"])
        for way, seconds in times.items():
            median_s = statistics.median(seconds)
            print_row(name, way, f"{1000 * median_s:.0f}", f"{median_s / causal_s:.2f}")


def measure(rows: int, row_tokens: int, documents: int, repeats: int) -> dict[str, list[float]]:
    """Way of attention -> seconds of each of its runs."""
    q, k, v = (random_heads(rows, row_tokens, seed) for seed in range(3))
    cu_seqlens = boundaries(rows, row_tokens, documents)
    ways = {
        "causal, leaking": {"backend": "sdpa"},
        "one mask": {"backend": "sdpa", "visible": same_document(cu_seqlens, rows, row_tokens)},
        "documents": {"backend": "documents", "cu_seqlens": cu_seqlens},
    }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, mask in ways.items():
            times[way].append(run_seconds(q, k, v, mask))
    return times


def random_heads(rows: int, row_tokens: int, seed: int) -> torch.Tensor:
    """Queries, keys or values: (rows, heads, tokens, head_dim)."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, HEADS, row_tokens, HEAD_DIM)
    return torch.randn(shape, generator=generator).requires_grad_()


def boundaries(rows: int, row_tokens: int, documents: int) -> torch.Tensor:
    """cu_seqlens of so many documents: every row begins with a new one, the others begin at random
    places. (documents + 1,) int32
    """
    row_starts = range(0, rows * row_tokens + 1, row_tokens)
    inside_rows = np.setdiff1d(np.arange(1, rows * row_tokens), row_starts)
    rng = np.random.default_rng(0)
    random_starts = rng.choice(inside_rows, documents - rows)
    return torch.tensor(sorted({*random_starts.tolist(), *row_starts}), dtype=torch.int32)


def run_seconds(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: dict) -> float:
    """Seconds of one forward and backward pass."""
    started = time.perf_counter()
    attend(q, k, v, AttentionPlan(**mask)).sum().backward()
    return time.perf_counter() - started


if __name__ == "__main__":
    run_command(Config, main)
