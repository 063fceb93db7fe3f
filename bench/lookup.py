"""Prompt lookup where it is meant to help: answers that repeat most of their prompt.

    python bench/lookup.py                        some minutes, most of them for teaching

A small model is taught to correct a passage: its answer repeats the passage, but each of some ids,
the mistakes, becomes another one. Then the same passages are corrected with and without lookup;
both must say the same. New passages, greedy, one core.

    passage    512 733  23 840 611      23 is a mistake
    answer     512 733 423 840 611
"""

import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from machine import cpu_has, cpu_name, measured_alone
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.infer.decoder import decoder_of
from nanophi.infer.generate import generate
from nanophi.infer.products import PRODUCTS, why_not
from nanophi.model.checkpoint import load, save
from nanophi.model.config import PhiConfig
from nanophi.model.phi import Phi
from nanophi.train.optim import muon, peak_rates, set_rates

ASK, EOS = 7, 1  # the end of the passage, that of the answer
MISTAKES, CORRECTED = range(20, 120), 400  # id 23 becomes 423
VOCABULARY = 1024


@dataclass(kw_only=True)
class Config:
    length: int = flag(60, at_least=4, help="ids of a passage")
    mistakes: float = flag(0.1, at_least=0, at_most=1, help="share of them that is corrected")
    layers: int = flag(2, at_least=1, help="of the model")
    steps: int = flag(400, at_least=1, help="of teaching")
    repeats: int = flag(3, at_least=1, help="processes of each side, taking turns")


def main(cfg: Config) -> None:
    core = sorted(os.sched_getaffinity(0))[-1:]
    features = [name for name in ("avx512f", "avx2") if cpu_has(name)]
    with tempfile.TemporaryDirectory() as folder:
        model = taught(cfg)
        save(folder, model)
        print(
            f"one core of {cpu_name()} ({', '.join(features)}); {model.num_parameters() / 1e6:.1f} "
            f"M parameters; passages of {cfg.length} ids, {cfg.mistakes:.0%} of them mistakes\n"
        )
        print_head("weights", "guesses", "tokens/s", "x without", "tokens a step", "right")
        for weights in (name for name in PRODUCTS if why_not(name) is None):
            compare(cfg, core, folder, weights)


def compare(cfg: Config, core: list[int], folder: str, weights: str) -> None:
    """Print a row for each number of guesses; the answers must be those without."""
    runs: dict[int, list[dict]] = {}
    for _ in range(cfg.repeats):
        for guesses in (0, 1, 3, 7):
            given = [folder, weights, str(guesses), str(cfg.length), str(cfg.mistakes), "1"]
            run = measured_alone(__file__, given, core)
            assert run is not None
            runs.setdefault(guesses, []).append(run)
    plain = statistics.median(run["speed"] for run in runs[0])
    for guesses, several in runs.items():
        assert several[0]["answers"] == runs[0][0]["answers"], "lookup changed an answer"
        speed = statistics.median(run["speed"] for run in several)
        print_row(
            weights, str(guesses), f"{speed:,.0f}", f"{speed / plain:.2f}",
            f"{several[0]['per_step']:.1f}", f"{several[0]['right']:.0%}",
        )  # fmt: skip


# ---- the task


def passages(rows: int, length: int, share: float, dice: torch.Generator) -> torch.Tensor:
    """Passages and what is to be answered, as rows of ids: passage, ASK, answer, EOS."""
    words = torch.randint(MISTAKES.stop, CORRECTED, (rows, length), generator=dice)
    mistakes = torch.randint(MISTAKES.start, MISTAKES.stop, (rows, length), generator=dice)
    wrong = torch.rand(rows, length, generator=dice) < share
    passage = torch.where(wrong, mistakes, words)
    answer = torch.where(wrong, mistakes + CORRECTED, words)
    ask, end = torch.full((rows, 1), ASK), torch.full((rows, 1), EOS)
    return torch.cat((passage, ask, answer, end), 1)


def taught(cfg: Config) -> Phi:
    """A model that corrects passages of cfg.length ids."""
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    dice = torch.Generator().manual_seed(0)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 256,
        "num_hidden_layers": cfg.layers,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "max_position_embeddings": 2 * cfg.length + 2,
    }
    model = Phi(PhiConfig.preset("demo", **shape))
    optimizers = muon(model, lr=3e-3, weight_decay=0.01)
    peaks = peak_rates(optimizers)
    for step in range(cfg.steps):
        set_rates(optimizers, peaks, min(1, (step + 1) / 30))
        ids = passages(16, cfg.length, cfg.mistakes, dice)
        answers = model(ids[:, :-1])[:, cfg.length :]
        loss = F.cross_entropy(answers.flatten(0, 1), ids[:, cfg.length + 1 :].flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 100 == 99:
            print(f"step {step + 1}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


# ---- one run, in a process of its own


def work(folder: str, weights: str, guesses: str, length: str, share: str, cores: str) -> None:
    """Correct passages one after the other, and print the speed and the answers as JSON."""
    torch.set_num_threads(int(cores))
    model, _ = load(folder, weights=weights)
    size = int(length)
    rows = passages(30, size, float(share), torch.Generator().manual_seed(1)).tolist()
    steps = count_steps(model)

    def correct() -> list[list[int]]:
        return [generate(model, row[: size + 1], size + 1, lookup=int(guesses)) for row in rows]

    answers = correct()
    tokens = sum(map(len, answers))
    per_step = tokens / steps()
    speeds = []
    for _ in range(3):
        began = time.perf_counter()
        correct()
        speeds.append(tokens / (time.perf_counter() - began))
    right = sum(row[size + 1 :] == answer for row, answer in zip(rows, answers, strict=True))
    print(
        json.dumps(
            {
                "speed": statistics.median(speeds),
                "answers": answers,
                "per_step": per_step,
                "right": right / len(rows),
            }
        )
    )


def count_steps(model: Phi):
    """A function that says how many passes the model has made since."""
    network = decoder_of(model)
    hidden, count = network.hidden, 0

    def counting(*given, **named):
        nonlocal count
        count += 1
        return hidden(*given, **named)

    network.hidden = counting  # type: ignore[method-assign]

    def stop() -> int:
        network.hidden = hidden  # type: ignore[method-assign]
        return count

    return stop


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:])
    else:
        run_command(Config, main)
