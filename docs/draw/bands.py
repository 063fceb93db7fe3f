"""How probably two texts become candidates, by their similarity: theory, and pairs of random sets
that go through the library's own signatures and bands.
"""

import numpy as np

from docs.draw import BLUE, GREY, ORANGE
from nanophi.text.dedup import band_keys, collision_probability, signatures

CUTS = ((32, 4), (16, 8), (8, 16))  # (bands, rows): all cut 128 numbers
COLOURS = (GREY, BLUE, ORANGE)
MEASURED = (16, 8)  # the cut for the threshold 0.8
SHINGLES = 180  # of each set
PAIRS = 400  # for each dot


def measured(similarity: float, dice: np.random.Generator) -> tuple[float, float]:
    """(exact similarity of the pairs, share of the pairs that meet in a band)."""
    common = round(2 * SHINGLES * similarity / (1 + similarity))
    size = 2 * SHINGLES - common  # of the union
    sets = []
    for union in dice.integers(0, 2**64, (PAIRS, size), np.uint64):
        sets += [union[:SHINGLES], union[-SHINGLES:]]  # they share the middle
    starts = np.arange(2 * PAIRS + 1) * SHINGLES
    keys = band_keys(signatures(np.concatenate(sets), starts), *MEASURED)
    return common / size, float((keys[::2] == keys[1::2]).any(axis=1).mean())


def data() -> dict:
    dice = np.random.default_rng(0)
    x = [i / 50 for i in range(51)]
    curves = {}
    for bands, rows in CUTS:
        curves[f"b = {bands}, r = {rows}"] = [collision_probability(s, bands, rows) for s in x]
    dots = [measured(0.45 + i / 20, dice) for i in range(11)]
    return {"x": x, "curves": curves, "dots": dots}


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    for (name, y), colour in zip(data["curves"].items(), COLOURS, strict=True):
        axes.plot(data["x"], y, label=name, color=colour)
    axes.plot(*zip(*data["dots"], strict=True), "o", color=BLUE, markersize=4, label="measured")
    axes.axvline(0.8, color=GREY, linewidth=0.8, linestyle=":")
    axes.set_xlabel("similarity s")
    axes.set_ylabel(r"$1 - (1 - s^r)^b$")
    axes.legend(frameon=False)
