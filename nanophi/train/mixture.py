"""Several sources in one run, each with its share of the rows.

    --data out/news:0.3,out/poetry:0.1

A pattern that repeats says which source the i-th row of training comes from. How many rows each
source has given before row i follows by counting, so a batch stays a pure function of (seed, step):

    shares 3 : 1     pattern    news news poetry news | news news poetry news | ...
                     its row       0    1      0    2 |    3    4      1    5 | ...

Each source goes through epochs of its own: a small one with a large share is read several times
before another is read through once.
"""

import os
from typing import Any

import numpy as np
import torch

from nanophi.cli import SHOWN, UserError
from nanophi.expect import Expected, check
from nanophi.train.packing import Batch, Packed, Part, digest, places_of

PERIOD = 10_000  # rows of the pattern, so shares are exact to 1/10,000


def parse_mixture(text: str) -> dict[str, float | None]:
    """The sources of --data and their weights; the weight is None where none is given.

    >>> parse_mixture("news:0.3,poetry:0.1")
    {'news': 0.3, 'poetry': 0.1}
    >>> parse_mixture("C:/tokens")
    {'C:/tokens': None}
    """
    check(text, Expected(str), "a mixture")
    weights: dict[str, float | None] = {}
    places = set()
    for part in map(str.strip, text.split(",")):
        name, weight = _name_and_weight(part)
        if weight is not None and not 0 < weight < float("inf"):
            raise UserError(f"{part[:SHOWN]}: the weight of a source is a number above 0")
        place = os.path.realpath(name)  # news and ./news/ are one source
        if not name or place in places:
            raise UserError(
                f"{text[:SHOWN]}: a mixture is a list like news:0.3,poetry:0.1, each source once"
            )
        places.add(place)
        weights[name] = weight
    given = [weight is not None for weight in weights.values()]
    if any(given) and not all(given):
        raise UserError(
            f"{text[:SHOWN]}: give a weight to every source or to none (then each is read "
            "once an epoch)"
        )
    return weights


def _name_and_weight(part: str) -> tuple[str, float | None]:
    name, _, number = part.rpartition(":")
    if not name:
        return part, None
    try:
        return name, float(number)
    except ValueError:  # the colon belongs to the path
        return part, None


def interleaved(counts: list[int]) -> np.ndarray:
    """Which source stands at each of sum(counts) places, spread as evenly as possible.

    >>> interleaved([3, 1]).tolist()
    [0, 0, 1, 0]
    """
    places = [(np.arange(count) + 0.5) / max(count, 1) for count in counts]
    order = np.argsort(np.concatenate(places), kind="stable")
    return np.repeat(np.arange(len(counts)), counts)[order]


def rows_in_period(weights: np.ndarray) -> np.ndarray:
    """How many rows of PERIOD each source gets: in proportion to its weight, but at least one.

    The weights are brought near 1 first: the sum of huge ones is infinite, and PERIOD divided by
    that of tiny ones too.

    >>> rows_in_period(np.array([1e308, 1e308])).tolist()
    [5000, 5000]
    """
    shares = weights / weights.max()
    exact = shares * (PERIOD / shares.sum())
    counts = np.floor(exact).astype(int)
    missing = PERIOD - counts.sum()
    largest_remainders = np.argsort(counts - exact)[:missing]
    counts[largest_remainders] += 1
    for source in np.flatnonzero(counts == 0):
        counts[source] += 1
        counts[np.argmax(counts)] -= 1
    return counts


def check_sources(sources: Any, weights: Any) -> None:
    """Refuse sources whose rows differ in length, and weights that are not one for each source."""
    if not isinstance(sources, dict) or not sources:
        raise UserError('a mixture is of sources by name, such as {"news": Packed(...)}')
    contexts = {name: source.context for name, source in sources.items()}
    if len(set(contexts.values())) > 1:
        raise UserError(f"the sources of a mixture have rows of several lengths: {contexts}")
    if weights is None:
        return
    check(weights, Expected(list), "the weights of a mixture")
    if len(weights) != len(sources):
        raise UserError(f"there are {len(weights)} weights for {len(sources)} sources")
    for name, weight in zip(sources, weights, strict=True):
        check(weight, Expected(float, above=0, optional=True), f"the weight of {name}")


