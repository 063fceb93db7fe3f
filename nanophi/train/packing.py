"""Documents and conversations as batches: `batch_at(step)`.

`batch_at` is a pure function of (seed, step). There is no iterator to save, a run resumes with one
integer, and the number of devices or micro-batches changes nothing: the function returns the
samples of the whole step, and the step cuts them up.

1. A document of n tokens gives n - 1 pairs (input, target). A row holds T pairs. A document with
   more pairs is cut into several pieces. Each further piece begins with the last token of the piece
   before it, as an input, so that each token after the first is a target exactly once per epoch.
2. Pieces are put into rows by best fit, once.
3. Each epoch visits the rows in a new order.

Two documents of 6 and 4 tokens in rows of T = 4:

    document a b c d e f     piece   inputs a b c d   targets b c d e
                             piece   inputs e         targets f
    document w x y z         piece   inputs w x y     targets x y z

    row 0    a b c d         one piece
    row 1    w x y e         two pieces, isolated from each other     cu_seqlens [0, 4, 7, 8]

cu_seqlens ("cumulative sequence lengths", the name of flash attention) are the boundaries of the
documents in the flattened batch.
"""

import copy
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check
from nanophi.model.attention import Branches, branches_of

IGNORE = -100  # the target of a position where nothing is learned
PAD = 0  # what fills rows: [PAD] of our tokenizers. A vocabulary from elsewhere may use it for text
NO_EPOCH = 2**32  # a number that no epoch reaches: packing has a random order of its own


# ---- a batch


@dataclass
class Batch:
    """B rows of T tokens: the samples of a step, or a part of them."""

    ids: Tensor  # (B, T) int64
    targets: Tensor  # (B, T) int64, IGNORE where nothing is learned
    # (documents + 1,) int32: 0, ..., B * T. Every multiple of T is a boundary, as no document
    # crosses rows
    cu_seqlens: Tensor
    rows_per_sample: int = 1  # 2 for preference pairs: row 2i is chosen, row 2i + 1 rejected ...
    answers_per_row: int = 1  # ... or 2 answers in one row behind their prompt, by `branches`
    reference: Tensor | None = None  # (answers,) DPO: log-probabilities by the reference
    branches: Branches | None = None
    learned: Tensor = field(init=False)  # (N,) places in the flattened batch that have a target
    answer: Tensor = field(init=False)  # (N,) the number of the answer that each belongs to
    longest: int = field(init=False)  # no document has more tokens; a power of two, or T

    def __post_init__(self):
        # Computed here, on the CPU: otherwise the CPU would wait for the GPU that counts.
        self.longest = next_power_of_two(int(self.cu_seqlens.diff().max()), self.ids.shape[1])
        self.learned = (self.targets.flatten() != IGNORE).nonzero()[:, 0]
        self.answer = self.learned // self.ids.shape[1]  # the row
        if self.branches is not None:
            numbers = (self.branches.continues >= 0).cumsum(0) - 1
            self.answer = numbers[self._documents_of(self.learned)]

    def _documents_of(self, places: Tensor) -> Tensor:
        """The number of the document, or segment, in which each place lies."""
        return torch.bucketize(places, self.cu_seqlens, right=True) - 1

    def __len__(self) -> int:
        """Samples: rows, or preference pairs."""
        return len(self.ids) // self.rows_per_sample

    def __repr__(self) -> str:
        rows, time = self.ids.shape
        return (
            f"Batch({rows} rows of {time} tokens, {len(self.cu_seqlens) - 1} documents, "
            f"{len(self.learned):,} targets)"
        )

    @property
    def real_tokens(self) -> int:
        """Inputs that are not padding, which is documents without any target; a prompt that answers
        with targets continue is none.

        The ids do not say it: in a vocabulary from elsewhere, PAD may be the id of some text.

            ids         7 8 9 0 0    cu_seqlens [0, 3, 5]
            targets     8 9 1 _ _    documents 7 8 9 and 0 0, of which the first has targets: 3
        """
        documents = self._documents_of(self.learned).unique()
        if self.branches is not None:
            continued = self.branches.continues[documents]
            documents = torch.cat([documents, continued[continued >= 0]]).unique()
        return int(self.cu_seqlens.diff()[documents].sum())

    def cut(self, start: int, stop: int) -> "Batch":
        """Samples [start, stop), as a batch of their own.

        The boundaries [0, 4, 7, 8] of two rows of 4 become [0, 3, 4] for the second row.
        """
        time = self.ids.shape[1]
        first_row = start * self.rows_per_sample
        last_row = min(stop * self.rows_per_sample, len(self.ids))
        rows = slice(first_row, last_row)
        begin = first_row * time
        inside = (self.cu_seqlens >= begin) & (self.cu_seqlens <= last_row * time)
        answers = slice(first_row * self.answers_per_row, last_row * self.answers_per_row)
        boundaries = self.cu_seqlens[inside] - begin
        branches = self.branches
        if branches is not None:
            first = int(inside.nonzero()[0])  # the number of the first segment
            continues = branches.continues[first : first + len(boundaries) - 1]
            continues = torch.where(continues >= 0, continues - first, -1)
            branches = branches_of(boundaries.tolist(), continues.tolist())
        return replace(
            self,
            ids=self.ids[rows],
            targets=self.targets[rows],
            cu_seqlens=boundaries,
            reference=None if self.reference is None else self.reference[answers],
            branches=branches,
        )

    def to(self, device: torch.device | str) -> "Batch":
        """The batch on a device. Pinned memory is copied to a GPU while it still computes."""
        on_cuda = torch.device(device).type == "cuda"

        def move(value: Tensor) -> Tensor:
            if on_cuda and not value.is_cuda:
                value = value.pin_memory()
            return value.to(device, non_blocking=on_cuda)

        moved = copy.copy(self)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(moved, name, move(value))
        if self.branches is not None:
            moved.branches = self.branches.to(move)
        return moved


