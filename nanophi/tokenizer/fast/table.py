"""A dictionary in numpy, for many keys in one call, and two helpers for runs of values."""

import numpy as np

GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio: multiplying by it spreads keys evenly (Fibonacci hashing)


class Table:
    """Unsigned integers -> rows (int32): open addressing with linear probing, at most half full."""

    def __init__(self, key_type: type, bits: int = 16):
        self.bits, self.size = bits, 0
        self.keys = np.zeros(1 << bits, key_type)
        self.rows = np.full(1 << bits, -1, np.int32)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        width = 8 * self.keys.itemsize
        spread = keys * self.keys.dtype.type(GOLDEN >> (64 - width) | 1)
        return (spread >> self.keys.dtype.type(width - self.bits)).astype(np.int64)

    def find(self, keys: np.ndarray) -> np.ndarray:
        """The row of each key, -1 where it has none."""
        at = self._home(keys)
        rows = self.rows.take(at)
        open_ = np.flatnonzero((rows >= 0) & (self.keys.take(at) != keys))
        at = at[open_]
        while len(open_):
            at = (at + 1) & (len(self.rows) - 1)
            found = self.rows.take(at)
            done = (found < 0) | (self.keys.take(at) == keys[open_])
            rows[open_[done]] = found[done]
            open_, at = open_[~done], at[~done]
        return rows

    def add(self, keys: np.ndarray, rows: np.ndarray) -> None:
        """Enter keys that are all different and not there yet."""
        if 2 * (self.size + len(keys)) > len(self.rows):
            used = self.rows >= 0
            keys, rows = (
                np.concatenate((self.keys[used], keys)),
                np.concatenate((self.rows[used], rows)),
            )
            bits = self.bits
            while 2 * len(keys) > 1 << bits:
                bits += 1
            self.__init__(self.keys.dtype.type, bits)
        self.size += len(keys)
        at = self._home(keys)
        while len(keys):
            free = np.flatnonzero(self.rows.take(at) < 0)
            self.rows[at[free]], self.keys[at[free]] = (
                rows[free],
                keys[free],
            )  # of several to one place the last stays
            lost = self.rows.take(at) != rows
            keys, rows, at = keys[lost], rows[lost], (at[lost] + 1) & (len(self.rows) - 1)


def run_starts(values: np.ndarray) -> np.ndarray:
    """Where a run of equal values begins: [5, 5, 7] -> [0, 2]."""
    first = np.empty(len(values), bool)
    first[:1] = True
    np.not_equal(values[1:], values[:-1], out=first[1:])
    return np.flatnonzero(first)


def spread(begins: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """The positions of all characters of some words, one word behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(begins - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)
