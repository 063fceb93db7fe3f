"""Useful tokens a second beside the original's recipe: HF Trainer, Adafactor, batches padded to the longest document.

    python bench/recipe.py --input DIR --tokenizer out/tokenizer --batches 4 16

Real documents of at most 512 tokens (the original does not cut longer ones), the same for both; a Phi of 256 x 6
layers, 8 heads, MLP 1024, fp32, one core. The original takes --batches random documents a step; nanophi as many rows of
512 packed tokens, with its own optimizer. Useful are tokens that are no padding; the first two steps are not counted.
"""

import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass

import numpy as np
from sample import shuffled

from nanophi.cli import flag, run_command
from nanophi.tokenizer.tokenizer import Tokenizer

CONTEXT, SEED = 512, 0


@dataclass(kw_only=True)
class Config:
    input: list[str] = flag(help="documents: files, directories or globs")
    tokenizer: str = flag(help="directory of train_tokenizer.py")
    batches: list[int] = flag(help="documents (or rows) of a step")
    documents: int = flag(3000, help="documents to draw from")
    steps: int = flag(12, at_least=4, help="steps of each run")
    repeats: int = flag(2, at_least=1, help="runs of each side, taking turns")


def shape(tok: Tokenizer) -> dict:
    return {
        "hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 1024,
        "vocab_size": -(-len(tok) // 64) * 64, "max_position_embeddings": CONTEXT,
    }  # fmt: skip


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
    times, useful = [], []
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
    import torch
    from transformers import PhiConfig, PhiForCausalLM, Trainer, TrainerCallback, TrainingArguments

    times, useful = [], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **named):
            self.started = time.perf_counter()

        def on_step_end(self, *args, **named):
            times.append(time.perf_counter() - self.started)

    def padded(rows: list[dict]) -> dict:
        longest = max(len(row["input_ids"]) for row in rows)
        ids = torch.zeros(len(rows), longest, dtype=torch.long)
        labels = torch.full_like(ids, -100)
        for i, row in enumerate(rows):
            ids[i, : len(row["input_ids"])] = labels[i, : len(row["input_ids"])] = torch.tensor(
                row["input_ids"]
            )
        useful.append(sum(len(row["input_ids"]) for row in rows))
        return {"input_ids": ids, "labels": labels, "attention_mask": (labels != -100).long()}

    model = PhiForCausalLM._from_config(
        PhiConfig(**shape(tok), use_cache=False), attn_implementation="sdpa"
    )
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, per_device_train_batch_size=rows, max_steps=steps, optim="adafactor", learning_rate=5e-4,
            report_to=[], save_strategy="no", logging_strategy="no", use_cpu=True, disable_tqdm=True, seed=SEED,
        )  # fmt: skip
        dataset = [{"input_ids": document.tolist()} for document in documents]
        Trainer(
            model, args, data_collator=padded, train_dataset=dataset, callbacks=[Clock()]
        ).train()
    return times, useful


SIDES = {f.__name__: f for f in (nanophi, original)}


def work(side: str, path: str, tokenizer: str, rows: int, steps: int) -> None:
    """One side's run, in a process of its own."""
    import torch

    torch.set_num_threads(1)
    torch.manual_seed(SEED)
    loaded = np.load(path)
    documents = np.split(loaded["tokens"], np.cumsum(loaded["lengths"])[:-1])
    times, useful = SIDES[side](documents, Tokenizer.load(tokenizer), rows, steps)
    print(json.dumps({"useful": sum(useful[2 : len(times)]) / sum(times[2:])}))


def main(cfg: Config) -> None:
    tok, documents = Tokenizer.load(cfg.tokenizer), []
    for text in shuffled(cfg.input, SEED):
        if len(text) < 4 * CONTEXT and len(ids := [*tok.encode(text), tok.eos_id]) <= CONTEXT:
            documents.append(np.array(ids, dtype=np.int32))
        if len(documents) == cfg.documents:
            break
    random.Random(SEED).shuffle(documents)
    lengths = np.array([len(document) for document in documents])
    print(
        f"{len(documents):,} documents of {lengths.mean():.0f} tokens in the mean, median {np.median(lengths):.0f}\n"
    )
    print("| batch | side | useful tokens/s | x the original's |")
    print("|---|---|---|---|")
    core = max(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        path = f"{folder}/documents.npz"
        np.savez(path, tokens=np.concatenate(documents), lengths=lengths)
        for rows in cfg.batches:
            found: dict[str, list[float]] = {side: [] for side in SIDES}
            for _ in range(cfg.repeats):
                for side, speeds in found.items():
                    done = subprocess.run(
                        [sys.executable, __file__, "--work", side, path, cfg.tokenizer, str(rows), str(cfg.steps)],
                        check=True, stdout=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                        preexec_fn=lambda: os.sched_setaffinity(0, [core]),
                    )  # fmt: skip
                    speeds.append(json.loads(done.stdout.splitlines()[-1])["useful"])
            theirs = statistics.median(found["original"])
            for side, speeds in found.items():
                speed = statistics.median(speeds)
                print(f"| {rows} | {side} | {speed:,.0f} | {speed / theirs:.2f} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(*sys.argv[2:5], *map(int, sys.argv[5:7]))
    else:
        run_command(Config, main)
