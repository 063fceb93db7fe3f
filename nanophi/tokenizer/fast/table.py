"""A dictionary of numpy arrays, and small helpers for runs of values.

This file gives the same results as a plain `dict`; skip it at first reading. The folder fast/
gives the same results as the plain functions in bpe.py (`learn_merges_naive`, `encode_word_naive`),
many times faster. Read its files in this order:

    table.py     keys -> rows, for a whole array of keys in one call
    merges.py    counted words, laid out in slots -> merges         training, second half
    words.py     texts -> counted words, laid out in slots          training, first half
    encoder.py   texts -> ids                                       uses table.py and words.py

A Python dictionary needs a call for each key, and an object for each key and row. `Table` looks up
an array of keys with a few numpy calls. It is a hash table with open addressing: two arrays of
cells, and a hash that says at which cell the search for a key begins, its home. If another key is
in that cell, the next cells are tried, one after the other. Here the homes of the keys 1, 9 and 14
are the cells 4, 4 and 5; the home of 17 is 4:

    cell    0    1    2    3    4    5    6    7
    key     .    .    .    .    1    9   14    .
    row    -1   -1   -1   -1    0    1    2   -1        -1: the cell is free

    find(14)    cell 5 holds 9, cell 6 holds 14                     ->  row 2
    find(17)    cells 4, 5 and 6 hold other keys, cell 7 is free    ->  -1, there is no key 17
"""

import numpy as np

# 2^64 / golden ratio. Multiplying by it spreads keys evenly over the cells (Fibonacci hashing).
GOLDEN = 0x9E3779B97F4A7C15


class Table:
    """Unsigned integers -> rows (int32, 0 or more); at most half of the cells are in use.

    >>> table = Table(np.uint32, bits=3)
    >>> for row, key in enumerate([1, 9, 14]):
    ...     table.add(np.array([key], np.uint32), np.array([row], np.int32))
    >>> table.keys.tolist()
    [0, 0, 0, 0, 1, 9, 14, 0]
    >>> table.find(np.array([14, 17, 1], np.uint32)).tolist()
    [2, -1, 0]
    """

    def __init__(self, key_type: type, bits: int = 16):
        """key_type: np.uint32 or np.uint64. bits: begin with 2^bits cells; the table will grow."""
        self.bits = bits
        self.size = 0  # keys in the table
        self.keys: np.ndarray = np.zeros(1 << bits, key_type)
        self.rows = np.full(1 << bits, -1, np.int32)  # -1: the cell is free

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key; -1 for a key that is not in the table."""
        cells = self._homes(keys)
        rows = self.rows.take(cells)
        searching = np.flatnonzero((rows >= 0) & (self.keys.take(cells) != keys))
        cells = cells[searching]
        while len(searching):
            cells = self._next(cells)
            rows_here = self.rows.take(cells)
            done = (rows_here < 0) | (self.keys.take(cells) == keys[searching])
            rows[searching[done]] = rows_here[done]
            searching = searching[~done]
            cells = cells[~done]
        return rows

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Enter keys. All keys must be different and new to the table, and all rows different."""
        size = self.size + len(keys)
        if 2 * size > len(self.rows):
            self._grow(size)
        self._put(keys, rows)
        self.size = size

    def _homes(self, keys: np.ndarray) -> np.ndarray:
        """The cell at which the search for each key begins: the highest bits of a product."""
        key_type = self.keys.dtype.type
        width = 8 * self.keys.itemsize
        factor = (GOLDEN >> (64 - width)) | 1  # an odd factor maps no two keys to one product
        return ((keys * key_type(factor)) >> key_type(width - self.bits)).astype(np.int64)

    def _next(self, cells: np.ndarray) -> np.ndarray:
        """The cells after these; cell 0 follows the last one."""
        return (cells + 1) & (len(self.rows) - 1)

    def _grow(self, size: int) -> None:
        """Move the keys to a new table, so large that `size` keys fill at most half of it."""
        used = self.rows >= 0
        keys = self.keys[used]
        rows = self.rows[used]
        while 2 * size > 1 << self.bits:
            self.bits += 1
        self.keys = np.zeros(1 << self.bits, self.keys.dtype)
        self.rows = np.full(1 << self.bits, -1, np.int32)
        self._put(keys, rows)

    def _put(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Write each key into the first free cell from its home on."""
        cells = self._homes(keys)
        while len(keys):
            free = np.flatnonzero(self.rows.take(cells) < 0)
            # If several keys meet in one free cell, numpy keeps the last of them. Reading the rows
            # back shows which keys have no cell yet.
            self.rows[cells[free]] = rows[free]
            self.keys[cells[free]] = keys[free]
            waiting = self.rows.take(cells) != rows
            keys = keys[waiting]
            rows = rows[waiting]
            cells = self._next(cells[waiting])


# ---- Runs of values


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where each run of equal values begins.

    >>> run_starts(np.array([5, 5, 7, 5])).tolist()
    [0, 2, 3]
    """
    first = np.empty(len(values), bool)
    first[:1] = True
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return np.flatnonzero(first)


def run_lengths(begins: np.ndarray, end: int) -> np.ndarray:
    """The length of each run, where the last run ends before `end`.

    >>> run_lengths(np.array([0, 2, 3]), 7).tolist()
    [2, 1, 4]
    """
    return np.diff(np.append(begins, end))


def places_in_runs(begins: np.ndarray, end: int) -> np.ndarray:
    """The place of each element in its run, counted from 0. The first run begins at 0.

    >>> places_in_runs(np.array([0, 2, 3]), 7).tolist()
    [0, 1, 0, 0, 1, 2, 3]
    """
    return np.arange(end) - np.repeat(begins, run_lengths(begins, end))


def begins_of(lengths: np.ndarray) -> np.ndarray:
    """Where words of these lengths begin, if they are laid one after the other.

    >>> begins_of(np.array([3, 2, 4])).tolist()
    [0, 3, 5]
    """
    return np.cumsum(lengths) - lengths


def spread(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions of all characters of some words, one word after the other.

    >>> spread(np.array([40, 10]), np.array([3, 2])).tolist()
    [40, 41, 42, 10, 11]
    """
    ends = np.cumsum(lengths)
    total = ends[-1] if len(ends) else 0
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(total)
