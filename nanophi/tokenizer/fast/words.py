"""Texts -> counted words -> the array of slots that merges.py works on.

This file gives the same counts as its plain twin, a `Counter` over `Level.words(text)` for every
text, as `learn_merges_naive` in bpe.py takes them. Skip it at first reading. table.py says in which
order to read this folder; read this file from top to bottom.

A word is one pre-token of the split; in Chinese text it is often a whole clause. No word is ever a
Python object here: 100 million Chinese characters hold some 23 million words, 5 million of them
different, and a dictionary of strings would need most of the time and memory of a training.

    texts     ["感冒了，", "感冒了"]
    codes     感 冒 了 ， | 感 冒 了 |        code points; "|" is BREAK, which ends a text
    begins    0        3   5                where words begin, from Level.starts
    keys      one 64-bit number for each word, see `keys_of`
    rows      1        0   1                from WordStore: equal words have equal rows
    counts    row 0 (，): 1     row 1 (感冒了): 2
    slots     GAP ... GAP ， GAP ... GAP 感 冒 了 GAP ...        see `lay_out`, and merges.py
"""

from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise

import numpy as np

from nanophi.files import utf8
from nanophi.parallel import batches
from nanophi.tokenizer.fast.merges import GAP, WEIGHT_SHIFT
from nanophi.tokenizer.fast.table import Table, begins_of, spread
from nanophi.tokenizer.levels import Level
from nanophi.tokenizer.splits import BREAK
from nanophi.tokenizer.tokenizer import each_text

BLOCK_CHARACTERS = 1 << 20  # characters that are counted, or encoded, together
WORDS_AT_ONCE = 1 << 19  # words that are laid out together: bounds what exists twice
BASE = 0x5851F42D4C957F2D  # of the rolling hash; odd, so that it has an inverse modulo 2^64
HASHED = np.uint64(1 << 63)  # the bit of a key that is a hash

# ---- Code points


def codes_of(texts: list[str]) -> np.ndarray:
    """The code points of some texts, with a BREAK after each text: (N,) int64.

    numpy converts indices to int64 for every look-up, so they are converted only once, here.

    >>> [hex(code) for code in codes_of(["感", "a"])]
    ['0x611f', '0xdcff', '0x61', '0xdcff']
    """
    joined = chr(BREAK).join([*texts, ""])
    codes = np.frombuffer(joined.encode("utf-32-le", "surrogatepass"), np.uint32).astype(np.int64)
    # BREAK is half a surrogate pair. All 2048 such code points have the same bits above the lowest
    # 11, so one comparison finds whether the texts hold any of them.
    if np.count_nonzero((codes >> 11) == (BREAK >> 11)) != len(texts):
        for text in texts:
            utf8(text)  # refuses the text that holds half of a surrogate pair
    return codes


# ---- Keys of words


