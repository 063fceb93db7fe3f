"""Several sources in one run, each with its share of the rows: `--data out/news:0.3,out/poetry:0.1`.

Which source the i-th row of training comes from is written in a pattern that repeats, and how many rows each source has
given before row i follows from it by counting; so a batch stays a pure function of (seed, step). Each source goes
through epochs of its own: a small one with a large share is read several times while another is not read through once.
"""

import numpy as np
import torch

from nanophi.cli import UserError
from nanophi.train.packing import Batch, Packed, digest

PERIOD = 10_000  # rows of the pattern, so shares are kept to 1/10,000


def parse_mixture(text: str) -> dict[str, float | None]:
    """ "news:0.3,poetry:0.1" -> {"news": 0.3, "poetry": 0.1}; a name without a number has the weight None."""
    found: dict[str, float | None] = {}
    for part in text.split(","):
        name, _, number = part.strip().rpartition(":")
        try:
            weight = float(number) if name else None
        except ValueError:  # a colon of the path
            name, weight = "", None
        name = name or part.strip()
        if weight is not None and not 0 < weight < float("inf"):
            raise UserError(f"{part.strip()}: the weight of a source is a number above 0")
        if not name or name in found:
            raise UserError(
                f"{text}: a mixture is a list like news:0.3,poetry:0.1, each source once"
            )
        found[name] = weight
    if len({weight is None for weight in found.values()}) > 1:
        raise UserError(
            f"{text}: give a weight to every source or to none (then each is read once an epoch)"
        )
    return found


def interleaved(counts: list[int]) -> np.ndarray:
    """Which of the sources stands at each of sum(counts) places, spread as evenly as can be."""
    places = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    return np.repeat(np.arange(len(counts)), counts)[np.argsort(places, kind="stable")]


class Mixture:
    """Packed sources as one, with what a training script asks of `Packed`: `batch_at(step)`, `steps_per_epoch`, ...

    weights: a number for each source, of any sum; without them a source's size is its weight.
    """

    def __init__(
        self, sources: dict[str, Packed], weights: list[float | None] | None, batch_rows: int
    ):
        self.sources, self.names = list(sources.values()), list(sources)
        self.batch_rows, self.context = batch_rows, self.sources[0].context
        sizes = [len(source) for source in self.sources]
        wanted = np.array(weights if weights and None not in weights else sizes, dtype=np.float64)
        wanted *= PERIOD / wanted.sum()
        counts = np.floor(wanted).astype(int)
        counts[np.argsort(counts - wanted)[: PERIOD - counts.sum()]] += (
            1  # to the largest remainders
        )
        for left_out in np.flatnonzero(counts == 0):
            counts[left_out] += 1
            counts[np.argmax(counts)] -= 1
        self.pattern = interleaved(counts.tolist())
        given = self.pattern[:, None] == np.arange(len(counts))
        self.before = np.concatenate(
            [np.zeros((1, len(counts)), dtype=np.int64), np.cumsum(given, axis=0)]
        )

    def __len__(self) -> int:
        """Rows in an epoch: those of all sources, whatever their shares."""
        return sum(map(len, self.sources))

    @property
    def steps_per_epoch(self) -> float:
        return len(self) / self.batch_rows

    @property
    def tokens(self) -> int:
        return sum(source.tokens for source in self.sources)

    @property
    def padding(self) -> float:
        return self._average("padding")

    @property
    def cut_documents(self) -> float:
        return self._average("cut_documents")

    def _average(self, name: str) -> float:
        shares = self.before[-1] / PERIOD
        return float(
            sum(
                share * getattr(source, name)
                for share, source in zip(shares, self.sources, strict=True)
            )
        )

    @property
    def data_id(self) -> str:
        return f"{digest(self.pattern, [self.batch_rows])}-" + "-".join(
            source.data_id for source in self.sources
        )

    def given(self, rows: int) -> np.ndarray:
        """How many of the first `rows` rows of training each source gives."""
        periods, rest = divmod(rows, PERIOD)
        return periods * self.before[-1] + self.before[rest]

    def epochs(self, steps: int) -> str:
        """How often each source is read in so many steps, to be printed."""
        counts = self.given(steps * self.batch_rows)
        shares = self.before[-1] / PERIOD
        return ", ".join(
            f"{name} {share:.1%} of the rows = {count / len(source):.2f} epochs"
            for name, share, count, source in zip(
                self.names, shares, counts, self.sources, strict=True
            )
        )

    def batch_at(self, step: int) -> Batch:
        rows = []
        for index in range(step * self.batch_rows, (step + 1) * self.batch_rows):
            number = self.pattern[index % PERIOD]
            source = self.sources[number]
            rows.append(source.batch([source.row_at(int(self.given(index)[number]))]))
        starts = range(0, len(rows) * self.context, self.context)
        boundaries = [row.cu_seqlens[1:] + start for row, start in zip(rows, starts, strict=True)]
        cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.int32), *boundaries]).to(torch.int32)
        return Batch(
            torch.cat([row.ids for row in rows]),
            torch.cat([row.targets for row in rows]),
            cu_seqlens,
        )