# ---- helpers


def next_power_of_two(length: int, at_most: int) -> int:
    """What a flash kernel is told of the longest document: not its very length, because the
    compiler makes a kernel for each value that it meets.

    >>> [next_power_of_two(length, at_most=1500) for length in (5, 200, 256, 300, 1400)]
    [128, 256, 256, 512, 1500]
    """
    power = 1 << max((length - 1).bit_length(), 7)
    return min(power, at_most)


def best_fit(lengths: Sequence[int], capacity: int) -> np.ndarray:
    """Put pieces into rows of `capacity`, each into the fullest row that has room: the row of each
    piece.

    >>> best_fit([4, 3, 3, 1, 2], capacity=5).tolist()  # the rows hold 4 + 1, 3, and 3 + 2
    [0, 1, 2, 0, 2]
    """
    placed = np.zeros(len(lengths), dtype=np.int64)
    rows_with: list[list[int]] = [[] for _ in range(capacity + 1)]  # free space -> rows
    spaces = 0  # the free spaces of all rows, as a set of bits: bit s means "a row has s free"
    rows = 0
    for index, length in enumerate(lengths):
        space = smallest_space(spaces, length)
        if space is None:
            space = capacity
            row = rows
            rows += 1
        else:
            row = rows_with[space].pop()
            if not rows_with[space]:
                spaces &= ~(1 << space)
        placed[index] = row
        left = space - length
        if left:
            rows_with[left].append(row)
            spaces |= 1 << left
    return placed


def smallest_space(spaces: int, length: int) -> int | None:
    """The smallest element of a set of bits that is at least `length`, or None.

    Python's integers have any number of bits, so a shift and a lowest bit find it in one step:

    >>> smallest_space(0b100100, 3)     # the set {2, 5}
    5
    >>> smallest_space(0b100100, 6) is None
    True
    """
    large_enough = spaces >> length
    if not large_enough:
        return None
    lowest_bit = large_enough & -large_enough
    return length + lowest_bit.bit_length() - 1


def shuffled(seed: int, epoch: int, n: int) -> np.ndarray:
    """The order in which epoch number `epoch` visits n things."""
    return np.random.default_rng([seed, epoch]).permutation(n)


def digest(*arrays) -> str:
    """16 hex digits that name the content of integer arrays."""
    hasher = hashlib.sha256()
    for array in arrays:
        hasher.update(np.asarray(array, dtype=np.int64).tobytes() + b"|")
    return hasher.hexdigest()[:16]


def empty_rows(rows: int, time: int) -> tuple[np.ndarray, np.ndarray]:
    """ids and targets (rows, T) that hold padding and nothing to learn."""
    ids = np.full((rows, time), PAD, dtype=np.int64)
    targets = np.full((rows, time), IGNORE, dtype=np.int64)
    return ids, targets


def as_batch(ids: np.ndarray, targets: np.ndarray, boundaries: list[int], **more: Any) -> Batch:
    """A Batch of numpy arrays; more: its other fields."""
    cu_seqlens = torch.tensor(boundaries, dtype=torch.int32)
    return Batch(torch.from_numpy(ids), torch.from_numpy(targets), cu_seqlens, **more)


