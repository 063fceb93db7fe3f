"""BPE training in numpy: many occurrences and many pairs in each step.

This file gives the same merges as its plain twin, `learn_merges_naive` in bpe.py. Skip it at first
reading. table.py says in which order to read this folder; read this file from top to bottom.

1. The slots. The whole corpus lies in one array of slots, one slot a symbol, words apart by GAP:

    GAP b a n a n a GAP b a n d GAP            at the start, each slot holds a symbol's id
    GAP b A A A A a GAP b A A d GAP            after merging (a, n) -> A
    GAP b B - - B a GAP b A A d GAP            after merging (A, A) -> B: DEAD between

A token writes its id into its first and its last slot. So the token after the one at position p
begins at p + length[id], and the token before it has its id at p - 1: neighbours are found without
links. Merging never moves anything.

2. The index. Each pair has a *row*: its count, and the positions of its left tokens. The positions
are collected once, when the pair arises. Some of them may be outdated when the pair is merged. That
is no harm: other ids stand at such a position, so it is recognised and left out.

3. The heap. A pair's count never grows after the merge that made the pair possible. So an entry of
the heap can only be too high, and it is corrected when it comes to the top. Pairs below a floor
need no entry at all, because their counts could only fall further:

    heap (count, pair)      count today        with the floor 2
    9  (a, b)               9                  is merged
    8  (b, c)               3                  goes back into the heap, with the count 3
    5  (c, d)               1                  is dropped

If the heap runs dry before the vocabulary is full, the floor is lowered and the index built anew.

4. The batches. One numpy step merges a batch: the next pairs of the heap, as long as no left token
of one is the right token of another (`_next_batch`). Where two members stand side by side, only the
first members of the batch come out as if they were merged one by one (`_safe_prefix`). The others
are put back.
"""

import heapq
import time
from collections import defaultdict
from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from nanophi.cli import Progress, UserError
from nanophi.tokenizer.fast.table import Table, places_in_runs, run_lengths, run_starts, spread
from nanophi.tokenizer.tokenizer import Pair

DEAD = 0xFFFF  # in the slots inside a token of three slots and more
GAP = 0xFFFE  # in the slots between words
LARGEST_VOCABULARY = GAP  # ids are uint16: half the memory, and numpy sorts them fastest
WEIGHT_SHIFT = 5  # 2^5 = 32 slots share one weight, so that weights cost little memory
# The size of a batch: a smaller one pays numpy's overhead per call, a larger one leaves the cache.
BATCH_POSITIONS = 16_384
BATCH_PAIRS = 512
SLOTS_AT_ONCE = 1 << 22  # looked at together while the index is built

# An entry of the heap: (-count, key, row). Python's heap gives its smallest entry first, which is
# the highest count, and among equals the smallest key, which is the pair with the smaller ids.
Entry = tuple[int, int, int]

# ---- Keys: the two ids of a pair in one number, (left << 16) | right


def pair_of(key: int) -> Pair:
    """The pair of a key.

    >>> pair_of((7 << 16) | 9)
    (7, 9)
    """
    return key >> 16, key & 0xFFFF


