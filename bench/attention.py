"""Attention alone: documents of a row isolated, against plain causal attention that lets them see each other.

    python bench/attention.py

16 heads of 60 dimensions, forward and backward, fp32 on one CPU thread; medians over --repeats, taking turns.
"""

import statistics
import time
from dataclasses import dataclass

import numpy as np
import torch

from nanophi.cli import flag, run_command
from nanophi.model.attention import attend, same_document

CASES = {"4 x 512, 12 documents": (4, 512, 12), "1 x 2048, 12 documents": (1, 2048, 12)}


@dataclass(kw_only=True)
class Config:
    repeats: int = flag(15, at_least=3, help="runs of each")
    threads: int = flag(1, at_least=1, help="of torch")


def boundaries(rows: int, time_: int, documents: int) -> torch.Tensor:
    """Random borders of so many documents, those of rows among them."""
    rng = np.random.default_rng(0)
    inside = rng.choice(
        np.setdiff1d(np.arange(1, rows * time_), np.arange(0, rows * time_, time_)),
        documents - rows,
    )
    return torch.tensor(
        sorted({*inside.tolist(), *range(0, rows * time_ + 1, time_)}), dtype=torch.int32
    )


def seconds(q, k, v, mask: dict) -> float:
    started = time.perf_counter()
    attend(q, k, v, **mask).sum().backward()
    return time.perf_counter() - started


def main(cfg: Config) -> None:
    torch.set_num_threads(cfg.threads)
    print("| batch | way | ms | of causal |")
    print("|---|---|---|---|")
    for name, (rows, time_, documents) in CASES.items():
        cu_seqlens = boundaries(rows, time_, documents)
        shape = (rows, 16, time_, 60)
        q, k, v = (
            torch.randn(shape, generator=torch.Generator().manual_seed(i)).requires_grad_()
            for i in range(3)
        )
        ways = {
            "causal, leaking": {"backend": "sdpa"},
            "one mask": {"backend": "sdpa", "visible": same_document(cu_seqlens, rows, time_)},
            "documents": {"backend": "documents", "cu_seqlens": cu_seqlens},
        }
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(cfg.repeats):
            for way, mask in ways.items():
                times[way].append(seconds(q, k, v, mask))
        causal = statistics.median(times["causal, leaking"])
        for way, all_ in times.items():
            median = statistics.median(all_)
            print(f"| {name} | {way} | {1000 * median:.0f} | {median / causal:.2f} |", flush=True)


if __name__ == "__main__":
    run_command(Config, main)
