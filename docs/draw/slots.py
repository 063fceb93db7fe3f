"""The slots of one word of the demo while it is merged: 月亮为什么有时圆."""

import numpy as np

from docs.draw import BLUE, GREY
from examples import small
from nanophi.tokenizer.fast.merges import DEAD, Trainer
from nanophi.tokenizer.fast.words import count_words

WORD = "月亮为什么有时圆"
SIZE = (8, 4.4)


def data() -> dict:
    """rows: how many merges there are, and the tokens of the word as [first slot, slots, text]."""
    tok = small.tokenizer()
    names = ("documents", "sft", "rephrased", "dpo")
    counted = count_words([text for name in names for text in small.texts(name)], tok.level)
    ids = {symbol: i for i, symbol in enumerate(counted.alphabet())}
    slots, weights = counted.lay_out(ids)
    word = np.array([ids[symbol] for symbol in tok.level.symbols(WORD)], np.uint16)
    windows = np.lib.stride_tricks.sliding_window_view(slots, len(word))
    at = int(np.flatnonzero((windows == word).all(axis=1))[0])
    rows: list[list] = []

    class Watched(Trainer):
        def _merge(self, batch):
            merged = super()._merge(batch)
            tokens = tokens_of(self, at, len(word), tok)
            if not rows or tokens != rows[-1][1]:
                rows.append([len(self.merges), tokens])
            return merged

    trainer = Watched(slots, weights, len(ids), len(tok.merge_list), min_frequency=2)
    rows.append([0, tokens_of(trainer, at, len(word), tok)])
    trainer.run()
    return {"slots": len(word), "rows": rows}


def tokens_of(trainer: Trainer, at: int, size: int, tok) -> list[list]:
    """[first slot, number of slots, text] of the tokens in slots[at : at + size]."""
    tokens = []
    place = 0
    while place < size:
        symbol = int(trainer.slots[at + place])
        assert symbol != DEAD
        length = int(trainer.length[symbol])
        first_id = len(tok.added)  # the tokenizer has its special tokens before the bytes
        tokens.append([place, length, tok.piece(first_id + symbol)])
        place += length
    return tokens


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    rows = data["rows"]
    tokens = [(y, *token) for y, (_, row) in enumerate(rows) for token in row]
    longer = [token for token in tokens if token[2] > 1]
    single = [(y, place + 0.5, place + 0.5) for y, place, length, _ in tokens if length == 1]
    inside = [(y, place + 0.5, place + length - 0.5) for y, place, length, _ in longer]
    ends = [(y, x, x) for y, *both in inside for x in both]
    segments(axes, single, 0.34, color="#e6eaee", linewidth=13)
    segments(axes, inside, 0, color=GREY, linewidth=1)
    segments(axes, ends, 0.34, color="#e8a973", linewidth=13)
    for _, place, _, text in (token for token in tokens if token[0] == 0):
        byte = text.strip("<>")
        axes.text(place + 0.5, 0, byte, ha="center", va="center", fontsize=7, color="#57606a")
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 0.6}
    before: set = set()
    for y, (_, row) in enumerate(rows):
        for place, length, text in row:
            if length > 1 and "<" not in text and text not in before:  # named when it is new
                style = {"ha": "center", "va": "center", "color": BLUE, "bbox": paper}
                axes.text(place + length / 2, y, text, **style)
        before |= {text for _, _, text in row}
    axes.set_yticks(range(len(rows)), [f"{merges:,}" for merges, _ in rows])
    axes.set_ylabel("merges so far")
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.2, data["slots"] + 0.2)
    axes.set_xticks([])
    axes.spines[["bottom", "left"]].set_visible(False)
    axes.tick_params(length=0)


def segments(axes, lines: list, more: float, **style) -> None:
    """Horizontal lines (y, from, to), longer by `more` at both ends, as one path: a small file."""
    x, y = [], []
    for height, start, stop in lines:
        x += [start - more, stop + more, np.nan]
        y += [height] * 3
    axes.plot(x, y, solid_capstyle="butt", **style)
