"""A dictionary in numpy: many pairs are looked up, or entered, in one call."""

import numpy as np


class PairTable:
    """Pair -> row, for many pairs at once: open addressing with linear probing. Keys are left << 16 | right."""

    def __init__(self, bits: int = 16):
        self.bits, self.size = bits, 0
        self.keys = np.zeros(1 << bits, np.uint32)
        self.rows = np.full(1 << bits, -1, np.int32)

    def _home(self, keys: np.ndarray) -> np.ndarray:
        return ((keys * np.uint32(2654435769)) >> np.uint32(32 - self.bits)).astype(np.int64)  # Fibonacci hashing

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
        if 4 * (self.size + len(keys)) > len(self.rows):
            used = self.rows >= 0
            keys, rows = np.concatenate((self.keys[used], keys)), np.concatenate((self.rows[used], rows))
            bits = self.bits
            while 4 * len(keys) > 1 << bits:
                bits += 2
            self.__init__(bits)
        self.size += len(keys)
        at = self._home(keys)
        while len(keys):
            free = np.flatnonzero(self.rows.take(at) < 0)
            self.rows[at[free]], self.keys[at[free]] = rows[free], keys[free]  # of several to one place the last stays
            lost = self.rows.take(at) != rows
            keys, rows, at = keys[lost], rows[lost], (at[lost] + 1) & (len(self.rows) - 1)
