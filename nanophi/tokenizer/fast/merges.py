"""BPE training in numpy: the merges of `learn_merges_naive` (bpe.py), many occurrences and many pairs at a time.

The whole corpus lies in one array of slots, one slot a symbol, words apart by GAP:

    GAP b a n a n a GAP b a n d GAP                    at the start, each slot holds a symbol's id
    GAP b A A A A a GAP b A A d GAP                    after merging (a, n) -> A
    GAP b B - - B a GAP b A A d GAP                    after merging (A, A) -> B: DEAD between

A token writes its id into its first and its last slot, so the token after the one at p starts at p + length[id], and
the token before it has its id at p - 1: neighbours are found without links. Merging never moves anything.

What keeps it exact and fast:
  - Each pair's positions are kept from the moment it arises. A position may be outdated when its pair is merged; that
    shows, because the two ids no longer stand there.
  - A pair's count never grows after the merge that made it possible. So a heap entry can only be too high (it is looked
    at again with today's count), and pairs below a floor need no entry: they could only fall. Should the heap run dry
    before the vocabulary is full, the floor is lowered and the index built anew.
  - Merges are done in batches of the next pairs that cannot touch one another, as one step of numpy. A batch is cut
    where doing its members one by one would have gone otherwise: see `_cut`.
"""

import heapq
import time
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from nanophi.cli import Progress, UserError
from nanophi.tokenizer.fast.table import Table, run_starts, spread

Pair = tuple[int, int]

DEAD, GAP = 0xFFFF, 0xFFFE  # inside a token of three slots and more; between words
LARGEST_VOCABULARY = GAP  # ids are uint16: half the memory, and numpy sorts them fastest
WEIGHT_SHIFT = 5  # 32 slots share one weight, so that weights cost little memory
BATCH_POSITIONS, BATCH_PAIRS = (
    16_384,
    512,
)  # a batch's size: smaller pays numpy's call overhead, larger leaves the cache
CHUNK = 1 << 22  # slots looked at together while indexing


def _narrow(weights: np.ndarray) -> np.ndarray:
    """Weights in 32 bits where they fit: they are looked up at random places, so half the memory is fewer misses."""
    return weights.astype(np.uint32) if weights.max() < 1 << 32 else weights


