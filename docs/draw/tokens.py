"""Texts cut into tokens, one box a token; parts of characters are shown by their bytes."""

import unicodedata

from docs.draw import BLUE, GREY, ORANGE
from examples import small

TEXTS = (small.QUESTION, "月亮為什麼有時圓？", "皓月🌙", "The moon")
SIZE = (8, 2.4)


def data() -> dict:
    return {"rows": [small.tokenizer().pieces(text) for text in TEXTS]}


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    right = 0.0
    for y, pieces in enumerate(data["rows"]):
        x = 0.0
        for number, piece in enumerate(pieces):
            is_part = piece.startswith("<")
            shown = piece.replace("<", "").replace(">", " ").strip().replace(" ", "\n")
            columns = [2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in piece]
            width = 2.2 if is_part else max(1.6, sum(columns) + 0.6)
            colour = ORANGE if is_part else (BLUE, GREY)[number % 2]
            axes.barh(y, width - 0.12, left=x, height=0.8, color=colour, alpha=0.3)
            style = {"ha": "center", "va": "center", "fontsize": 7 if is_part else 11}
            axes.text(x + width / 2 - 0.06, y, shown, **style)
            x += width
        axes.text(x + 0.4, y, str(len(pieces)), va="center", color=GREY)
        right = max(right, x)
    axes.set_xlim(0, right + 3)
    axes.set_ylim(len(data["rows"]) - 0.4, -0.6)
    axes.axis("off")
