"""Preference pairs as batches: `batch_at(step)`, for DPO.

Row 2i of a batch holds the conversation with the chosen answer of pair i, row 2i + 1 that with the
rejected one:

    row 0    prompt chosen [EOS]
    row 1    prompt rejected [EOS] _ _ _      padded to the longest of the batch

Or one row holds both answers behind their prompt, which is computed once (model/attention.py,
Branches). The last token of the prompt stands before each answer, because it predicts two tokens,
the first one of each:

    inputs     p1 p2 | p3 c1 c2 | p3 r1          prompt p1 p2 p3, answers c1 c2 c3 and r1 r2
    targets    _  _  | c1 c2 c3 | r1 r2
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from torch import Tensor

from nanophi.cli import UserError
from nanophi.expect import Expected, check
from nanophi.model.attention import branches_of
from nanophi.train.packing import (
    IGNORE,
    Batch,
    Part,
    as_batch,
    check_ids,
    digest,
    empty_rows,
    places_of,
    shuffled,
)

Conversation = tuple[list[int], list[bool]]  # ids, and where they are learned


@dataclass
class Preference:
    """One preference pair, encoded."""

    chosen: Conversation
    rejected: Conversation

    @property
    def sides(self) -> tuple[Conversation, Conversation]:
        return self.chosen, self.rejected

    @cached_property
    def shared(self) -> int:
        """How many inputs the two sides have in common, up to the first that predicts a token of
        an answer.

        >>> chosen = ([5, 6, 7, 8], [False, False, True, True])
        >>> Preference(chosen, rejected=([5, 6, 9], [False, False, True])).shared
        1
        """
        shared = 0
        (chosen, chosen_mask), (rejected, rejected_mask) = self.sides
        for place in range(min(len(chosen), len(rejected)) - 1):
            is_learned = chosen_mask[place + 1] or rejected_mask[place + 1]
            if chosen[place] != rejected[place] or is_learned:
                break
            shared += 1
        return shared

    @property
    def inputs_when_shared(self) -> int:
        """The inputs of one row with both sides: those in common, and the rest of each."""
        return sum(len(ids) - 1 - self.shared for ids, _ in self.sides) + self.shared


def check_side(side: Any, where: str) -> None:
    """Refuse what is no answer with its prompt: ids, and which of them are learned."""
    if not isinstance(side, tuple) or len(side) != 2:
        raise UserError(f"{where} is of type {type(side).__name__}, expected (ids, mask)")
    ids, mask = side
    check_ids(ids, where)
    if len(ids) != len(mask) or len(ids) < 2:
        raise UserError(
            f"{where} has {len(ids)} ids and a mask of {len(mask)}, expected as many of both, and "
            "two or more"
        )


class Pairs:
    """Preference pairs as batches.

    batch_pairs: pairs of a step
    multiple: the length of the rows, that of the longest conversation of a batch, is rounded up to
    a multiple of it;
        128, for example, where torch.compile would compile each new length
    share: whether both answers of a pair stand in one row behind their prompt
    reference: (pairs, 2) log-probabilities of both answers under the reference; dpo.py fills it
    before training
    """

    def __init__(
        self,
        pairs: list[Preference],
        batch_pairs: int,
        seed: int,
        multiple: int = 1,
        share: bool = False,
    ):
        if not pairs:
            raise UserError("there is no preference pair to learn from")
        check(batch_pairs, Expected(int, at_least=1), "batch_pairs")
        check(seed, Expected(int, at_least=0), "seed")
        check(multiple, Expected(int, at_least=1), "multiple")
        for number, pair in enumerate(pairs):
            check_side(pair.chosen, f"pair {number:,}: chosen")
            check_side(pair.rejected, f"pair {number:,}: rejected")
        self.pairs = pairs
        self.batch_pairs = batch_pairs
        self.seed = seed
        self.multiple = multiple
        self.share = share
        self.reference: Tensor | None = None

    def __len__(self) -> int:
        return len(self.pairs)

    def __repr__(self) -> str:
        return f"Pairs({len(self):,} pairs, {self.steps_per_epoch:.1f} steps an epoch)"

    @property
    def steps_per_epoch(self) -> float:
        return len(self.pairs) / self.batch_pairs

    @property
    def longest(self) -> int:
        """The length of the longest row, as `batch` rounds it up."""
        return self.row_length(range(len(self.pairs)))

    def _rounded_up(self, inputs: int) -> int:
        return -(-inputs // self.multiple) * self.multiple

    @property
    def data_id(self) -> str:
        """Names the pairs and how they are cut into steps.

        What the reference thinks of them is left out: its last bits depend on device and
        micro-batch. dpo.py adds the weights of the reference instead.
        """
        sides = [side for pair in self.pairs for side in (*pair.chosen, *pair.rejected)]
        return digest([self.batch_pairs, self.seed], *sides)

    def batch_at(self, step: int, part: Part = None) -> Batch:
        """The batch of a step, from 0. part: [start, stop) of its pairs, by default all

        Rows are as long as the longest of the whole step, so that a part has the bits of the whole.
        """
        places = places_of(step, self.batch_pairs)
        epochs = {place // len(self) for place in places}
        orders = {epoch: shuffled(self.seed, epoch, len(self)) for epoch in epochs}
        indices = [int(orders[place // len(self)][place % len(self)]) for place in places]
        own = indices if part is None else indices[slice(*part)]
        return self.batch(own, self.row_length(indices))

    def in_order(self) -> Iterator[Batch]:
        """Each pair once, in batches: for validation."""
        for first in range(0, len(self.pairs), self.batch_pairs):
            yield self.batch(range(first, min(first + self.batch_pairs, len(self.pairs))))

    def row_length(self, indices: Sequence[int]) -> int:
        """How long a row must be for these pairs."""
        pairs = [self.pairs[index] for index in indices]
        if self.share:
            return self._rounded_up(max(pair.inputs_when_shared for pair in pairs))
        return self._rounded_up(max(len(ids) - 1 for pair in pairs for ids, _ in pair.sides))

    def batch(self, indices: Sequence[int], time: int | None = None) -> Batch:
        """These pairs as one batch. time: the length of its rows, by default that of the longest"""
        pairs = [self.pairs[index] for index in indices]
        reference = None
        if self.reference is not None:
            reference = self.reference[list(indices)].flatten()
        time = time or self.row_length(indices)
        if self.share:
            return self._shared(pairs, time, reference)
        rows = [side for pair in pairs for side in pair.sides]
        ids, targets = empty_rows(len(rows), time)
        boundaries = [0]
        for i, (tokens, mask) in enumerate(rows):
            inputs = len(tokens) - 1
            ids[i, :inputs] = tokens[:-1]
            targets[i, :inputs] = np.where(mask[1:], tokens[1:], IGNORE)
            if inputs < time:
                boundaries.append(i * time + inputs)
            boundaries.append((i + 1) * time)
        return as_batch(ids, targets, boundaries, rows_per_sample=2, reference=reference)

    def _shared(self, pairs: list[Preference], time: int, reference: Tensor | None) -> Batch:
        """One row for each pair: prompt, chosen, rejected, and padding."""
        ids, targets = empty_rows(len(pairs), time)
        boundaries = [0]
        continues: list[int] = []
        for i, pair in enumerate(pairs):
            prompt = pair.shared
            ids[i, :prompt] = pair.chosen[0][:prompt]
            number = len(continues)  # of the prompt, among all segments
            ends = [prompt]
            for tokens, mask in pair.sides:
                begin = ends[-1]
                ends.append(begin + len(tokens) - 1 - prompt)
                ids[i, begin : ends[-1]] = tokens[prompt:-1]
                learned = np.where(mask[prompt + 1 :], tokens[prompt + 1 :], IGNORE)
                targets[i, begin : ends[-1]] = learned
            continues += [-1, number, number]
            if ends[-1] < time:
                ends.append(time)
                continues.append(-1)
            boundaries += [i * time + end for end in ends]
        return as_batch(
            ids,
            targets,
            boundaries,
            answers_per_row=2,
            reference=reference,
            branches=branches_of(boundaries, continues),
        )


def share_of_prompts(pairs: list[Preference]) -> float:
    """How much of all inputs need not be computed when each pair shares its prompt: 0 to 1/2."""
    shared = sum(pair.shared for pair in pairs)
    inputs = sum(len(ids) - 1 for pair in pairs for ids, _ in pair.sides)
    return shared / inputs
