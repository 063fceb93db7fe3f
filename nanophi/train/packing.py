"""What a step learns from: documents, conversations and preference pairs as `batch_at(step)`.

`batch_at` is a pure function of (seed, step): there is no iterator to save, a run resumes with one integer, and the
number of devices or micro-steps changes nothing. It returns the whole step's samples; the loop cuts them up.

A document of n tokens is n - 1 (input, target) pairs. Where they exceed a row of T, the rest becomes another piece; it
begins with the last token of the piece before as its input, so each token after a document's first is a target exactly
once per epoch. Pieces are put into rows by best fit, once; each epoch visits the rows in a new order.
"""

import copy
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from nanophi.cli import UserError

IGNORE = -100  # target of a position where nothing is learned
PAD = 0  # [PAD]; no text encodes to it, so that it marks padding


@dataclass
class Batch:
    """B rows of T tokens. `reference` (DPO): the reference model's log-probability of each row's answer, (B,)."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where nothing is learned
    cu_seqlens: Tensor  # (documents + 1,) int32, boundaries in the flattened batch, each multiple of T among them
    rows_per_sample: int = 1  # 2 for preference pairs: row 2i is chosen, row 2i + 1 rejected
    reference: Tensor | None = None
    learned: Tensor = field(init=False)  # (N,) where in the flattened batch there is a target

    def __post_init__(self):  # on the CPU, as a GPU would have to be waited for
        self.learned = (self.targets.flatten() != IGNORE).nonzero()[:, 0]

    def __len__(self) -> int:
        return len(self.ids) // self.rows_per_sample

    @property
    def real_tokens(self) -> int:
        """Inputs that are no padding."""
        return int((self.ids != PAD).sum())

    def cut(self, start: int, stop: int) -> "Batch":
        """Samples [start, stop), as a batch of their own."""
        time = self.ids.shape[1]
        rows = slice(start * self.rows_per_sample, min(stop * self.rows_per_sample, len(self.ids)))
        first, last = rows.start * time, rows.stop * time
        inside = (self.cu_seqlens >= first) & (self.cu_seqlens <= last)
        return replace(
            self,
            ids=self.ids[rows],
            targets=self.targets[rows],
            cu_seqlens=self.cu_seqlens[inside] - first,
            reference=None if self.reference is None else self.reference[rows],
        )

    def to(self, device: torch.device | str) -> "Batch":
        cuda, moved = torch.device(device).type == "cuda", copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(
                value, Tensor
            ):  # from pinned memory it is copied while the GPU still computes
                value = value.pin_memory() if cuda and not value.is_cuda else value
                setattr(moved, name, value.to(device, non_blocking=cuda))
        return moved


def best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """Put pieces into rows of `capacity`, each into the fullest open row that has room: the row of each piece.

    Open rows are kept by their free space; the set of free spaces is one integer, bit s for "some row has s free", so
    that finding the fullest is a shift and a lowest bit, whatever their number.
    """
    placed = np.zeros(len(lengths), dtype=np.int64)
    open_rows: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> rows
    rows = spaces = 0
    for index, length in enumerate(lengths):
        fitting = spaces >> length
        if fitting:
            space = length + (fitting & -fitting).bit_length() - 1
            row = open_rows[space].pop()
            if not open_rows[space]:
                spaces &= ~(1 << space)
        else:
            space, row = capacity, rows
            rows += 1
        placed[index] = row
        if left := space - length:
            open_rows[left].append(row)
            spaces |= 1 << left
    return placed


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits n things."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def digest(*arrays) -> str:
    """16 hex digits that name the content of integer arrays."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.asarray(array, dtype=np.int64).tobytes() + b"|")
    return hasher.hexdigest()[:16]


