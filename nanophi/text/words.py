"""Texts -> counted words -> the array of slots that merges.py works on.

No word is ever a Python object: of 100 million Chinese characters some 23 million words (clauses) come, 5 million of
them different, and a dictionary of strings would need most of the time and memory of a training.
"""

from collections.abc import Iterable, Iterator
from itertools import pairwise

import numpy as np

from nanophi.cli import UserError
from nanophi.text.levels import Level
from nanophi.text.merges import GAP, WEIGHT_SHIFT, run_starts
from nanophi.text.splits import BREAK
from nanophi.text.table import Table

BLOCK_CHARACTERS = 1 << 22  # counted together
WORDS_AT_ONCE = 1 << 19  # laid out together: bounds what exists twice
BASE = 0x5851F42D4C957F2D  # of the rolling hash; odd, so that it has an inverse modulo 2^64


def rolling_hashes(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each word: the sum of random(code) * BASE^i over its characters, from running sums."""
    random = np.random.default_rng(0).integers(0, 2**64, 0x110000, np.uint64)
    powers = np.full(len(codes) + 1, BASE, np.uint64)
    powers[0] = 1
    np.cumprod(powers, out=powers)
    sums = np.zeros(len(codes) + 1, np.uint64)
    np.cumsum(random.take(codes) * powers[:-1], out=sums[1:])
    inverse = np.full(len(codes) + 1, pow(BASE, -1, 2**64), np.uint64)
    inverse[0] = 1
    np.cumprod(inverse, out=inverse)
    return (sums.take(ends) - sums.take(begins)) * inverse.take(begins)


def spread(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions of all characters of some words, one word behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def same_words(codes, begins, others, other_begins, lengths) -> np.ndarray:
    """Whether the words at `begins` in `codes` are those at `other_begins` in `others`; each two have one length."""
    if not len(lengths):
        return np.zeros(0, bool)
    equal = codes.take(spread(begins, lengths)) == others.take(spread(other_begins, lengths))
    return np.logical_and.reduceat(equal, np.cumsum(lengths) - lengths)


class WordCounter:
    """How often each word occurs. Words are found by a hash of 64 bits and then compared: one whose hash belongs to
    another word is entered apart. So a word may be there twice, which training, adding up occurrences, does not mind.
    """

    def __init__(self, level: Level):
        self.level = level
        self.table = Table(np.uint64)
        self.codes = np.zeros(1 << 16, np.uint32)  # of all words, one behind the other, with room to grow
        self.used = 0
        self.begins, self.lengths, self.counts = (np.zeros(0, np.int64) for _ in range(3))

    def add(self, texts: list[str]) -> None:
        """Count the words of some texts."""
        joined = chr(BREAK).join([*map(self.level.normalized, texts), ""])
        # int64, as numpy would make it one again for every look-up
        codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
        if np.count_nonzero((codes >> 11) == BREAK >> 11) != len(texts):
            raise UserError("a text holds half of a surrogate pair, which is no character: clean it first")
        begins = np.flatnonzero(self.level.starts(codes))
        ends = np.append(begins[1:], len(codes))
        real = np.flatnonzero(codes.take(begins) != BREAK)
        begins, ends = begins.take(real), ends.take(real)
        hashes, lengths = rolling_hashes(codes, begins, ends), ends - begins
        # Words that are known from earlier blocks:
        rows = self.table.find(hashes)
        known = np.flatnonzero(rows >= 0)
        known = known[self.lengths.take(rows[known]) == lengths[known]]
        known = known[same_words(codes, begins[known], self.codes, self.begins.take(rows[known]), lengths[known])]
        np.add.at(self.counts, rows[known], 1)
        apart = rows >= 0  # their hash is another's
        apart[known] = False
        self._keep(codes, begins[apart], lengths[apart])
        # New words, of each hash the first one speaking for all that equal it:
        new = np.flatnonzero(rows < 0)
        new = new[np.argsort(hashes[new])]
        begins, lengths, hashes = begins.take(new), lengths.take(new), hashes.take(new)
        first = run_starts(hashes)
        speaker = np.repeat(first, np.diff(np.append(first, len(hashes))))
        same = lengths == lengths.take(speaker)
        alike = np.flatnonzero(same)
        same[alike] = same_words(codes, begins[alike], codes, begins.take(speaker[alike]), lengths[alike])
        counts = np.add.reduceat(same.astype(np.int64), first) if len(first) else first
        self.table.add(hashes[first], np.arange(len(self.counts), len(self.counts) + len(first), dtype=np.int32))
        self._keep(codes, begins[first], lengths[first], counts)
        self._keep(codes, begins[~same], lengths[~same])

    def _keep(self, codes, begins, lengths, counts=None) -> None:
        """Append words to the store; each occurs once where no counts are given."""
        counts = np.ones(len(lengths), np.int64) if counts is None else counts
        needed = self.used + int(lengths.sum())
        if needed > len(self.codes):
            grown = np.zeros(max(needed, 3 * len(self.codes) // 2), np.uint32)
            grown[: self.used] = self.codes[: self.used]
            self.codes = grown
        self.codes[self.used : needed] = codes.take(spread(begins, lengths))
        self.begins = np.append(self.begins, self.used + np.cumsum(lengths) - lengths)
        self.lengths, self.counts = np.append(self.lengths, lengths), np.append(self.counts, counts)
        self.used = needed

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


def blocks(texts: Iterable[str]) -> Iterator[list[str]]:
    """Texts -> lists of texts that have some BLOCK_CHARACTERS together."""
    block, size = [], 0
    for text in texts:
        block.append(text)
        size += len(text)
        if size >= BLOCK_CHARACTERS:
            yield block
            block, size = [], 0
    if block:
        yield block


def count_words(texts: Iterable[str], level: Level) -> WordCounter:
    """Count the words of all texts, which may stream in."""
    counter = WordCounter(level)
    for block in blocks(texts):
        counter.add(block)
    return counter
