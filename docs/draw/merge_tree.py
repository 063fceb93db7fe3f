"""The merges that make tokens of 15 bytes: 月亮为什么. The height is the number of the merge, which
stands under its line.
"""

from itertools import pairwise

from docs.draw import BLUE, GREY
from examples import small

TEXT = "月亮为什么"
SIZE = (7.5, 3.8)


def data() -> dict:
    """leaves: bytes in hex. merges: {left, right: nodes; number; text} in order; node n of the
    picture is leaf n, or merge n - (number of leaves).
    """
    tok = small.tokenizer()
    ids = [tok.vocab[symbol] for symbol in tok.level.symbols(TEXT)]
    nodes = list(range(len(ids)))  # the node of each token of `ids`
    merges: list[dict] = []
    while True:
        found = [
            (*tok.merges[pair], at) for at, pair in enumerate(pairwise(ids)) if pair in tok.merges
        ]
        if not found:
            return {"leaves": TEXT.encode().hex(" ").upper().split(), "merges": merges}
        rank, merged, at = min(found, key=lambda each: (each[0], each[2]))
        left, right = nodes[at : at + 2]
        merges.append({"left": left, "right": right, "number": rank + 1, "text": tok.piece(merged)})
        ids[at : at + 2] = [merged]
        nodes[at : at + 2] = [len(TEXT.encode()) + len(merges) - 1]


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    places = [(float(x), 0.6) for x in range(len(data["leaves"]))]
    for (x, y), byte in zip(places, data["leaves"], strict=True):
        axes.text(x, y * 0.9, byte, ha="center", va="top", color=GREY, family="monospace")
    for merge in data["merges"]:
        (x1, y1), (x2, y2) = places[merge["left"]], places[merge["right"]]
        x, y = (x1 + x2) / 2, merge["number"]
        places.append((x, y))
        axes.plot([x1, x1, x2, x2], [y1, y, y, y2], color=BLUE, linewidth=1.2)
        small = {"ha": "left", "va": "top", "fontsize": 7, "color": GREY}
        axes.text(x1 + 0.1, y * 0.93, f"{y:,}", **small)
        if "<" not in merge["text"]:
            paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
            place = {"ha": "center", "va": "bottom", "zorder": 3}
            axes.text(x, y * 1.12, merge["text"], fontsize=11, bbox=paper, **place)
    axes.set_yscale("log")
    axes.set_ylim(0.4, 4000)
    axes.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
    axes.set_ylabel("merge")
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