def keys_of_ids(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """The keys of pairs, as uint32.

    >>> keys_of_ids(np.array([0, 7]), np.array([5, 9], np.uint32)).tolist() == [5, (7 << 16) | 9]
    True
    """
    return (np.asarray(left, np.uint32) << np.uint32(16)) | np.asarray(right, np.uint32)


def ids_of_keys(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The left and the right ids of uint32 keys."""
    return keys >> np.uint32(16), keys & np.uint32(0xFFFF)


class NewPairs(NamedTuple):
    """The pairs that a batch makes on one side of the new tokens.

    The occurrences are grouped by pair. With the occurrences 0: x, 1: y, 2: x, 3: x and keys x < y:

        order   [0, 2, 3, 1]        begins  [0, 3]        keys    [x, y]        counts  [3, 1]
    """

    order: np.ndarray  # the occurrences, sorted by their pair
    begins: np.ndarray  # where each different pair begins in `order`
    keys: np.ndarray  # of each different pair
    counts: np.ndarray  # of each different pair, weighted


class Trainer:
    """The state of a training: the slots, the lengths of the tokens, and the index of pairs.

    The words "banana" and "band" of the picture above, with a, b, n, d = 0, 1, 2, 3:

    >>> slots = np.full(32, GAP, np.uint16)
    >>> slots[1:12] = [1, 0, 2, 0, 2, 0, GAP, 1, 0, 2, 3]
    >>> trainer = Trainer(slots, np.array([1]), symbols=4, limit=2, min_frequency=2)
    >>> trainer.run(), trainer.merge_counts
    ([(0, 2), (1, 4)], [3, 2])
    >>> trainer.slots[1:12].tolist() == [5, DEAD, 5, 4, 4, 0, GAP, 5, DEAD, 5, 3]
    True
    """

    def __init__(
        self, slots: np.ndarray, weights: np.ndarray, symbols: int, limit: int, min_frequency: int
    ):
        """slots: (N,) uint16, changed in place; the first and the last one are GAP.
        weights: (N / 32,) int64, how often the words in each block of 32 slots occur.
        symbols: the slots hold the ids 0 to symbols - 1; the first merge makes the id `symbols`.
        limit: how many merges to learn at most.
        min_frequency: a pair that occurs less often is not merged.
        """
        assert symbols + limit <= LARGEST_VOCABULARY, "ids must fit below GAP"
        if len(slots) >= 2**32:  # positions are uint32
            raise UserError(
                f"{len(slots):,} bytes of different words are too many, at most 4 billion: "
                "take a sample"
            )
        assert slots[0] == GAP == slots[-1]
        self.slots = slots
        self.symbols = symbols
        self.limit = limit
        self.weights = None if (weights == 1).all() else _narrow(weights)  # None: all are 1
        self.length = np.zeros(1 << 16, np.int64)  # slots of a token, by id; 0 for DEAD and GAP
        self.length[:symbols] = 1
        self.merges: list[Pair] = []
        self.merge_counts: list[int] = []  # how often each pair occurred when it was merged
        self.lowest = max(min_frequency, 1)  # the floor never falls below this
        self.floor = max(self.lowest, len(slots) // (64 * (symbols + limit)))
        # The index, which `_index` builds.
        self.table: Table  # key -> row
        self.counts: np.ndarray  # count of each row's pair, with room for more rows
        self.positions: list[np.ndarray | None]  # of each row, uint32; None when it is done with
        self.heap: list[Entry]

    def run(self) -> list[Pair]:
        """Learn the merges, until there are `limit` or no pair occurs `min_frequency` times."""
        started = time.monotonic()
        with Progress("merges", self.limit) as bar:
            while True:
                self._index()
                self._merge_down_to_floor(bar, started)
                if len(self.merges) >= self.limit or self.floor <= self.lowest:
                    return self.merges
                self.floor = max(self.lowest, self.floor // 4)

    def _merge_down_to_floor(self, bar: Progress, started: float) -> None:
        """Merge one batch after the other, until the heap is empty or there are `limit` merges."""
        largest = BATCH_PAIRS
        batch = self._next_batch(largest)
        while batch:
            count = -batch[-1][0]
            merged = self._merge(batch)
            rate = len(self.merges) / (time.monotonic() - started)
            bar.update(merged, f"{rate:,.0f} merges/s, count {count:,}")
            # Much of a batch far larger than the last safe prefix would have to be undone.
            largest = min(BATCH_PAIRS, max(3 * merged, 32))
            batch = self._next_batch(largest)

    # ---- 2. The index

    def _index(self) -> None:
        """Count all pairs, and keep those at or above the floor with their positions."""
        if self._few_pairs():
            keys, counts, positions = self._index_of_bytes()
        else:
            keys, counts, positions = self._index_of_any()
        rows = np.arange(len(keys), dtype=np.int32)
        self.positions = list(positions)
        self.counts = np.zeros(max(4096, 2 * len(keys)), np.int64)
        self.counts[: len(keys)] = counts
        self.table = Table(np.uint32)
        self.table.add(keys, rows)
        self.heap = list(zip((-counts).tolist(), keys.tolist(), rows.tolist(), strict=True))
        heapq.heapify(self.heap)

    def _few_pairs(self) -> bool:
        """Whether both ids of every pair fit into 8 bits: few symbols, and nothing merged yet."""
        return self.symbols <= 256 and not self.merges

    def _adjacent(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield (positions, keys) of all adjacent pairs, of some SLOTS_AT_ONCE slots at a time."""
        start = 0
        while start < len(self.slots):
            stop = self._end_of_word(min(start + SLOTS_AT_ONCE, len(self.slots)))
            yield self._pairs_between(start, stop)
            start = stop

    def _end_of_word(self, stop: int) -> int:
        """The first position from `stop` on that has a GAP right before it: it cuts no word."""
        while self.slots[stop - 1] != GAP:
            more = self.slots[stop : stop + SLOTS_AT_ONCE]
            gaps = np.flatnonzero(more == GAP)
            if len(gaps):
                stop += int(gaps[0]) + 1
            else:
                stop += len(more)
        return stop

    def _pairs_between(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """(positions, keys) of the adjacent pairs in slots[start:stop]."""
        at = np.flatnonzero(self.slots[start:stop] != DEAD)
        ids = self.slots[start:stop].take(at)
        if self.merges:
            # A token of two slots and more has its id there twice: "A A A A" are two tokens A.
            # Its first slot is at an even place of the run of equal ids.
            places = places_in_runs(run_starts(ids), len(ids))
            first_slots = (self.length.take(ids) <= 1) | (places % 2 == 0)
            at = at[first_slots]
            ids = ids[first_slots]
        inside = np.flatnonzero((ids[:-1] != GAP) & (ids[1:] != GAP))
        keys = keys_of_ids(ids.take(inside), ids.take(inside + 1))
        return at.take(inside) + start, keys

    def _index_of_bytes(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(keys, counts, positions) of the pairs of at most 256 symbols.

        Their keys fit into 16 bits, which numpy sorts in linear time.
        """
        counts = np.zeros(1 << 16, np.int64)
        parts: dict[int, list[np.ndarray]] = defaultdict(list)  # short key -> pieces of positions
        for at, keys in self._adjacent():
            keys = ((keys >> np.uint32(8)) | (keys & np.uint32(255))).astype(np.uint16)
            order = np.argsort(keys, kind="stable")
            keys = keys.take(order)
            at = at.take(order)
            begins, sums = self._sums(keys, self._weights(at))
            at = at.astype(np.uint32)
            different = keys[begins]
            counts[different] += sums
            bounds = [*begins.tolist(), len(at)]
            for key, (start, stop) in zip(different.tolist(), pairwise(bounds), strict=True):
                parts[key].append(at[start:stop].copy())
        kept = np.flatnonzero(counts >= self.floor)
        positions = []
        for key in kept.tolist():
            positions.append(np.concatenate(parts.pop(key)))  # `pop` frees the pieces at once
        return keys_of_ids(kept >> 8, kept & 255), counts[kept], positions

    def _index_of_any(self) -> tuple[np.ndarray, np.ndarray, list[np.ndarray]]:
        """(keys, counts, positions) of the pairs of any symbols.

        Hashed counters first sieve out the pairs that cannot reach the floor. Only the others have
        to be sorted.
        """
        bits = min(max(len(self.slots).bit_length(), 10), 22)
        may_reach = self._counters_at_floor(bits)
        parts_of_at = []
        parts_of_keys = []
        for at, keys in self._adjacent():
            candidates = np.flatnonzero(may_reach.take(_counter_of(keys, bits)))
            parts_of_at.append(at.take(candidates).astype(np.uint32))
            parts_of_keys.append(keys.take(candidates))
        at = np.concatenate(parts_of_at)
        keys = np.concatenate(parts_of_keys)
        order = np.argsort(keys, kind="stable")
        at = at.take(order)
        keys = keys.take(order)
        begins, counts = self._sums(keys, self._weights(at))
        bounds = np.append(begins, len(keys))
        kept = np.flatnonzero(counts >= self.floor)
        positions = [at[bounds[i] : bounds[i + 1]].copy() for i in kept]
        return keys[begins[kept]], counts[kept], positions

    def _counters_at_floor(self, bits: int) -> np.ndarray:
        """Which of 2^bits counters reach the floor: (2^bits,) bool.

        Each counter sums the counts of all pairs that are hashed to it. So a pair whose counter is
        below the floor is below it too.
        """
        sums = np.zeros(1 << bits, np.int64)
        for at, keys in self._adjacent():
            more = np.bincount(_counter_of(keys, bits), self._weights(at), minlength=1 << bits)
            sums += more.astype(np.int64)
        return sums >= self.floor

    def _weights(self, at: np.ndarray) -> np.ndarray | None:
        """How often the words at these positions occur; None if every word occurs once."""
        if self.weights is None:
            return None
        return self.weights.take(at >> WEIGHT_SHIFT)

    @staticmethod
    def _sums(keys: np.ndarray, weights: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
        """Where each different one of sorted keys begins, and the sum of its weights."""
        begins = run_starts(keys)
        if weights is None or len(keys) == 0:
            return begins, run_lengths(begins, len(keys))
        return begins, np.add.reduceat(weights, begins, dtype=np.int64)

    # ---- 3. The heap

    def _next_batch(self, largest: int) -> list[Entry]:
        """Take the next pairs from the heap: at most `largest`, fewer where two could touch.

        Two pairs could touch if the left token of one is the right token of the other: in "a b c"
        the pairs (a, b) and (b, c) share the b. So (a, b) and (c, d) may be in one batch, but
        (a, b) and (b, c) may not. The pair (a, a) touches itself and is a batch alone.
        """
        batch: list[Entry] = []
        lefts = set()
        rights = set()
        positions = 0
        largest = min(largest, self.limit - len(self.merges))
        while self.heap and len(batch) < largest:
            negative_count, key, row = self.heap[0]
            count = int(self.counts[row])
            if count < self.floor:
                heapq.heappop(self.heap)
                self.positions[row] = None
                continue
            if count != -negative_count:
                heapq.heapreplace(self.heap, (-count, key, row))
                continue
            left, right = pair_of(key)
            positions += len(self._places(row))
            touches = left == right or left in rights or right in lefts
            if batch and (touches or positions > BATCH_POSITIONS):
                break
            batch.append(heapq.heappop(self.heap))
            if touches:
                break
            lefts.add(left)
            rights.add(right)
        return batch

    # ---- 4. The batches

    def _merge(self, batch: list[Entry]) -> int:
        """Merge the safe prefix of a batch, put the rest back, and return the prefix's length.

        Which prefix is safe shows only when the new tokens are in the slots. So all members are
        merged first, and those after the prefix are undone.
        """
        first_new = self.symbols + len(self.merges)
        at, member, left, right = self._occurrences(batch)
        new = first_new + member
        middle = at + self.length.take(left)  # where the right token begins
        after = middle + self.length.take(right)  # where the token after both begins
        self.slots[at] = new
        self.slots[after - 1] = new
        safe = self._safe_prefix(len(batch), first_new, member, after)
        if safe < len(batch):
            # The slots between the two ends have not been changed yet.
            undone = np.flatnonzero(member >= safe)
            self.slots[at[undone]] = left[undone]
            self.slots[after[undone] - 1] = right[undone]
            for entry in batch[safe:]:
                heapq.heappush(self.heap, entry)
            batch = batch[:safe]
            kept = np.flatnonzero(member < safe)
            at = at[kept]
            new = new[kept]
            middle = middle[kept]
            after = after[kept]
        after_pairs = self._pairs_after(at, new, after, len(batch) == 1)
        before_pairs = self._pairs_before(at, new, len(batch) == 1)
        self._clear_inside(at, middle, after)
        self._count_down(batch, first_new, after_pairs, before_pairs)
        self._record(batch)
        self._enter(at, after_pairs)
        self._enter(at, before_pairs, is_before=True)
        return len(batch)

    def _places(self, row: int) -> np.ndarray:
        """The positions of a pair that is not merged yet."""
        positions = self.positions[row]
        assert positions is not None
        return positions

    def _occurrences(self, batch: list[Entry]) -> tuple:
        """(position, member, left id, right id) of each true occurrence of the pairs of a batch.

        member: the pair's index in the batch. For a batch of one pair, the last three of the four
        are numbers, which numpy broadcasts.
        """
        places = [self._places(row) for _, _, row in batch]
        at = np.concatenate(places).astype(np.int64)
        if len(batch) == 1:
            left, right = pair_of(batch[0][1])
            at = at[self.slots.take(at) == left]
            at = at[self.slots.take(at + self.length[left]) == right]
            if left == right:
                at = every_second(at, self.length[left])
            return at, 0, left, right
        keys = np.array([key for _, key, _ in batch])
        member = np.repeat(np.arange(len(batch)), [len(place) for place in places])
        lefts = (keys >> 16).take(member)
        rights = (keys & 0xFFFF).take(member)
        left_fits = np.flatnonzero(self.slots.take(at) == lefts)
        at = at[left_fits]
        member = member[left_fits]
        lefts = lefts[left_fits]
        rights = rights[left_fits]
        both_fit = np.flatnonzero(self.slots.take(at + self.length.take(lefts)) == rights)
        return at[both_fit], member[both_fit], lefts[both_fit], rights[both_fit]

    def _safe_prefix(self, size: int, first_new: int, member, after) -> int:
        """How many of the `size` members of a batch come out exactly as if merged one by one.

        A worked batch, which makes the tokens 9, 10 and 11:

            member 0    (1, 2) -> 9     count 8
            member 1    (3, 4) -> 10    count 6
            member 2    (5, 6) -> 11    count 4

        Two members must not stand side by side. In "1 2 3 4" the batch makes "9 10". One by one,
        member 0 would first make the pair (9, 3), which member 1 would then replace by (9, 10). The
        batch never sees (9, 3), and the counts would go wrong. So only member 0 is safe.

        Nothing else can go wrong. A new pair never has to be merged before a later member. If
        member 0 made the pair (7, 9) with the count 5, it would come before member 2. But each
        (7, 9) was a (7, 1) before. That pair occurs at least as often and has smaller ids, so in
        the order of the heap it comes before (7, 9), and so before member 2. The batch ended
        there, because (7, 1) and (1, 2) share the 1. The same holds for a pair (9, 7), which was
        a (2, 7), and for (9, 9), which was a (2, 1).
        """
        if size == 1:
            return 1
        after_id = self.slots.take(after)
        after_is_new = (after_id >= first_new) & (after_id < GAP)
        touching = np.flatnonzero(after_is_new & (after_id != first_new + member))
        if len(touching) == 0:
            return size
        other_member = after_id[touching].astype(np.int64) - first_new
        return int(np.maximum(member[touching], other_member).min())

    def _pairs_after(self, at, new, after, single: bool) -> NewPairs:
        """The pairs (new token, token after it)."""
        after_id = self.slots.take(after)
        inside = np.flatnonzero(after_id != GAP)  # after the last token of a word is a GAP
        return self._grouped(at, keys_of_ids(new, after_id), after_id, inside, single)

    def _pairs_before(self, at, new, single: bool) -> NewPairs:
        """The pairs (token before it, new token), but for those that `_pairs_after` counts already.

        Those are the pairs of a new token with the same new token: `_pairs_after` has them at their
        left token.
        """
        before_id = self.slots.take(at - 1)
        inside = np.flatnonzero((before_id != GAP) & (before_id != new))
        return self._grouped(at, keys_of_ids(before_id, new), before_id, inside, single)

    def _grouped(self, at, keys, outer_id, inside, single: bool) -> NewPairs:
        """Group the occurrences `inside` by their keys."""
        if single:
            # The pairs of a single merge differ only in the outer ids. Those have 16 bits, which
            # numpy sorts in linear time if the sort is to be stable.
            order = inside[np.argsort(outer_id.take(inside), kind="stable")]
        else:
            order = inside[np.argsort(keys.take(inside))]
        keys = keys.take(order)
        begins, counts = self._sums(keys, self._weights(at.take(order)))
        return NewPairs(order, begins, keys.take(begins), counts)

    def _clear_inside(self, at, middle, after) -> None:
        """Mark as DEAD where the two old tokens met, unless the slot is an end of the new token."""
        last_of_left = middle - 1
        self.slots[last_of_left[last_of_left > at]] = DEAD
        self.slots[middle[middle < after - 1]] = DEAD

    def _count_down(
        self, batch: list[Entry], first_new: int, after_pairs: NewPairs, before_pairs: NewPairs
    ) -> None:
        """Take from the counts of old pairs what the new pairs replace.

        A member merges l and r into N:

            l r x  ->  N x        each new pair (N, x) was a pair (r, x)
            x l r  ->  x N        each new pair (x, N) was a pair (x, l)
            l r l r  ->  N N      each new pair (N, N) was a pair (r, l)
        """
        merged = np.array([key for _, key, _ in batch], np.uint32)
        left_of, right_of = ids_of_keys(merged)

        new, outer = ids_of_keys(after_pairs.keys)
        member = new - first_new
        outer = np.where(outer == new, left_of.take(member), outer)
        self._subtract(keys_of_ids(right_of.take(member), outer), after_pairs.counts)

        outer, new = ids_of_keys(before_pairs.keys)
        self._subtract(keys_of_ids(outer, left_of.take(new - first_new)), before_pairs.counts)

    def _subtract(self, keys: np.ndarray, counts: np.ndarray) -> None:
        """Take counts from those of the pairs that have a row."""
        rows = self.table.find(keys)
        known = np.flatnonzero(rows >= 0)
        np.subtract.at(self.counts, rows[known], counts[known])

    def _record(self, batch: list[Entry]) -> None:
        """Write down the merges of a batch, and end their rows."""
        for negative_count, key, row in batch:
            left, right = pair_of(key)
            new = self.symbols + len(self.merges)
            self.length[new] = self.length[left] + self.length[right]
            self.merges.append((left, right))
            self.merge_counts.append(-negative_count)
            self.counts[row] = 0
            self.positions[row] = None

    def _enter(self, at: np.ndarray, pairs: NewPairs, is_before: bool = False) -> None:
        """Give every new pair at or above the floor a row, its positions and a place in the heap.

        at: where the new tokens begin; is_before: the new token is the right one of the pairs.
        """
        kept = np.flatnonzero(pairs.counts >= self.floor)
        if len(kept) == 0:
            return
        keys = pairs.keys.take(kept)
        counts = pairs.counts.take(kept)
        sizes = run_lengths(pairs.begins, len(pairs.order))[kept]
        places = at.take(pairs.order.take(spread(pairs.begins[kept], sizes)))
        if is_before:  # a pair's position is where its left token begins
            left, _ = ids_of_keys(keys)
            places -= np.repeat(self.length.take(left), sizes)
        places = places.astype(np.uint32)
        bounds = [0, *np.cumsum(sizes).tolist()]
        first_row = len(self.positions)
        self.positions += [places[start:stop] for start, stop in pairwise(bounds)]
        rows = np.arange(first_row, len(self.positions), dtype=np.int32)
        if len(self.positions) > len(self.counts):
            self.counts = np.append(self.counts, np.zeros(len(self.positions), np.int64))
        self.counts[rows] = counts
        self.table.add(keys, rows)
        for entry in zip((-counts).tolist(), keys.tolist(), rows.tolist(), strict=True):
            heapq.heappush(self.heap, entry)


# ---- Small functions of the Trainer


def every_second(at: np.ndarray, length: int) -> np.ndarray:
    """The occurrences of a pair (a, a) that are merged: in a run "a a a a" every second one.

    at: where the pairs begin, in any order; length: slots of one token a.

    The pairs of "a a a a a" at the slots 10 to 14 begin at 10, 11, 12 and 13. Merging takes the
    pairs at 10 and 12, and the last a is left over. The pair at 40 stands alone:

    >>> every_second(np.array([40, 10, 11, 12, 13]), length=1).tolist()
    [10, 12, 40]
    """
    at = np.sort(at)
    is_first = np.ones(len(at), bool)
    is_first[1:] = np.diff(at) != length
    return at[places_in_runs(np.flatnonzero(is_first), len(at)) % 2 == 0]


def _counter_of(keys: np.ndarray, bits: int) -> np.ndarray:
    """Which of 2^bits counters each uint32 key is hashed to; the factor is 2^32 / golden ratio."""
    return (keys * np.uint32(2654435769)) >> np.uint32(32 - bits)


def _narrow(weights: np.ndarray) -> np.ndarray:
    """Weights in 32 bits if they fit.

    They are looked up at random places, so half the memory means fewer cache misses.
    """
    if weights.max() < 1 << 32:
        return weights.astype(np.uint32)
    return weights