def keys_of(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit key of each word codes[begin:end]: (W,) uint64.

    A word of up to three characters is its own key, packed. The key of a longer word is a hash, and
    has the highest bit set; two different words may have the same hash.
    """
    lengths = ends - begins
    keys = packed(codes, begins, lengths)
    long = np.flatnonzero(lengths > 3)
    if len(long):
        keys[long] = hashes(codes, begins[long], ends[long]) | HASHED
    return keys


def packed(codes: np.ndarray, begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The first three characters of each word in one number: (W,) uint64.

        bit     63      62 ... 42         41 ... 21         20 ... 0
                0       3rd code + 1      2nd code + 1      1st code + 1

    21 bits hold any code point. 1 is added to each, so that 0 means "no character".

    >>> codes = np.array([ord(char) for char in "感冒了要"])
    >>> words = packed(codes, np.array([0, 3]), np.array([3, 1]))
    >>> [(int(word) >> shift) & 0x1FFFFF for word in words for shift in (0, 21, 42)] == [
    ...     ord("感") + 1, ord("冒") + 1, ord("了") + 1, ord("要") + 1, 0, 0]
    True
    """
    keys = codes.take(begins) + 1
    for i in (1, 2):
        long_enough = np.flatnonzero(lengths > i)
        keys[long_enough] |= (codes.take(begins[long_enough] + i) + 1) << (21 * i)
    return keys.view(np.uint64)


def hashes(codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """A 64-bit hash of each word that does not depend on where the word stands: (W,) uint64.

    The hash of a word c0 c1 c2 ... is R(c0) + R(c1) * BASE + R(c2) * BASE^2 + ..., modulo 2^64,
    where R gives each code point a random number. It is computed from prefix sums over the whole
    array, so that no word needs a loop:

        i           0          1                  2                        ...
        sums[i]     0          R(codes[0])        sums[1] + R(codes[1]) * BASE

        sums[end] - sums[begin] = hash * BASE^begin        so divide by BASE^begin

    >>> codes = np.array([ord(char) for char in "感冒了要？感冒了要"])
    >>> first, second = hashes(codes, np.array([0, 5]), np.array([4, 9]))
    >>> bool(first == second)
    True
    """
    n = len(codes)
    powers, inverses = _powers(1 << n.bit_length())
    sums = np.zeros(n + 1, np.uint64)
    np.cumsum(_random_of_codes().take(codes) * powers[:n], out=sums[1:])
    return (sums.take(ends) - sums.take(begins)) * inverses.take(begins)


@cache
def _random_of_codes() -> np.ndarray:
    """A random number for each code point: (0x110000,) uint64."""
    return np.random.default_rng(0).integers(0, 2**64, 0x110000, np.uint64)


@lru_cache(2)
def _powers(n: int) -> tuple[np.ndarray, np.ndarray]:
    """BASE^i and BASE^-i modulo 2^64, for i below n: (n,) uint64 each."""
    return _powers_of(BASE, n), _powers_of(pow(BASE, -1, 2**64), n)


def _powers_of(base: int, n: int) -> np.ndarray:
    powers = np.full(n, base, np.uint64)
    powers[0] = 1
    return np.cumprod(powers, out=powers)


def same_words(
    codes: np.ndarray,
    begins: np.ndarray,
    other_codes: np.ndarray,
    other_begins: np.ndarray,
    lengths: np.ndarray,
) -> np.ndarray:
    """Whether each word of `codes` equals its partner in `other_codes`: (W,) bool.

    lengths: (W,) 1 or more; the two words of a pair have the same length.

    >>> codes = np.array([ord(char) for char in "感冒了感冒药"])
    >>> same_words(codes, np.array([0, 0]), codes, np.array([3, 3]), np.array([2, 3])).tolist()
    [True, False]
    """
    if len(lengths) == 0:
        return np.zeros(0, bool)
    equal = codes.take(spread(begins, lengths)) == other_codes.take(spread(other_begins, lengths))
    return np.logical_and.reduceat(equal, begins_of(lengths))


# ---- Different words


class WordStore:
    """Different words, each with a row: 0, 1, 2, ...

    A word is found by its key, and where the key is a hash, the characters are compared. If a word
    has the hash of another word, it gets a new row at each occurrence: that costs memory, but is
    never a mistake.

    >>> store = WordStore()
    >>> codes = np.array([ord(char) for char in "感冒了感冒药感冒了"])
    >>> store.rows_of(codes, np.array([0, 3, 6]), np.array([3, 6, 9])).tolist()
    [0, 1, 0]
    """

    def __init__(self):
        self.table = Table(np.uint64)  # key -> row
        self.codes = np.zeros(1 << 16, np.uint32)  # of all words in a row, with room to grow
        self.used = 0  # codes in use
        self.begins = np.zeros(0, np.int64)  # where each word begins in `codes`, by row
        self.lengths = np.zeros(0, np.int64)  # characters of each word, by row

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self.lengths)

    def rows_of(self, codes: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """The row of each word codes[begin:end]; unknown words are entered."""
        lengths = ends - begins
        keys = keys_of(codes, begins, ends)
        rows = self.table.find(keys)
        unknown = np.flatnonzero(rows < 0)
        if len(unknown):
            different, first = np.unique(keys[unknown], return_index=True)
            first = unknown[first]
            self.table.add(different, self._enter(codes, begins[first], lengths[first]))
            rows[unknown] = self.table.find(keys[unknown])
        hashed = np.flatnonzero(keys >= HASHED)
        # The row of a hashed word may hold another word.
        holds = self._holds(rows[hashed], codes, begins[hashed], lengths[hashed])
        misled = hashed[~holds]
        if len(misled):
            rows[misled] = self._enter(codes, begins[misled], lengths[misled])
        return rows

    def words_from(self, row: int) -> tuple[np.ndarray, np.ndarray]:
        """(codes, lengths) of the words from this existing row on.

        codes: the code points of all of them, one word after the other, int64.
        """
        return self.codes[self.begins[row] : self.used].astype(np.int64), self.lengths[row:]

    def _holds(self, rows, codes, begins, lengths) -> np.ndarray:
        """Whether each of these rows holds the word at `begins` in `codes`."""
        holds = lengths == self.lengths.take(rows)
        to_compare = np.flatnonzero(holds)
        own_begins = self.begins.take(rows[to_compare])
        holds[to_compare] = same_words(
            codes, begins[to_compare], self.codes, own_begins, lengths[to_compare]
        )
        return holds

    def _enter(self, codes, begins, lengths) -> np.ndarray:
        """Give each of these words a new row, and return the rows."""
        first_row = len(self)
        needed = self.used + int(lengths.sum())
        if needed > len(self.codes):
            grown = np.zeros(max(needed, 3 * len(self.codes) // 2), np.uint32)
            grown[: self.used] = self.codes[: self.used]
            self.codes = grown
        self.codes[self.used : needed] = codes.take(spread(begins, lengths))
        self.begins = np.append(self.begins, self.used + begins_of(lengths))
        self.lengths = np.append(self.lengths, lengths)
        self.used = needed
        return np.arange(first_row, len(self), dtype=np.int32)


# ---- Counted words


class WordCounter(WordStore):
    """A WordStore that counts how often each word occurs.

    >>> from nanophi.tokenizer.levels import ByteLevel
    >>> counter = WordCounter(ByteLevel())
    >>> counter.add(["感冒了，", "感冒了"])
    >>> counter.counts.tolist(), counter.lengths.tolist()
    ([1, 2], [1, 3])
    """

    def __init__(self, level: Level):
        super().__init__()
        self.level = level
        self.counts = np.zeros(0, np.int64)  # by row

    def add(self, texts: list[str]) -> None:
        """Count the words of some texts."""
        codes = codes_of([self.level.normalized(text) for text in texts])
        begins = np.flatnonzero(self.level.starts(codes))
        ends = np.append(begins[1:], len(codes))
        is_word = np.flatnonzero(codes.take(begins) != BREAK)
        rows = self.rows_of(codes, begins.take(is_word), ends.take(is_word))
        self.counts = np.append(self.counts, np.zeros(len(self) - len(self.counts), np.int64))
        np.add.at(self.counts, rows, 1)

    def alphabet(self) -> list[str]:
        """The tokens before any merge, see Level.alphabet."""
        characters = map(chr, np.unique(self.codes[: self.used]).tolist())
        return self.level.alphabet(characters)

    def lay_out(self, ids: dict[str, int]) -> tuple[np.ndarray, np.ndarray]:
        """(slots, weights) as merges.Trainer takes them, for these ids of the alphabet.

        A block of 32 slots has one weight, the count of its words. So words of the same count lie
        together, and GAPs fill their last block. The first block holds only GAPs. With blocks of 4
        slots, and the words 了 and 要 (once each) and 感冒 (twice), at char level:

            slots      GAP GAP GAP GAP    了 GAP 要 GAP    感 冒 GAP GAP
            weights    1                  1                2
        """
        order = np.argsort(self.counts, kind="stable")
        counts = self.counts.take(order)
        lookup = self.level.lookup(ids, GAP)
        block = 1 << WEIGHT_SHIFT
        slots = [np.full(block, GAP, np.uint16)]
        weights = [1]
        blocks = [1]  # how many blocks have each of the weights
        bounds = np.append(np.flatnonzero(np.diff(counts, prepend=0)), len(counts)).tolist()
        for first, last in pairwise(bounds):
            for start in range(first, last, WORDS_AT_ONCE):
                stop = min(start + WORDS_AT_ONCE, last)
                symbols = self._symbols_of(order[start:stop], lookup)
                slots.append(symbols)
                slots.append(np.full(-len(symbols) % block, GAP, np.uint16))
                weights.append(int(counts[first]))
                blocks.append((len(symbols) + block - 1) // block)
        return np.concatenate(slots), np.repeat(weights, blocks)

    def _symbols_of(self, rows: np.ndarray, lookup: np.ndarray) -> np.ndarray:
        """The ids of the symbols of some words in a row, with a GAP after each word."""
        lengths = self.lengths.take(rows) + 1  # with room for a BREAK, which `lookup` makes a GAP
        positions = spread(self.begins.take(rows), lengths)
        codes = self.codes.take(positions, mode="clip")  # after the last word there may be no code
        codes[np.cumsum(lengths) - 1] = BREAK
        return lookup.take(self.level.symbol_codes(codes))


def count_words(texts: Iterable[str], level: Level) -> WordCounter:
    """Count the words of all texts, which may stream in."""
    counter = WordCounter(level)
    for block in batches(each_text(texts, "count_words"), BLOCK_CHARACTERS):
        counter.add(block)
    return counter
