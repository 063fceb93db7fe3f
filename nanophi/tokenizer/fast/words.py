"""Texts -> counted words -> the array of slots that merges.py works on.

No word is ever a Python object: of 100 million Chinese characters some 23 million words (clauses) come, 5 million of
them different, and a dictionary of strings would need most of the time and memory of a training.
"""

from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np

from nanophi.files import utf8
from nanophi.parallel import batches
from nanophi.tokenizer.fast.merges import GAP, WEIGHT_SHIFT
from nanophi.tokenizer.fast.table import Table, spread
from nanophi.tokenizer.levels import Level
from nanophi.tokenizer.splits import BREAK

BLOCK_CHARACTERS = 1 << 20  # counted, or encoded, together
WORDS_AT_ONCE = 1 << 19  # laid out together: bounds what exists twice
BASE = 0x5851F42D4C957F2D  # of the rolling hash; odd, so that it has an inverse modulo 2^64


def keys_of(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit key of each word: up to three characters are the key; of more it is a hash, with the highest bit set.

    The hash is the sum of random(code) * BASE^i over the characters, had from running sums over the whole array.
    """
    n, lengths = len(codes), ends - begins
    keys = codes.take(begins) + 1
    for i in (1, 2):
        there = np.flatnonzero(lengths > i)
        keys[there] |= codes.take(begins[there] + i) + 1 << 21 * i
    keys, long = keys.view(np.uint64), np.flatnonzero(lengths > 3)
    if len(long):
        powers, inverses = _powers(1 << n.bit_length())
        sums = np.zeros(n + 1, np.uint64)
        np.cumsum(_random_of_codes().take(codes) * powers[:n], out=sums[1:])
        begins, ends = begins[long], ends[long]
        keys[long] = (sums.take(ends) - sums.take(begins)) * inverses.take(begins) | np.uint64(
            1 << 63
        )
    return keys


@cache
def _random_of_codes() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 2**64, 0x110000, np.uint64)


@lru_cache(2)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64, for i below n."""
    found = []
    for base in (BASE, pow(BASE, -1, 2**64)):
        powers = np.full(n, base, np.uint64)
        powers[0] = 1
        found.append(np.cumprod(powers, out=powers))
    return found[0], found[1]


def same_words(codes, begins, others, other_begins, lengths) -> np.ndarray:
    """Whether the words at `begins` in `codes` are those at `other_begins` in `others`; each two have one length."""
    if not len(lengths):
        return np.zeros(0, bool)
    equal = codes.take(spread(begins, lengths)) == others.take(spread(other_begins, lengths))
    return np.logical_and.reduceat(equal, np.cumsum(lengths) - lengths)


class WordStore:
    """Different words, each with a row: 0, 1, 2, ... A word is found by its key and, where that is a hash, compared.
    Should the hash be another word's, it gets a row of its own at each occurrence: that costs memory, never a mistake.
    """

    def __init__(self):
        self.table = Table(np.uint64)
        self.codes = np.zeros(
            1 << 16, np.uint32
        )  # of all words, one behind the other, with room to grow
        self.begins, self.lengths = np.zeros(0, np.int64), np.zeros(0, np.int64)
        self.used = 0

    def __len__(self) -> int:
        return len(self.lengths)

    def rows_of(self, codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The row of each word codes[begin:end]; unknown words are entered."""
        lengths, keys = ends - begins, keys_of(codes, begins, ends)
        rows = self.table.find(keys)
        if len(new := np.flatnonzero(rows < 0)):
            found, first = np.unique(keys[new], return_index=True)
            first = new[first]
            self.table.add(found, np.arange(len(self), len(self) + len(first), dtype=np.int32))
            self._enter(codes, begins[first], lengths[first])
            rows[new] = self.table.find(keys[new])
        # A hashed word is looked at: is it the one that has the row?
        hashed = np.flatnonzero(keys >= np.uint64(1 << 63))
        same = lengths[hashed] == self.lengths.take(rows[hashed])
        some = hashed[same]
        same[same] = same_words(
            codes, begins[some], self.codes, self.begins.take(rows[some]), lengths[some]
        )
        if len(apart := hashed[~same]):
            rows[apart] = np.arange(len(self), len(self) + len(apart))
            self._enter(codes, begins[apart], lengths[apart])
        return rows

    def _enter(self, codes, begins, lengths) -> None:
        needed = self.used + int(lengths.sum())
        if needed > len(self.codes):
            grown = np.zeros(max(needed, 3 * len(self.codes) // 2), np.uint32)
            grown[: self.used] = self.codes[: self.used]
            self.codes = grown
        self.codes[self.used : needed] = codes.take(spread(begins, lengths))
        self.begins = np.append(self.begins, self.used + np.cumsum(lengths) - lengths)
        self.lengths = np.append(self.lengths, lengths)
        self.used = needed


def codes_of(texts: list[str]) -> np.ndarray:
    """The code points of some texts, a BREAK behind each: (N,) int64, as numpy would make it for every look-up."""
    joined = chr(BREAK).join([*texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    if np.count_nonzero((codes >> 11) == BREAK >> 11) != len(texts):
        for text in texts:
            utf8(text)  # refuses the one that holds half of a surrogate pair
    return codes


class WordCounter(WordStore):
    """How often each word occurs."""

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.counts = np.zeros(0, np.int64)

    def add(self, texts: list[str]) -> None:
        """Count the words of some texts."""
        codes = codes_of([self.level.normalized(text) for text in texts])
        begins = np.flatnonzero(self.level.starts(codes))
        ends = np.append(begins[1:], len(codes))
        real = np.flatnonzero(codes.take(begins) != BREAK)
        rows = self.rows_of(codes, begins.take(real), ends.take(real))
        self.counts = np.append(self.counts, np.zeros(len(self) - len(self.counts), np.int64))
        np.add.at(self.counts, rows, 1)

    def alphabet(self) -> list[str]:
        """The tokens before any merge, see Level.alphabet."""
        return self.level.alphabet(map(chr, np.unique(self.codes[: self.used]).tolist()))

    def lay_out(self, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """(slots, weights) as merges.Trainer takes them, for these ids of the alphabet.

        Words of one count lie together, so that a weight serves a whole block of slots: the count of its words.
        """
        order = np.argsort(self.counts, kind="stable")
        counts = self.counts.take(order)
        lookup = self.level.lookup(ids, GAP)
        block = 1 << WEIGHT_SHIFT
        slots, weights, repeats = [np.full(block, GAP, np.uint16)], [1], [1]
        bounds = np.append(np.flatnonzero(np.diff(counts, prepend=0)), len(counts)).tolist()
        for first, last in pairwise(bounds):
            for start in range(first, last, WORDS_AT_ONCE):
                words = order[start : min(start + WORDS_AT_ONCE, last)]
                lengths = self.lengths.take(words) + 1
                codes = self.codes.take(spread(self.begins.take(words), lengths), mode="clip")
                codes[np.cumsum(lengths) - 1] = BREAK
                found = lookup.take(self.level.symbol_codes(codes))
                slots += [found, np.full(-len(found) % block, GAP, np.uint16)]
                weights.append(int(counts[first]))
                repeats.append((len(found) + block - 1) // block)
        return np.concatenate(slots), np.repeat(weights, repeats)


def count_words(texts: Iterable[str], level: Level) -> WordCounter:
    """Count the words of all texts, which may stream in."""
    counter = WordCounter(level)
    for block in batches(texts, BLOCK_CHARACTERS):
        counter.add(block)
    return counter