class Packed:
    """Documents in rows of `context` tokens, isolated from each other.

    documents: a sequence of 1-D int arrays (a TokenSet, say); masks: for each a bool array, True where the token is to
    be learned, or None to learn every token. bos_id is put before each document where given.
    """

    def __init__(
        self,
        documents,
        context: int,
        batch_rows: int,
        seed: int,
        masks=None,
        bos_id: int | None = None,
    ):
        self.documents, self.masks, self.bos_id = documents, masks, bos_id
        self.context, self.batch_rows, self.seed = context, batch_rows, seed
        lengths = getattr(documents, "lengths", None)
        if lengths is None:
            lengths = np.array([len(document) for document in documents], dtype=np.int64)
        pairs = lengths - 1 + (bos_id is not None)
        pieces = np.maximum(-(-pairs // context), 0)  # per document; none where there is no target
        self.piece_document = np.repeat(np.arange(len(pairs)), pieces)
        first = np.cumsum(pieces) - pieces
        self.piece_start = (
            np.arange(len(self.piece_document)) - np.repeat(first, pieces)
        ) * context
        self.piece_length = np.minimum(pairs[self.piece_document] - self.piece_start, context)
        if not len(self.piece_length):
            raise UserError(
                "there is nothing to learn from: every document is shorter than two tokens"
            )
        self.tokens, self.cut_documents = (
            int(lengths.sum()),
            float((pieces > 1).sum() / max((pieces > 0).sum(), 1)),
        )
        order = shuffled(seed, 2**32, len(self.piece_length))  # an epoch that no run reaches
        placed = best_fit(self.piece_length[order].tolist(), context)
        self.row_pieces = order[
            np.argsort(placed, kind="stable")
        ]  # row r: row_pieces[row_start[r] : row_start[r + 1]]
        self.row_start = np.concatenate([[0], np.cumsum(np.bincount(placed))])
        self._order: tuple[int, np.ndarray] = (-1, np.zeros(0))

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.row_start) - 1

    @property
    def steps_per_epoch(self) -> float:
        return len(self) / self.batch_rows

    @property
    def padding(self) -> float:
        """Share of an epoch's positions that hold no token."""
        return 1 - float(self.piece_length.sum()) / (len(self) * self.context)

    @property
    def data_id(self) -> str:
        """Names the data and how it is cut into steps; a run is resumed with the same alone."""
        layout = [
            self.context,
            self.batch_rows,
            self.seed,
            -1 if self.bos_id is None else self.bos_id,
        ]
        source = getattr(self.documents, "data_id", None)
        if source is None:
            source = digest(*self.documents, *([] if self.masks is None else self.masks))
        return f"{source}-{digest(layout, self.piece_length)}"

    def row_at(self, index: int) -> int:
        """The row that stands at `index` in the endless sequence of shuffled epochs."""
        epoch, place = divmod(index, len(self))
        if self._order[0] != epoch:
            self._order = (epoch, shuffled(self.seed, epoch, len(self)))
        return int(self._order[1][place])

    def batch_at(self, step: int) -> Batch:
        first = step * self.batch_rows
        return self.batch([self.row_at(index) for index in range(first, first + self.batch_rows)])

    def in_order(self):
        """Every row once, in batches: for validation."""
        for first in range(0, len(self), self.batch_rows):
            yield self.batch(range(first, min(first + self.batch_rows, len(self))))

    def batch(self, rows: Sequence[int]) -> Batch:
        shape = (len(rows), self.context)
        ids, targets = np.full(shape, PAD, dtype=np.int64), np.full(shape, IGNORE, dtype=np.int64)
        boundaries = [0]
        for i, row in enumerate(rows):
            at = 0
            for piece in self.row_pieces[self.row_start[row] : self.row_start[row + 1]]:
                inputs, learned = self._piece(piece)
                ids[i, at : at + len(inputs)], targets[i, at : at + len(inputs)] = inputs, learned
                at += len(inputs)
                boundaries.append(i * self.context + at)
            if at < self.context:  # the padding is a document of its own, without targets
                boundaries.append((i + 1) * self.context)
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), cu_seqlens)

    def _piece(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        """(inputs, targets) of one piece."""
        index, start = self.piece_document[piece], int(self.piece_start[piece])
        stop = start + int(self.piece_length[piece]) + 1
        tokens = self._slice(self.documents[index], start, stop, self.bos_id)
        targets = tokens[1:]
        if self.masks is not None:
            learned = self._slice(
                self.masks[index], start, stop, None if self.bos_id is None else False
            )
            targets = np.where(learned[1:], targets, IGNORE)
        return tokens[:-1], targets

    @staticmethod
    def _slice(document, start: int, stop: int, first) -> np.ndarray:
        """[start, stop) of a document that begins with `first` where that is not None."""
        if first is None:
            return np.asarray(document[start:stop]).astype(np.int64)
        rest = np.asarray(document[max(start - 1, 0) : stop - 1]).astype(np.int64)
        return np.concatenate([[first], rest]) if start == 0 else rest


@dataclass
class Pair:
    """One preference pair: the two conversations, each as (ids, mask)."""

    chosen: tuple[list[int], list[bool]]
    rejected: tuple[list[int], list[bool]]


class Pairs:
    """Preference pairs as batches: row 2i holds the chosen answer of pair i, row 2i + 1 the rejected one. Rows are as
    long as the longest of a batch, rounded up to a multiple: of 128, say, where each new length is compiled."""

    def __init__(self, pairs: list[Pair], batch_pairs: int, seed: int, multiple: int = 1):
        if not pairs:
            raise UserError("there is no preference pair to learn from")
        self.pairs, self.batch_pairs, self.seed, self.multiple = pairs, batch_pairs, seed, multiple
        self.reference: Tensor | None = None  # (pairs, 2), filled before training

    def __len__(self) -> int:
        return len(self.pairs)

    @property
    def steps_per_epoch(self) -> float:
        return len(self.pairs) / self.batch_pairs

    @property
    def data_id(self) -> str:
        """Names the pairs and how they are cut into steps. (Not what the reference thinks of them: its last bits depend
        on device and micro-batch; dpo.py adds the reference's weights.)"""
        sides = [side for pair in self.pairs for side in (*pair.chosen, *pair.rejected)]
        return digest([self.batch_pairs, self.seed], *sides)

    def batch_at(self, step: int) -> Batch:
        first = step * self.batch_pairs
        places = [
            divmod(index, len(self.pairs)) for index in range(first, first + self.batch_pairs)
        ]
        orders = {
            epoch: shuffled(self.seed, epoch, len(self.pairs))
            for epoch in {epoch for epoch, _ in places}
        }
        return self.batch([int(orders[epoch][place]) for epoch, place in places])

    def in_order(self):
        """Each pair once, for validation."""
        for first in range(0, len(self.pairs), self.batch_pairs):
            yield self.batch(range(first, min(first + self.batch_pairs, len(self.pairs))))

    def batch(self, indices: Sequence[int]) -> Batch:
        rows = [side for i in indices for side in (self.pairs[i].chosen, self.pairs[i].rejected)]
        time = -(-(max(len(ids) for ids, _ in rows) - 1) // self.multiple) * self.multiple
        ids = np.full((len(rows), time), PAD, dtype=np.int64)
        targets = np.full((len(rows), time), IGNORE, dtype=np.int64)
        boundaries = [0]
        for i, (tokens, mask) in enumerate(rows):
            n = len(tokens) - 1
            ids[i, :n] = tokens[:-1]
            targets[i, :n] = np.where(mask[1:], tokens[1:], IGNORE)
            boundaries += [i * time + n, (i + 1) * time] if n < time else [(i + 1) * time]
        reference = None if self.reference is None else self.reference[list(indices)].flatten()
        cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
        return Batch(torch.from_numpy(ids), torch.from_numpy(targets), cu_seqlens, 2, reference)
