"""How often guessing gets which share of n questions with four options."""

import math

from docs.draw import BLUE, GREY, ORANGE

SIZE = (7, 3)
LARGE, SMALL = 1346, 20  # C-Eval's val set; the demo's held-out questions


def probability(right: int, n: int) -> float:
    """Of exactly `right` right guesses among n."""
    return math.comb(n, right) * 3 ** (n - right) / 4**n


def data() -> dict:
    """Heights relative to the highest, as n = 20 has far fewer possible shares."""
    curves = {}
    for n, step in ((SMALL, 1), (LARGE, 7)):
        rights = [k for k in range(0, n + 1, step) if k <= 0.6 * n]
        heights = [probability(k, n) for k in rights]
        shown = [(k, h) for k, h in zip(rights, heights, strict=True) if h > 1e-3 * max(heights)]
        curves[str(n)] = {
            "share": [k / n for k, _ in shown],
            "height": [h / max(heights) for _, h in shown],
        }
    return {"curves": curves, "marked": [0.27, 0.30]}


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    few, many = data["curves"][str(SMALL)], data["curves"][str(LARGE)]
    axes.bar(few["share"], few["height"], width=0.042, color=GREY, alpha=0.45, label="n = 20")
    axes.fill_between(many["share"], many["height"], color=BLUE, alpha=0.35)
    axes.plot(many["share"], many["height"], color=BLUE, label="n = 1,346")
    for share in data["marked"]:
        axes.axvline(share, color=ORANGE, linewidth=1.5)
        axes.text(share, 1.08, f"{share:.0%}", color=ORANGE, ha="center")
    axes.set_xlim(0, 0.6)
    axes.set_ylim(0, 1.05)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlabel("right by guessing")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:.0%}")
    axes.legend(frameon=False)
