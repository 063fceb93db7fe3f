"""Texts -> counted words -> the array of slots that merges.py works on."""

from collections import Counter
from collections.abc import Iterable
from itertools import pairwise

import numpy as np

from nanophi.text.levels import Level
from nanophi.text.merges import GAP, WEIGHT_SHIFT

WORDS_AT_ONCE = 1 << 19  # joined, encoded and looked up together: bounds what exists twice


def count_words(texts: Iterable[str], level: Level) -> Counter:
    """Texts -> how often each word (pre-token) occurs."""
    words = Counter()
    for text in texts:
        words.update(level.words(level.normalized(text)))
    return words


def lay_out(counted: Counter, level: Level, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
    """Words and their counts -> (slots, weights) as merges.Trainer takes them; empties `counted` to save memory.

    Words of one count lie together, so that a weight serves a whole block of slots: the count of a block's words.
    """
    words, counts = list(counted), np.fromiter(counted.values(), np.int64, len(counted))
    counted.clear()
    order = np.argsort(counts, kind="stable")
    counts = counts.take(order)
    lookup = level.lookup(ids, GAP)
    block = 1 << WEIGHT_SHIFT
    slots, weights, repeats = [np.full(block, GAP, np.uint16)], [1], [1]
    bounds = np.append(np.flatnonzero(np.diff(counts, prepend=0)), len(words)).tolist()
    for first, last in pairwise(bounds):
        for start in range(first, last, WORDS_AT_ONCE):
            some = [words[i] for i in order[start : min(start + WORDS_AT_ONCE, last)].tolist()]
            found = lookup.take(level.codes(some))
            slots += [found, np.full(-len(found) % block, GAP, np.uint16)]
            weights.append(int(counts[first]))
            repeats.append((len(found) + block - 1) // block)
    return np.concatenate(slots), np.repeat(weights, repeats)