# ---- what callers may give


def lengths_of(documents: Sequence) -> np.ndarray:
    """The length of each document; a UserError for one that is no row of whole numbers.

    documents: not a generator, which could be read only once
    """
    if not hasattr(documents, "__getitem__"):
        raise UserError(f"documents are of type {type(documents).__name__}, expected a list")
    for number, document in enumerate(documents):
        check_ids(document, f"document {number:,}")
    return np.array([len(document) for document in documents], dtype=np.int64)


def check_ids(ids: Any, where: str) -> None:
    """Refuse what would be taken for ids without a word: floats, or rows of rows.

    >>> check_ids([1.5, 2.5], "document 7")  # doctest: +IGNORE_EXCEPTION_DETAIL
    Traceback (most recent call last):
    nanophi.cli.UserError: document 7 has the form (2,) and the type float64, expected ids (n,)
    """
    array = np.asarray(ids)
    if array.ndim != 1 or (array.dtype.kind not in "iu" and array.size):
        raise UserError(
            f"{where} has the form {array.shape} and the type {array.dtype}, expected ids (n,)"
        )


def check_masks(masks: Sequence, lengths: np.ndarray) -> None:
    """Refuse masks that are too few, or of another length than their documents."""
    if len(masks) != len(lengths):
        raise UserError(f"there are {len(masks):,} masks for {len(lengths):,} documents")
    for number, (mask, length) in enumerate(zip(masks, lengths, strict=True)):
        if len(mask) != length:
            raise UserError(
                f"the mask of document {number:,} has the length {len(mask):,}, the document "
                f"{length:,}"
            )


Part = tuple[int, int] | None  # [start, stop) of the samples of a step; None: all


def places_of(step: Any, samples: int, part: Part = None) -> range:
    """The places of a step's samples, or of a part of them, in the sequence of all epochs.

    >>> places_of(2, samples=10), places_of(2, samples=10, part=(5, 10))
    (range(20, 30), range(25, 30))

    A step that is no whole number is refused; numpy's whole numbers are some.
    """
    if not isinstance(step, Integral) or step < 0:
        raise UserError(f"a step is a whole number of at least 0, not {step!r}")
    start, stop = part or (0, samples)
    first = int(step) * samples
    return range(first + start, first + stop)


# ---- packed documents


