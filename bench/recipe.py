"""Useful tokens a second beside the original's recipe: HF Trainer, Adafactor, batches padded to the
longest document.

    python bench/recipe.py --input DIR --tokenizer out/tokenizer --batches 4 16

Both sides get the same real documents of at most 512 tokens (the original does not cut longer
ones). The model is a Phi of 256 x 6 layers, 8 heads, MLP 1024, fp32, on one core. The original
takes --batches random documents per step; nanophi takes as many rows of 512 packed tokens, with its
own optimizer. Useful tokens are those that are no padding. The first two steps are not counted.
"""

import json
import os
import random
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from machine import run_pinned
from sample import shuffled
from table import print_head, print_row

from nanophi.cli import flag, run_command
from nanophi.tokenizer.tokenizer import Tokenizer

CONTEXT = 512
SEED = 0
UNCOUNTED = 2  # steps at the beginning of a run


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    batches: list[int] = flag(help="documents (or rows) of a step")
    documents: int = flag(3000, help="documents to draw from")
    steps: int = flag(12, at_least=4, help="steps of each run")
    repeats: int = flag(2, at_least=1, help="runs of each side, taking turns")


def main(cfg: Config) -> None:
    documents = short_documents(cfg)
    lengths = np.array([len(document) for document in documents])
    print(
        f"{len(documents):,} documents of {lengths.mean():.0f} tokens in the mean, "
        f"median {np.median(lengths):.0f}\n"
    )
    print_head("batch", "side", "useful tokens/s", "x the original's")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "documents.npz"
        np.savez(path, tokens=np.concatenate(documents), lengths=lengths)
        for rows in cfg.batches:
            print_batch_size(cfg, path, rows)


def short_documents(cfg: Config) -> list[np.ndarray]:
    """--documents of at most CONTEXT tokens, as ids with [EOS], in random order."""
    tok = Tokenizer.load(cfg.tokenizer)
    documents: list[np.ndarray] = []
    for text in shuffled(cfg.input, SEED):
        if len(text) < 4 * CONTEXT:  # a longer text has too many tokens in any case
            ids = [*tok.encode(text), tok.eos_id]
            if len(ids) <= CONTEXT:
                documents.append(np.array(ids, dtype=np.int32))
        if len(documents) == cfg.documents:
            break
    random.Random(SEED).shuffle(documents)
    return documents


def print_batch_size(cfg: Config, path: Path, rows: int) -> None:
    """Run both sides in turns with `rows` documents or rows a step, and print a row for each."""
    core = max(os.sched_getaffinity(0))
    speeds: dict[str, list[float]] = {side: [] for side in SIDES}
    for _ in range(cfg.repeats):
        for side in SIDES:
            arguments = [side, str(path), cfg.tokenizer, str(rows), str(cfg.steps)]
            command = [sys.executable, __file__, "--work", *arguments]
            done = run_pinned(command, [core], threads=1, check=True)
            speeds[side].append(json.loads(done.stdout.splitlines()[-1])["useful"])
    original_speed = statistics.median(speeds["original"])
    for side in SIDES:
        speed = statistics.median(speeds[side])
        print_row(str(rows), side, f"{speed:,.0f}", f"{speed / original_speed:.2f}")


# ---- one run, in a process of its own


def work(side: str, path: str, tokenizer: str, rows: int, steps: int) -> None:
    """Run a side once, and print its useful tokens a second as JSON."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    stored = np.load(path)
    documents = np.split(stored["tokens"], np.cumsum(stored["lengths"])[:-1])
    times, useful = SIDES[side](documents, Tokenizer.load(tokenizer), rows, steps)
    tokens = sum(useful[UNCOUNTED : len(times)])  # The Trainer may prepare a batch more.
    print(json.dumps({"useful": tokens / sum(times[UNCOUNTED:])}))


def shape(tok: Tokenizer) -> dict:
    """The shape of the model. The vocabulary is the tokenizer's, rounded up to a multiple of 64."""
    return {
        "hidden_size": 256,
        "num_hidden_layers": 6,
        "num_attention_heads": 8,
        "intermediate_size": 1024,
        "vocab_size": -(-len(tok) // 64) * 64,
        "max_position_embeddings": CONTEXT,
    }


# ---- the sides: each gives (seconds of each step, useful tokens of each batch)


def nanophi(
    documents: list[np.ndarray], tok: Tokenizer, rows: int, steps: int
) -> tuple[list[float], list[int]]:
    from nanophi.model.config import PhiConfig
    from nanophi.model.phi import Phi
    from nanophi.model.speed import speed_up
    from nanophi.train.distributed import World
    from nanophi.train.losses import next_token_loss
    from nanophi.train.optim import build_optimizers
    from nanophi.train.packing import Packed
    from nanophi.train.step import training_step

    model = Phi(PhiConfig(**shape(tok))).train()
    speed_up(model)
    data = Packed(documents, CONTEXT, rows, SEED)
    optimizers = build_optimizers(model, "muon", 2e-3, 0.1)
    world = World(0, 1, "cpu")
    times = []
    useful = []
    for step in range(steps):
        started = time.perf_counter()
        batch = data.batch_at(step)
        training_step(model, optimizers, next_token_loss, batch, rows, world, clip=1.0)
        times.append(time.perf_counter() - started)
        useful.append(batch.real_tokens)
    return times, useful


def original(
    documents: list[np.ndarray], tok: Tokenizer, rows: int, steps: int
) -> tuple[list[float], list[int]]:
    from transformers import PhiConfig, PhiForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times = []
    useful = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **named):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **named):
            times.append(time.perf_counter() - self.started)

    def collate(samples: list[dict]) -> dict:
        useful.append(sum(len(sample["input_ids"]) for sample in samples))
        return padded([sample["input_ids"] for sample in samples])

    config = PhiConfig(**shape(tok), use_cache=False)
    model = PhiForCausalLM._from_config(config, attn_implementation="sdpa")
    dataset = [{"input_ids": document.tolist()} for document in documents]
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder,
            per_device_train_batch_size=rows,
            max_steps=steps,
            optim="adafactor",
            learning_rate=5e-4,
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            seed=SEED,
        )
        trainer = Trainer(
            model, args, data_collator=collate, train_dataset=dataset, callbacks=[Clock()]
        )
        trainer.train()
    return times, useful


def padded(documents: list[list[int]]) -> dict:
    """A batch for transformers, filled up to the longest document with 0, which is [PAD]."""
    import torch

    longest = max(map(len, documents))
    ids = torch.zeros(len(documents), longest, dtype=torch.long)
    labels = torch.full_like(ids, -100)
    for i, document in enumerate(documents):
        ids[i, : len(document)] = torch.tensor(document)
        labels[i, : len(document)] = ids[i, : len(document)]
    return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}


SIDES = {f.__name__: f for f in (nanophi, original)}


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    else:
        run_command(Config, main)
