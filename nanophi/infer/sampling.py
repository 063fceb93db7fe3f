"""What happens to the logits before a token is chosen: one function for each filter.

The table FILTERS lists the filters in the order in which `choose` applies them:

    logits (B, V)
      -> logit_bias              numbers added to some logits
      -> repetition_penalty      ids that occurred already become less likely
      -> no_repeat_ngram_size    ids that would repeat a run of ids are forbidden
      -> greedy: argmax          (temperature 0; what follows applies to sampling only)
      -> temperature             logits / temperature
      -> top_k                   only the k likeliest ids stay
      -> top_p                   only the likeliest ids stay that together reach p
      -> min_p                   only ids stay that have this share of the best id's probability
      -> softmax, then one random id per row

Order and meaning are those of transformers' generate, so that the same settings give the same
tokens. Each filter has a neutral value with which it is off, and None means that value. A filter
that would forbid all ids of a row leaves the row as it was, so that there is always an id to take.

A new filter is one function and one row; `generate`, `stream` and the flags of generate.py
all read the table. For example:

    def keep_above(logits, history, smallest):
        return logits.masked_fill(logits.softmax(-1) < smallest, NEVER)

    FILTERS["epsilon"] = Filter(keep_above, float, 0.0, "drop tokens below this probability")
    nanophi.generate(model, ids, temperature=0.8, epsilon=1e-3)

    B rows, V vocabulary; logits (B, V) fp32; history: for each row, the ids of its prompt and of
    its answer so far
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict, Unpack

import torch
from torch import Tensor

from nanophi.cli import UserError, outside, row_named
from nanophi.expect import KINDS, Expected, check, shown
from nanophi.model.phi import MASKED_BIAS

NEVER = float("-inf")  # the logit of a forbidden id: its probability is exactly 0


class Ids(list[int]):
    """The ids of a row, its prompt and its answer, which grow by one a step.

    They remember what followed each run of ids, so that a step need not read them all again.

    >>> ids = Ids([1, 2, 3, 1, 2])
    >>> ids.followers(3)  # after the last two ids, 1 2, there was a 3 before
    [3]
    """

    def __init__(self, ids: Iterable[int] = ()):
        super().__init__(ids)
        self._followed: dict[int, dict[tuple[int, ...], list[int]]] = {}
        self._read: dict[int, int] = {}  # by size: how many runs have been read
        self._behind: dict[int, dict[tuple[int, ...], int]] = {}
        self._ended: dict[int, int] = {}  # the same of `_behind`

    def followers(self, size: int) -> list[int]:
        """The ids that followed the last size - 1 ids wherever these occurred before."""
        followed = self._followed.setdefault(size, {})
        runs = len(self) - size + 1
        for start in range(self._read.get(size, 0), runs):
            *prefix, last = self[start : start + size]
            followed.setdefault(tuple(prefix), []).append(last)
        self._read[size] = max(runs, 0)
        if runs <= 0:
            return []
        return followed.get(tuple(self[len(self) - size + 1 :]), [])

    def behind_latest(self, size: int) -> int | None:
        """The place behind the latest earlier run that equals the last `size` ids; None without.

        >>> Ids([5, 6, 7, 5, 6]).behind_latest(2)
        2
        """
        behind = self._behind.setdefault(size, {})
        runs = len(self) - size  # all but the last one
        for start in range(self._ended.get(size, 0), runs):
            behind[tuple(self[start : start + size])] = start + size
        self._ended[size] = max(runs, 0)
        return behind.get(tuple(self[-size:])) if runs > 0 else None


History = Sequence[list[int]]  # of each row; as Ids they are read once

# ---- the filters: (logits, history, value) -> logits


def within_fp32(value: float) -> float:
    """A value that is neither 0 nor infinite in fp32: 1e-45 and 1e308 would make logits nan."""
    return min(max(value, 1e-30), 1e30)


def add_bias(logits: Tensor, history: History, bias: Mapping[int, float]) -> Tensor:
    """Add a number to the logits of some ids.

    >>> add_bias(torch.tensor([[1.0, 3.0]]), [[]], {0: 5.0})
    tensor([[6., 3.]])
    """
    unknown = [token for token in bias if not 0 <= token < logits.shape[-1]]
    if unknown:
        raise UserError(
            f"logit_bias names id {unknown[0]}, the model knows ids 0 to {logits.shape[-1] - 1}"
        )
    logits = logits.clone()
    ids = torch.tensor(list(bias), device=logits.device)
    logits[:, ids] += torch.tensor(list(bias.values()), device=logits.device)
    return logits


def penalize_repetition(logits: Tensor, history: History, penalty: float) -> Tensor:
    """Make every id that already occurred less likely (Keskar et al. 2019).

    A positive logit is divided by the penalty and a negative one multiplied, so that both fall:

    >>> penalize_repetition(torch.tensor([[4.0, -1.0, 3.0]]), [[0, 1]], penalty=2.0)
    tensor([[ 2., -2.,  3.]])
    """
    logits = logits.clone()
    penalty = within_fp32(penalty)
    for row, ids in zip(logits, history, strict=True):
        seen = torch.tensor(sorted(set(ids)), device=row.device)
        scores = row[seen]
        row[seen] = torch.where(scores < 0, scores * penalty, scores / penalty)
    return logits


def forbid_repeated_ngrams(logits: Tensor, history: History, size: int) -> Tensor:
    """Forbid every id that would complete an n-gram of `size` ids a second time.

    With size 1 each id may occur once. When all have occurred, nothing is forbidden any more (see
    `choose`).

    Let size be 3 and the ids 1 2 3 1 2. The next id completes the n-gram that begins with 1 2.
    After 1 2 there was a 3 before, so 3 is forbidden:

    >>> forbid_repeated_ngrams(torch.zeros(1, 5), [[1, 2, 3, 1, 2]], size=3)
    tensor([[0., 0., 0., -inf, 0.]])
    """
    logits = logits.clone()
    for row, ids in zip(logits, history, strict=True):
        known = ids if isinstance(ids, Ids) else Ids(ids)
        row[known.followers(size)] = NEVER
    return logits


def apply_temperature(logits: Tensor, history: History, temperature: float) -> Tensor:
    """Divide by the temperature: below 1 the likely ids gain, above 1 the unlikely ones.

    >>> apply_temperature(torch.tensor([[1.0, 3.0]]), [[]], 1e-45).softmax(-1)
    tensor([[0., 1.]])
    """
    return logits / within_fp32(temperature)


def keep_top_k(logits: Tensor, history: History, k: int) -> Tensor:
    """Forbid all but the k largest logits. Logits equal to the k-th largest stay too.

    >>> keep_top_k(torch.tensor([[1.0, 3.0, 2.0, 2.0]]), [[]], k=2)
    tensor([[-inf, 3., 2., 2.]])
    """
    smallest = logits.topk(min(k, logits.shape[-1])).values[..., -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, NEVER)


def keep_top_p(logits: Tensor, history: History, p: float) -> Tensor:
    """Keep the smallest set of likeliest ids whose probabilities together reach p.

    This is nucleus sampling (Holtzman et al. 2020). Let p be 0.7:

        id                        0     1     2     3
        probability            0.15  0.50  0.05  0.30
        sorted, ascending      0.05  0.15  0.30  0.50      ids 2 0 3 1
        cumulative sum         0.05  0.20  0.50  1.00
        at most 1 - p = 0.30    yes   yes    no    no      ids 2 and 0 are forbidden

    The ids that stay, 1 and 3, reach 0.80; id 1 alone would reach only 0.50.

    >>> logits = torch.tensor([[0.15, 0.50, 0.05, 0.30]]).log()
    >>> keep_top_p(logits, [[]], p=0.7).exp()
    tensor([[0.0000, 0.5000, 0.0000, 0.3000]])
    """
    ascending, order = logits.sort()
    outside = ascending.softmax(-1).cumsum(-1) <= 1 - p
    outside[..., -1] = False  # the likeliest id stays, however small p is
    return logits.masked_fill(outside.scatter(-1, order, outside), NEVER)


def keep_min_p(logits: Tensor, history: History, share: float) -> Tensor:
    """Forbid ids less likely than this share of the likeliest (Nguyen et al. 2024).

    >>> keep_min_p(torch.tensor([[0.6, 0.3, 0.1]]).log(), [[]], share=0.3).exp()
    tensor([[0.6000, 0.3000, 0.0000]])
    """
    probabilities = logits.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    return logits.masked_fill(probabilities < share * likeliest, NEVER)


# ---- the table


@dataclass(frozen=True)
class Filter:
    """One row of FILTERS: a function, and what the command line says about its value."""

    apply: Callable[[Tensor, History, Any], Tensor]  # (logits, history, value) -> logits
    kind: type  # of the value: int or float
    default: Any  # the neutral value: the filter is skipped
    help: str
    at_least: float | None = None  # the range of the value; None: no limit on this side
    above: float | None = None
    at_most: float | None = None
    greedy: bool = False  # whether the filter applies to greedy decoding too
    on_device: bool = False  # whether it asks for logits alone: no history, no number of a GPU

    def check(self, name: str, value: Any) -> None:
        """Refuse a value of another type or outside of the range with a UserError."""
        if self.kind is dict:
            check(value, Expected(dict), name)
            for token, number in value.items():
                check(token, Expected(int, at_least=0), f"an id of {name}")
                check(number, Expected(float), f"{name} of {token}")
            return
        if not Expected(self.kind).fits(value) or outside(
            value, self.at_least, self.above, self.at_most
        ):
            limits = {"at least": self.at_least, "above": self.above, "at most": self.at_most}
            expected = [f"{words} {limit}" for words, limit in limits.items() if limit is not None]
            raise UserError(
                f"{name} {shown(value)} is out of range: it must be "
                f"{' and '.join([*expected, KINDS[self.kind]])}"
            )


FILTERS: dict[str, Filter] = {
    "logit_bias": Filter(
        add_bias,
        kind=dict,
        default={},
        help="numbers to add to the logits of some ids, {id: number}",
        greedy=True,
    ),
    "repetition_penalty": Filter(
        penalize_repetition,
        kind=float,
        default=1.0,
        help="above 1: tokens already seen become less likely",
        above=0,
        greedy=True,
    ),
    "no_repeat_ngram_size": Filter(
        forbid_repeated_ngrams,
        kind=int,
        default=0,
        help="never repeat a run of this many tokens",
        at_least=0,
        greedy=True,
    ),
    "temperature": Filter(
        apply_temperature,
        kind=float,
        default=0.0,
        help="0 is greedy; higher is more varied",
        at_least=0,
        on_device=True,
    ),
    "top_k": Filter(
        keep_top_k,
        kind=int,
        default=0,
        help="sample from the k likeliest tokens; 0: from all",
        at_least=0,
        on_device=True,
    ),
    "top_p": Filter(
        keep_top_p,
        kind=float,
        default=1.0,
        help="sample from the likeliest tokens that together reach this probability",
        above=0,
        at_most=1,
        on_device=True,
    ),
    "min_p": Filter(
        keep_min_p,
        kind=float,
        default=0.0,
        help="drop tokens less likely than this share of the likeliest",
        at_least=0,
        at_most=1,
        on_device=True,
    ),
}

FLAGS = {name: row for name, row in FILTERS.items() if row.kind is not dict}  # of generate.py


class Keywords(TypedDict, total=False):
    """The names and types of FILTERS once more, for editors and type checkers only.

    The code reads FILTERS; a filter that is added there works without an entry here.
    """

    logit_bias: Mapping[int, float] | None
    repetition_penalty: float | None
    no_repeat_ngram_size: int | None
    temperature: float | None
    top_k: int | None
    top_p: float | None
    min_p: float | None


# ---- choosing


class Sampling:
    """The filters that a caller chose, and their values.

    chosen: name -> value, in the order of FILTERS, without neutral values
    greedy: whether the likeliest id is taken; a temperature above 0 samples instead

    >>> Sampling(top_k=5, temperature=0.8, repetition_penalty=1.0)
    Sampling(temperature=0.8, top_k=5)
    >>> Sampling(temprature=0.8)  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    nanophi.cli.UserError: no sampling filter is called 'temprature'; there are logit_bias, ...
    """

    def __init__(self, **values: Unpack[Keywords]):
        self.chosen: dict[str, Any] = {}
        for name in values:
            row_named(FILTERS, name, "sampling filter")
        for name, row in FILTERS.items():
            value = values.get(name)
            if value is None:
                continue
            row.check(name, value)
            if value != row.default:
                self.chosen[name] = value
        self.greedy = "temperature" not in self.chosen

    def __repr__(self) -> str:
        values = ", ".join(f"{name}={value}" for name, value in self.chosen.items())
        return f"Sampling({values})"


def choose(
    logits: Tensor,
    history: History,
    how: Sampling,
    generator: torch.Generator | None = None,
) -> list[int]:
    """Logits (B, V) of any dtype -> one id per row. generator: gives the random numbers.

    >>> logits = torch.tensor([[1.0, 5.0, 4.0]])
    >>> choose(logits, [[1]], Sampling())
    [1]
    >>> choose(logits, [[1]], Sampling(repetition_penalty=2.0))
    [2]
    """
    logits = logits.float()
    if not how.chosen:  # the usual case, in one pass
        likeliest = logits.max(-1)
        if all(NEVER < logit < float("inf") for logit in likeliest.values.tolist()):
            return likeliest.indices.tolist()
    if not are_numbers(logits).all().tolist():
        raise no_probabilities()
    logits = filtered(logits, history, how)
    if how.greedy:
        return logits.argmax(-1).tolist()
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0].tolist()


def are_numbers(logits: Tensor) -> Tensor:
    """Whether the logits (B, V) of a row give probabilities: bool (B,).

    >>> are_numbers(torch.tensor([[1.0, NEVER], [1.0, torch.nan], [NEVER, NEVER]]))
    tensor([ True, False, False])
    """
    return (logits < float("inf")).all(-1) & (logits > NEVER).any(-1)  # nan is never smaller


def no_probabilities() -> UserError:
    """What is said where logits are no numbers."""
    return UserError(
        "the model computes no probabilities: some of its logits are nan or infinite, so its "
        "weights are damaged or far too large, or their dtype is too narrow (model.float())"
    )


def filtered(logits: Tensor, history: History, how: Sampling) -> Tensor:
    """The logits (B, V) behind all filters that a caller chose."""
    if how.chosen:  # ids that no tokenizer uses are nothing that a filter may leave
        logits = unless_nothing_is_left(logits.masked_fill(logits < MASKED_BIAS / 2, NEVER), logits)
    for name, value in how.chosen.items():
        row = FILTERS[name]
        if row.greedy or not how.greedy:
            logits = unless_nothing_is_left(row.apply(logits, history, value), logits)
            logits = logits.clamp(max=torch.finfo(logits.dtype).max)  # two filters may overflow
    return logits


def unless_nothing_is_left(filtered: Tensor, before: Tensor) -> Tensor:
    """The filtered logits; of rows in which every id is forbidden, those before the filter.

    >>> before = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    >>> unless_nothing_is_left(torch.tensor([[NEVER, 2.0], [NEVER, NEVER]]), before)
    tensor([[-inf, 2.],
            [3., 4.]])
    """
    is_left = filtered.max(-1, keepdim=True).values > NEVER  # (B, 1)
    return torch.where(is_left, filtered, before)