class Mixture:
    """Packed sources as one, with everything that a training script asks of `Packed`.

    weights: a number for each source, of any sum; without them a source's size is its weight.
    """

    def __init__(
        self, sources: dict[str, Packed], weights: list[float | None] | None, batch_rows: int
    ):
        check_sources(sources, weights)
        check(batch_rows, Expected(int, at_least=1), "batch_rows")
        self.sources = list(sources.values())
        self.names = list(sources)
        self.batch_rows = batch_rows
        self.context = self.sources[0].context
        if weights and None not in weights:
            numbers = np.array(weights, dtype=np.float64)
        else:
            numbers = np.array([len(source) for source in self.sources], dtype=np.float64)
        counts = rows_in_period(numbers)
        self.pattern = interleaved(counts.tolist())  # (PERIOD,) the source of each row
        # before[i]: how many of the first i rows of the pattern each source gives, (PERIOD + 1, S)
        given = self.pattern[:, None] == np.arange(len(counts))
        none = np.zeros((1, len(counts)), dtype=np.int64)
        self.before = np.concatenate([none, np.cumsum(given, axis=0)])

    def __len__(self) -> int:
        """Rows in an epoch: those of all sources, whatever their shares."""
        return sum(map(len, self.sources))

    def __repr__(self) -> str:
        sources = zip(self.names, self.shares, strict=True)
        return f"Mixture({', '.join(f'{name} {share:.1%}' for name, share in sources)})"

    @property
    def steps_per_epoch(self) -> float:
        return len(self) / self.batch_rows

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def shares(self) -> np.ndarray:
        """Each source's share of the rows: (S,)."""
        return self.before[-1] / PERIOD

    @property
    def padding(self) -> float:
        return self._average([source.padding for source in self.sources])

    @property
    def cut_documents(self) -> float:
        return self._average([source.cut_documents for source in self.sources])

    def _average(self, values: list[float]) -> float:
        return float(sum(share * value for share, value in zip(self.shares, values, strict=True)))

    @property
    def data_id(self) -> str:
        """Names the data and how it is cut into steps, as `Packed.data_id`."""
        mixed = digest(self.pattern, [self.batch_rows])
        return f"{mixed}-" + "-".join(source.data_id for source in self.sources)

    def given(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows of training each source gives: (S,)."""
        periods, rest = divmod(rows, PERIOD)
        return periods * self.before[-1] + self.before[rest]

    def epochs(self, steps: int) -> str:
        """How often each source is read in so many steps, to be printed."""
        counts = self.given(steps * self.batch_rows)
        lines = []
        for name, share, count, source in zip(
            self.names, self.shares, counts, self.sources, strict=True
        ):
            lines.append(f"{name} {share:.1%} of the rows = {count / len(source):.2f} epochs")
        return ", ".join(lines)

    def batch_at(self, step: int, part: Part = None) -> Batch:
        """The batch of a step, from 0. part: [start, stop) of its rows, by default all"""
        rows = []
        for index in places_of(step, self.batch_rows, part):
            number = self.pattern[index % PERIOD]
            source = self.sources[number]
            given_before = int(self.given(index)[number])
            rows.append(source.batch([source.row_at(given_before)]))
        boundaries = [torch.zeros(1, dtype=torch.int32)]
        for i, row in enumerate(rows):
            boundaries.append(row.cu_seqlens[1:] + i * self.context)
        return Batch(
            torch.cat([row.ids for row in rows]),
            torch.cat([row.targets for row in rows]),
            torch.cat(boundaries).to(torch.int32),
        )
