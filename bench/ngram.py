"""What a 3-gram model makes of the tokens that a pretraining run saw: the floor that a neural model
must beat.

    python bench/ngram.py --run-dir out/pretrain

Interpolated absolute discounting (Ney, Essen & Kneser 1994). Each count loses a discount
d = n1 / (n1 + 2 n2), where n1 and n2 are how many counts are 1 and 2. What all counts of a context
lose goes to the next shorter context, down to a uniform distribution:

    p(w | u v) = max(c(u v w) - d, 0) / c(u v)  +  d * kinds(u v) / c(u v) * p(w | v)

c counts, and kinds(u v) is how many different words have followed u v.

The model is trained on exactly the batches of the run and scored on exactly its validation targets,
in bits per byte of the text that those targets spell.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from nanophi.cli import flag, run_command
from nanophi.text.shards import TokenSet
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.packing import IGNORE, Batch, Packed


@dataclass(kw_only=True)
class Config:
    run_dir: str = flag(help="run directory of pretrain.py")


def main(cfg: Config) -> None:
    # 1. the tokens of the run
    run = json.loads((Path(cfg.run_dir) / "run.json").read_text(encoding="utf-8"))
    model = json.loads((Path(cfg.run_dir) / "config.json").read_text(encoding="utf-8"))
    tok = Tokenizer.load(run["config"]["tokenizer"])
    context = model["max_position_embeddings"]
    start = model["vocab_size"]  # one more "token", which stands before a document
    train_data, val_data = data_of(run["config"], tok, context)
    train = trigrams((train_data.batch_at(step) for step in range(run["steps"])), start)
    val = trigrams(val_data.in_order(), start)

    # 2. one order on top of the other
    text_bytes = np.array(tok.byte_lengths())[val[:, 2]].sum()
    print(f"trained on {len(train):,} targets, scored on {len(val):,} ({text_bytes:,} bytes)")
    vocab = start + 1
    probability = np.full(len(val), 1 / len(tok))
    for order in (1, 2, 3):
        level = Level(context_keys(train, order, vocab), train[:, 2], vocab)
        probability = level.probability(context_keys(val, order, vocab), val[:, 2], probability)
        bits = -np.log2(probability).sum()
        nats = bits * math.log(2)
        print(
            f"{order}-gram  {bits / text_bytes:.3f} bits per byte  "
            f"{nats / len(val):.3f} nats per token"
        )

    # 3. the neural model
    last = last_validation(cfg.run_dir)
    print(
        f"the run {last['val_bits_per_byte']:.3f} bits per byte  "
        f"{last['val_loss']:.3f} nats per token  (step {last['step']:,})"
    )


def data_of(settings: dict, tok: Tokenizer, context: int) -> tuple[Packed, Packed]:
    """The training and the validation data of a run, packed as pretrain.py packs them."""
    bos_id = tok.bos_id if settings["bos"] else None
    seed = settings["seed"]
    rows = max(settings["batch_tokens"] // context, 1)
    train = TokenSet(settings["data"], "train", tok)
    val = TokenSet(settings["data"], "val", tok)
    return (
        Packed(train, context, rows, seed, bos_id=bos_id),
        Packed(val, context, settings["micro_batch"], seed, bos_id=bos_id),
    )


def trigrams(batches: Iterable[Batch], start: int) -> np.ndarray:
    """(targets, 3): token before the last one, last token, target; for every learned position.

    start: stands where the last token is the first one of its document
    """
    rows = []
    for batch in batches:
        last = batch.ids.flatten().numpy()
        target = batch.targets.flatten().numpy()
        before = np.concatenate([[start], last[:-1]])
        before[batch.cu_seqlens[:-1].numpy()] = start
        learned = target != IGNORE
        rows.append(np.stack([before[learned], last[learned], target[learned]], axis=1))
    return np.concatenate(rows).astype(np.int64)


def context_keys(rows: np.ndarray, order: int, vocab: int) -> np.ndarray:
    """One number for the context of each trigram: nothing, the last token, or both tokens."""
    before = rows[:, 0]
    last = rows[:, 1]
    if order == 1:
        return last * 0
    if order == 2:
        return last
    return before * vocab + last


class Level:
    """The counts of one order, each array sorted by its key."""

    def __init__(self, context: np.ndarray, word: np.ndarray, vocab: int):
        self.vocab = vocab
        # (n-grams,) context and word as one number, and how often it occurs
        self.keys, self.counts = np.unique(context * vocab + word, return_counts=True)
        once = (self.counts == 1).sum()
        twice = (self.counts == 2).sum()
        self.discount = once / (once + 2 * twice)
        # (contexts,) the context, how many different words follow it, and how many in all
        owner = self.keys // vocab
        self.contexts, first, self.kinds = np.unique(owner, return_index=True, return_counts=True)
        self.totals = np.add.reduceat(self.counts, first)

    def probability(self, context: np.ndarray, word: np.ndarray, shorter: np.ndarray) -> np.ndarray:
        """p(word | context), where `shorter` is p(word | shorter context). (N,) each"""
        count = look_up(self.keys, self.counts, context * self.vocab + word)
        total = look_up(self.contexts, self.totals, context)
        kinds = look_up(self.contexts, self.kinds, context)
        seen = total > 0
        total = np.maximum(total, 1)
        own = np.maximum(count - self.discount, 0) / total
        rest = self.discount * kinds / total
        return np.where(seen, own + rest * shorter, shorter)


def look_up(keys: np.ndarray, values: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The values of `queries`, 0 for a key that is not among the sorted `keys`.

    >>> look_up(np.array([2, 5]), np.array([20, 50]), np.array([5, 3, 9])).tolist()
    [50, 0, 0]
    """
    places = np.searchsorted(keys, queries).clip(max=len(keys) - 1)
    return np.where(keys[places] == queries, values[places], 0)


def last_validation(run_dir: str) -> dict:
    """The last line of metrics.jsonl that has a validation loss."""
    text = (Path(run_dir) / "metrics.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    return [line for line in lines if "val_loss" in line][-1]


if __name__ == "__main__":
    run_command(Config, main)