class Packed:
    """Documents in rows of `context` tokens, isolated from each other.

    documents: a sequence of 1-D int arrays (a TokenSet, for example)
    batch_rows: rows of a step
    masks: for each document a bool array, True where the token is learned; None learns every token
    bos_id: put before each document where given
    """

    def __init__(
        self,
        documents: Sequence,
        context: int,
        batch_rows: int,
        seed: int,
        masks: Sequence | None = None,
        bos_id: int | None = None,
    ):
        check(context, Expected(int, at_least=1), "context")
        check(batch_rows, Expected(int, at_least=1), "batch_rows")
        check(seed, Expected(int, at_least=0), "seed")
        check(bos_id, Expected(int, at_least=0, optional=True), "bos_id")
        lengths = getattr(documents, "lengths", None)
        if lengths is None:
            lengths = lengths_of(documents)
        if masks is not None:
            check_masks(masks, lengths)
        self.documents = documents
        self.masks = masks
        self.bos_id = bos_id
        self.context = context
        self.batch_rows = batch_rows
        self.seed = seed
        self.tokens = int(lengths.sum())
        self._cut_into_pieces(lengths)
        self._put_into_rows()
        self._order_of_epoch: tuple[int, np.ndarray] = (-1, np.zeros(0))  # the one used last

    def _cut_into_pieces(self, lengths: np.ndarray) -> None:
        """For every piece: its document, the place of its first input there, its number of inputs.

        lengths [5, 9, 1] and context 4: 4, 8 and 0 pairs, so 1, 2 and 0 pieces

            piece_document [0, 1, 1]    piece_start [0, 0, 4]    piece_length [4, 4, 4]
        """
        pairs = lengths - 1
        if self.bos_id is not None:
            pairs = pairs + 1
        pieces = np.maximum(-(-pairs // self.context), 0)  # of each document: pairs / T, rounded up
        first_piece = np.cumsum(pieces) - pieces  # of each document
        self.piece_document = np.repeat(np.arange(len(pairs)), pieces)
        number_in_document = np.arange(pieces.sum()) - np.repeat(first_piece, pieces)
        self.piece_start = number_in_document * self.context
        remaining = pairs[self.piece_document] - self.piece_start
        self.piece_length = np.minimum(remaining, self.context)
        if not len(self.piece_length):
            raise UserError(
                "there is nothing to learn from: every document is shorter than two tokens"
            )
        self.cut_documents = float((pieces > 1).sum() / max((pieces > 0).sum(), 1))  # a share

    def _put_into_rows(self) -> None:
        """Best fit, in a random order: row r holds row_pieces[row_start[r] : row_start[r + 1]].

        row_pieces [2, 0, 1]    row_start [0, 1, 3]    row 0 holds piece 2, row 1 pieces 0 and 1
        """
        order = shuffled(self.seed, NO_EPOCH, len(self.piece_length))
        row_of_piece = best_fit(self.piece_length[order].tolist(), self.context)
        self.row_pieces = order[np.argsort(row_of_piece, kind="stable")]
        self.row_start = np.concatenate([[0], np.cumsum(np.bincount(row_of_piece))])

    def __len__(self) -> int:
        """Rows in an epoch."""
        return len(self.row_start) - 1

    def __repr__(self) -> str:
        return (
            f"Packed({self.tokens:,} tokens in {len(self):,} rows of {self.context}, "
            f"{self.padding:.1%} padding, {self.steps_per_epoch:.1f} steps an epoch)"
        )

    @property
    def steps_per_epoch(self) -> float:
        return len(self) / self.batch_rows

    @property
    def padding(self) -> float:
        """Share of an epoch's positions that hold no token."""
        return 1 - float(self.piece_length.sum()) / (len(self) * self.context)

    @property
    def data_id(self) -> str:
        """Names the data and how it is cut into steps. A run can be resumed only with the same."""
        bos = -1 if self.bos_id is None else self.bos_id
        layout = [self.context, self.batch_rows, self.seed, bos]
        source = getattr(self.documents, "data_id", None)
        if source is None:
            source = digest(*self.documents, *(() if self.masks is None else self.masks))
        return f"{source}-{digest(layout, self.piece_length)}"

    def row_at(self, index: int) -> int:
        """The row at place `index` of the endless sequence of shuffled epochs."""
        epoch, place = divmod(index, len(self))
        if self._order_of_epoch[0] != epoch:
            self._order_of_epoch = (epoch, shuffled(self.seed, epoch, len(self)))
        return int(self._order_of_epoch[1][place])

    def batch_at(self, step: int, part: Part = None) -> Batch:
        """The batch of a step, from 0. part: [start, stop) of its rows, by default all"""
        places = places_of(step, self.batch_rows, part)
        return self.batch([self.row_at(index) for index in places])

    def in_order(self) -> Iterator[Batch]:
        """Every row once, in batches: for validation."""
        for first in range(0, len(self), self.batch_rows):
            yield self.batch(range(first, min(first + self.batch_rows, len(self))))

    def batch(self, rows: Sequence[int]) -> Batch:
        """These rows as one batch."""
        ids, targets = empty_rows(len(rows), self.context)
        boundaries = [0]
        for i, row in enumerate(rows):
            end = 0
            for piece in self.row_pieces[self.row_start[row] : self.row_start[row + 1]]:
                inputs, piece_targets = self._inputs_and_targets(piece)
                begin = end
                end += len(inputs)
                ids[i, begin:end] = inputs
                targets[i, begin:end] = piece_targets
                boundaries.append(i * self.context + end)
            if end < self.context:  # the padding is a document of its own, without targets
                boundaries.append((i + 1) * self.context)
        return as_batch(ids, targets, boundaries)

    def _inputs_and_targets(self, piece: int) -> tuple[np.ndarray, np.ndarray]:
        index = self.piece_document[piece]
        start = int(self.piece_start[piece])
        stop = start + int(self.piece_length[piece]) + 1
        tokens = self._slice(self.documents[index], start, stop, self.bos_id)
        targets = tokens[1:]
        if self.masks is not None:
            first = None if self.bos_id is None else False
            is_learned = self._slice(self.masks[index], start, stop, first)
            targets = np.where(is_learned[1:], targets, IGNORE)
        return tokens[:-1], targets

    @staticmethod
    def _slice(document, start: int, stop: int, first: int | bool | None) -> np.ndarray:
        """[start, stop) of a document, before which `first` stands where it is not None."""
        if first is None:
            return np.asarray(document[start:stop]).astype(np.int64)
        rest = np.asarray(document[max(start - 1, 0) : stop - 1]).astype(np.int64)
        return np.concatenate([[first], rest]) if start == 0 else rest