class Trainer:
    """The state of a training: slots, the tokens' lengths, and per pair ("row") its count and positions."""

    def __init__(
        self, slots: np.ndarray, weights: np.ndarray, symbols: int, limit: int, min_frequency: int
    ):
        """slots (N,) uint16, changed in place, GAP first and last; weights (N / 32,) int64: how often the words of a
        block of slots occur; symbols: ids 0 to symbols - 1 occur; limit: merges at most."""
        assert symbols + limit <= LARGEST_VOCABULARY, "ids must fit below GAP"
        if len(slots) >= 2**32:
            raise UserError(
                f"{len(slots):,} bytes of different words are too many, at most 4 billion: take a sample"
            )
        assert slots[0] == GAP == slots[-1]
        self.slots, self.symbols, self.limit = slots, symbols, limit
        self.weights = None if (weights == 1).all() else _narrow(weights)
        self.length = np.zeros(
            1 << 16, np.int64
        )  # slots that a token spans, by id; 0 for DEAD and GAP
        self.length[:symbols] = 1
        self.merges: list[Pair] = []
        self.merge_counts: list[int] = []  # how often each stood there when it was merged
        self.lowest = max(min_frequency, 1)
        self.floor = max(self.lowest, len(slots) // (64 * (symbols + limit)))

    def run(self) -> list[Pair]:
        started = time.monotonic()
        with Progress("merges", self.limit) as bar:
            while True:
                self._index()
                largest = BATCH_PAIRS
                while batch := self._next_batch(largest):
                    count = -batch[-1][0]
                    merged = self._merge(batch)
                    rate = len(self.merges) / (time.monotonic() - started)
                    bar.update(merged, f"{rate:,.0f} merges/s, count {count:,}")
                    largest = min(
                        BATCH_PAIRS, max(3 * merged, 32)
                    )  # much of a larger one would be cut again
                if len(self.merges) >= self.limit or self.floor <= self.lowest:
                    return self.merges
                self.floor = max(self.lowest, self.floor // 4)

    # The index

    def _index(self) -> None:
        """Count all pairs and keep those at or above the floor, with their positions."""
        keys, counts, positions = (
            self._index_of_bytes if self._few_pairs() else self._index_of_any
        )()
        self.positions: list[np.ndarray | None] = positions
        self.counts = np.zeros(max(4096, 2 * len(keys)), np.int64)
        self.counts[: len(keys)] = counts
        self.table = Table(np.uint32)
        self.table.add(keys, np.arange(len(keys), dtype=np.int32))
        self.heap = list(zip((-counts).tolist(), keys.tolist(), range(len(keys)), strict=True))
        heapq.heapify(self.heap)

    def _few_pairs(self) -> bool:
        return self.symbols <= 256 and not self.merges

    def _adjacent(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(positions, keys) of all adjacent pairs, chunk by chunk."""
        start = 0
        while start < len(self.slots):
            stop = min(start + CHUNK, len(self.slots))
            while self.slots[stop - 1] != GAP:  # whole words
                more = self.slots[stop : stop + CHUNK]
                gaps = np.flatnonzero(more == GAP)
                stop += int(gaps[0]) + 1 if len(gaps) else len(more)
            at = np.flatnonzero(self.slots[start:stop] != DEAD)
            ids = self.slots[start:stop].take(at)
            if (
                self.merges
            ):  # a token of two slots and more stands there twice: keep the first of each two
                begins = run_starts(ids)
                place = np.arange(len(ids)) - np.repeat(
                    begins, np.diff(np.append(begins, len(ids)))
                )
                once = (self.length.take(ids) <= 1) | (place % 2 == 0)
                at, ids = at[once], ids[once]
            inside = np.flatnonzero((ids[:-1] != GAP) & (ids[1:] != GAP))
            left, right = ids.take(inside).astype(np.uint32), ids.take(inside + 1)
            yield at.take(inside) + start, left << np.uint32(16) | right
            start = stop

    def _index_of_bytes(self):
        """For at most 256 symbols: keys of 16 bits, which numpy sorts in linear time, chunk by chunk."""
        counts = np.zeros(1 << 16, np.int64)
        parts: dict[int, list[np.ndarray]] = defaultdict(list)  # a pair's positions in each chunk
        for at, keys in self._adjacent():
            keys = ((keys >> np.uint32(8)) | (keys & np.uint32(255))).astype(np.uint16)
            order = np.argsort(keys, kind="stable")
            keys, at = keys.take(order), at.take(order)
            begins, sums = self._sums(keys, self._weights(at))
            found, at = keys[begins], at.astype(np.uint32)
            counts[found] += sums
            bounds = [*begins.tolist(), len(at)]
            for key, (start, stop) in zip(found.tolist(), pairwise(bounds), strict=True):
                parts[key].append(at[start:stop].copy())
        kept = np.flatnonzero(counts >= self.floor)
        positions = []
        for key in kept.tolist():
            positions.append(np.concatenate(parts.pop(key)))
        return ((kept >> 8 << 16) | (kept & 255)).astype(np.uint32), counts[kept], positions

    def _index_of_any(self):
        """For any ids: pairs that cannot reach the floor are sieved out by hashed counters, the others sorted."""
        bits = min(max(len(self.slots).bit_length(), 10), 22)

        def bin_of(keys):
            return (keys * np.uint32(2654435769)) >> np.uint32(32 - bits)

        bins = np.zeros(1 << bits, np.int64)
        for at, keys in self._adjacent():
            weights = self._weights(at)
            bins += np.bincount(bin_of(keys), weights, minlength=1 << bits).astype(np.int64)
        may_reach = bins >= self.floor
        parts = []
        for at, keys in self._adjacent():
            hot = np.flatnonzero(may_reach.take(bin_of(keys)))
            parts.append((at.take(hot).astype(np.uint32), keys.take(hot)))
        at, keys = (np.concatenate(column) for column in zip(*parts, strict=True))
        order = np.argsort(keys, kind="stable")
        at, keys = at.take(order), keys.take(order)
        begins, counts = self._sums(keys, self._weights(at))
        bounds = np.append(begins, len(keys))
        kept = np.flatnonzero(counts >= self.floor)
        positions = [at[bounds[i] : bounds[i + 1]].copy() for i in kept]
        return keys[begins[kept]], counts[kept], positions

    def _weights(self, at: np.ndarray) -> np.ndarray | None:
        """How often the words at these positions occur; None where every word occurs once."""
        return None if self.weights is None else self.weights.take(at >> WEIGHT_SHIFT)

    @staticmethod
    def _sums(keys: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Sorted keys -> where each different one begins, and the sum of its weights."""
        begins = run_starts(keys)
        if weights is None or not len(keys):
            return begins, np.diff(np.append(begins, len(keys)))
        return begins, np.add.reduceat(weights, begins, dtype=np.int64)

    # A batch

    def _next_batch(self, largest: int) -> list[tuple[int, int, int]]:
        """At most `largest` next pairs of the heap, as (-count, key, row); no left token of one is another's right."""
        batch, lefts, rights, positions = [], set(), set(), 0
        while self.heap and len(batch) < min(largest, self.limit - len(self.merges)):
            negative, key, row = self.heap[0]
            count = int(self.counts[row])
            if count < self.floor:
                heapq.heappop(self.heap)
                self.positions[row] = None
            elif count != -negative:
                heapq.heapreplace(self.heap, (-count, key, row))
            else:
                left, right = key >> 16, key & 0xFFFF
                positions += len(self.positions[row])
                if batch and (
                    left == right or left in rights or right in lefts or positions > BATCH_POSITIONS
                ):
                    break
                batch.append(heapq.heappop(self.heap))
                lefts.add(left)
                rights.add(right)
                if left == right:
                    break
        return batch

    def _merge(self, batch: list[tuple[int, int, int]]) -> int:
        """Merge the batch, or as many of its first members as must come before anything else; returns how many."""
        first_new = self.symbols + len(self.merges)
        at, member, left, right = self._occurrences(batch)
        while True:
            new = first_new + member
            middle = at + self.length.take(left)
            after = middle + self.length.take(right)
            self.slots[at] = self.slots[after - 1] = new
            before_id, after_id = self.slots.take(at - 1), self.slots.take(after)
            groups = self._new_pairs(at, new, before_id, after_id, len(batch) == 1)
            cut = self._cut(batch, first_new, member, after_id, groups)
            if cut >= len(batch):
                break
            undone = np.flatnonzero(member >= cut)
            self.slots[at[undone]] = left[undone]
            self.slots[after[undone] - 1] = right[undone]
            for entry in batch[cut:]:
                heapq.heappush(self.heap, entry)
            batch = batch[:cut]
            kept = np.flatnonzero(member < cut)
            at, member, left, right = at[kept], member[kept], left[kept], right[kept]
        # What was between the two ends of a token is no end any more.
        self.slots[(middle - 1)[middle - 1 > at]] = DEAD
        self.slots[middle[middle < after - 1]] = DEAD
        self._count_down(batch, first_new, groups)
        for negative, key, row in batch:
            pair = key >> 16, key & 0xFFFF
            self.length[self.symbols + len(self.merges)] = (
                self.length[pair[0]] + self.length[pair[1]]
            )
            self.merges.append(pair)
            self.merge_counts.append(-negative)
            self.counts[row], self.positions[row] = 0, None
        self._enter(at, groups)
        return len(batch)

    def _occurrences(self, batch):
        """Where the pairs of a batch really stand: (position, member, left id, right id) of each occurrence. For a
        single pair the last three are numbers, which numpy broadcasts."""
        places = [self.positions[row] for _, _, row in batch]
        at = np.concatenate(places).astype(np.int64)
        if len(batch) == 1:
            left, right = batch[0][1] >> 16, batch[0][1] & 0xFFFF
            at = at[self.slots.take(at) == left]
            at = at[self.slots.take(at + self.length[left]) == right]
            return (
                self._every_second(at, self.length[left]) if left == right else at,
                0,
                left,
                right,
            )
        member = np.repeat(np.arange(len(batch)), [len(place) for place in places])
        keys = np.array([key for _, key, _ in batch])
        left, right = (keys >> 16).take(member), (keys & 0xFFFF).take(member)
        still = np.flatnonzero(self.slots.take(at) == left)
        at, member, left, right = at[still], member[still], left[still], right[still]
        still = np.flatnonzero(self.slots.take(at + self.length.take(left)) == right)
        return at[still], member[still], left[still], right[still]

    @staticmethod
    def _every_second(at: np.ndarray, length: int) -> np.ndarray:
        """In a run a a a a the pairs overlap: every second one is merged, from the left."""
        at = np.sort(at)
        begins = np.append(True, np.diff(at) != length)[: len(at)]
        place = np.arange(len(at)) - np.maximum.accumulate(np.where(begins, np.arange(len(at)), 0))
        return at[place % 2 == 0]

    def _new_pairs(self, at, new, before_id, after_id, single: bool) -> list[tuple]:
        """The pairs that arise at the right (new, after) and the left (before, new): for each side the occurrences in
        order of their pair, where each pair begins among them, its key and its count."""
        new, groups = np.asarray(new, np.uint32), []
        for outer, key in (
            (after_id, new << np.uint32(16) | after_id),
            (before_id, before_id.astype(np.uint32) << np.uint32(16) | new),
        ):
            real = outer != GAP
            if outer is before_id:
                real &= before_id != new  # (new, new) is counted at its left member already
            real = np.flatnonzero(real)
            # A single merge differs in the outer ids alone: 16 bits, sorted in linear time.
            order = real[
                np.argsort((outer if single else key).take(real), kind="stable" if single else None)
            ]
            key = key.take(order)
            begins, sums = self._sums(key, self._weights(at.take(order)))
            groups.append((order, begins, key.take(begins), sums))
        return groups

    def _cut(self, batch, first_new: int, member, after_id, groups) -> int:
        """How many members of the batch come out as if merged one by one.

        They would not where two of them stand side by side (the second meets a pair that the first has made), nor where
        a pair that a member makes comes before a later member: by its count, or by its ids among equals.
        """
        cut = len(batch)
        if cut == 1:
            return 1
        touching = np.flatnonzero(
            (after_id >= first_new) & (after_id < GAP) & (after_id != first_new + member)
        )
        if len(touching):
            cut = int(
                np.maximum(member[touching], after_id[touching].astype(np.int64) - first_new).min()
            )
        least = -batch[-1][0]
        for _, _, keys, sums in groups:
            for i in np.flatnonzero(sums >= least).tolist():
                key = int(keys[i])
                maker = max(key >> 16, key & 0xFFFF) - first_new
                cut = min(cut, max(maker + 1, bisect_left(batch, (-int(sums[i]), key, 0))))
        return max(cut, 1)

    def _count_down(self, batch, first_new: int, groups) -> None:
        """Take from the counts what the new pairs replace: (right, after) and (before, left)."""
        merged = np.array([key for _, key, _ in batch], np.uint32)
        left_of, right_of = merged >> np.uint32(16), merged & np.uint32(0xFFFF)
        for side, (_, _, keys, sums) in enumerate(groups):
            before, after = keys >> np.uint32(16), keys & np.uint32(0xFFFF)
            if side == 0:
                member = before - first_new
                own = (
                    after == before
                )  # its neighbour was merged alike: that one's left token stood there
                before, after = right_of.take(member), np.where(own, left_of.take(member), after)
            else:
                after = left_of.take(after - first_new)
            rows = self.table.find(before << np.uint32(16) | after)
            known = np.flatnonzero(rows >= 0)
            np.subtract.at(self.counts, rows[known], sums[known])

    def _enter(self, at, groups) -> None:
        """Give every new pair at or above the floor a row, its positions and a place in the heap."""
        for side, (order, begins, keys, sums) in enumerate(groups):
            kept = np.flatnonzero(sums >= self.floor)
            if not len(kept):
                continue
            sizes = np.diff(np.append(begins, len(order)))[kept]
            places = at.take(order.take(spread(begins[kept], sizes)))
            keys, sums, first_row = keys.take(kept), sums.take(kept), len(self.positions)
            if side == 1:  # a pair begins where its left token does
                places -= np.repeat(self.length.take(keys >> np.uint32(16)), sizes)
            places = places.astype(np.uint32)
            self.positions += [places[i:j] for i, j in pairwise([0, *np.cumsum(sizes).tolist()])]
            rows = np.arange(first_row, len(self.positions), dtype=np.int32)
            if len(self.positions) > len(self.counts):
                self.counts = np.concatenate((self.counts, np.zeros(len(self.positions), np.int64)))
            self.counts[rows] = sums
            self.table.add(keys, rows)
            for entry in zip((-sums).tolist(), keys.tolist(), rows.tolist(), strict=True):
                heapq.heappush(self.heap, entry)
