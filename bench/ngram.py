"""What a 3-gram model makes of the tokens that a pretraining run saw: the floor that a neural model must beat.

    python bench/ngram.py --run-dir out/pretrain

Interpolated absolute discounting (Ney, Essen & Kneser 1994): each count loses a discount d = n1 / (n1 + 2 n2), and what
all lost goes to the next shorter context, down to a uniform distribution. Trained on exactly the batches of the run,
scored on exactly its validation targets, in bits per byte of the text those targets spell.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanophi.cli import flag, run_command
from nanophi.text.shards import TokenSet
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.packing import IGNORE, Packed


@dataclass(kw_only=True)
class Config:
    run_dir: str = flag(help="run directory of pretrain.py")


def contexts(batches, vocab: int) -> np.ndarray:
    """Every learned position as a row (token before last, last token, target); `vocab` marks a document's start."""
    rows = []
    for batch in batches:
        last, target = batch.ids.flatten().numpy(), batch.targets.flatten().numpy()
        before = np.concatenate([[vocab], last[:-1]])
        before[batch.cu_seqlens[:-1].numpy()] = vocab
        learned = target != IGNORE
        rows.append(np.stack([before[learned], last[learned], target[learned]], axis=1))
    return np.concatenate(rows).astype(np.int64)


class Level:
    """One order: p(w | context) = max(c(context w) - d, 0) / c(context) + share lost * p of the shorter context."""

    def __init__(self, context: np.ndarray, word: np.ndarray, vocab: int):
        self.vocab = vocab
        self.keys, self.counts = np.unique(context * vocab + word, return_counts=True)
        once, twice = (self.counts == 1).sum(), (self.counts == 2).sum()
        self.discount = once / (once + 2 * twice)
        owner = self.keys // vocab
        self.contexts, first, self.kinds = np.unique(owner, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(self.counts, first)

    def probability(self, context: np.ndarray, word: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        def find(sorted_keys, wanted, values):
            at = np.searchsorted(sorted_keys, wanted).clip(max=len(sorted_keys) - 1)
            return np.where(sorted_keys[at] == wanted, values[at], 0)

        count = find(self.keys, context * self.vocab + word, self.counts)
        total, kinds = (
            find(self.contexts, context, self.totals),
            find(self.contexts, context, self.kinds),
        )
        seen = total > 0
        total = np.maximum(total, 1)
        mixed = (
            np.maximum(count - self.discount, 0) / total + self.discount * kinds / total * shorter
        )
        return np.where(seen, mixed, shorter)


def main(cfg: Config) -> None:
    settings = json.loads((Path(cfg.run_dir) / "run.json").read_text(encoding="utf-8"))
    config, steps = settings["config"], settings["steps"]
    model = json.loads((Path(cfg.run_dir) / "config.json").read_text(encoding="utf-8"))
    context, vocab = model["max_position_embeddings"], model["vocab_size"] + 1
    tok = Tokenizer.load(config["tokenizer"])
    bos = tok.bos_id if config["bos"] else None
    rows = max(config["batch_tokens"] // context, 1)
    data = Packed(TokenSet(config["data"], "train", tok), context, rows, config["seed"], bos_id=bos)
    held_out = Packed(
        TokenSet(config["data"], "val", tok),
        context,
        config["micro_batch"],
        config["seed"],
        bos_id=bos,
    )
    train = contexts((data.batch_at(step) for step in range(steps)), vocab - 1)
    val = contexts(held_out.in_order(), vocab - 1)

    def keys(rows: np.ndarray, order: int) -> np.ndarray:
        return {1: rows[:, 1] * 0, 2: rows[:, 1], 3: rows[:, 0] * vocab + rows[:, 1]}[order]

    probability = np.full(len(val), 1 / len(tok))
    text_bytes = np.array(tok.byte_lengths())[val[:, 2]].sum()
    print(f"trained on {len(train):,} targets, scored on {len(val):,} ({text_bytes:,} bytes)")
    for order in (1, 2, 3):
        probability = Level(keys(train, order), train[:, 2], vocab).probability(
            keys(val, order), val[:, 2], probability
        )
        bits = -np.log2(probability).sum()
        print(
            f"{order}-gram  {bits / text_bytes:.3f} bits per byte  {bits * math.log(2) / len(val):.3f} nats per token"
        )
    lines = [
        json.loads(line) for line in (Path(cfg.run_dir) / "metrics.jsonl").read_text().splitlines()
    ]
    last = next(line for line in reversed(lines) if "val_loss" in line)
    bits, nats = last["val_bits_per_byte"], last["val_loss"]
    print(f"the run {bits:.3f} bits per byte  {nats:.3f} nats per token  (step {last['step']:,})")


if __name__ == "__main__":
    run_command(Config, main)
