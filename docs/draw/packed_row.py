"""A packed row of questions, and which token sees which."""

from itertools import pairwise

import nanophi
from docs.draw import BLUE, GREEN, GREY, ORANGE
from examples import small

SIZE = (6.4, 6.2)
CONTEXT = 24
COLOURS = (BLUE, ORANGE, GREEN, "#8250df", "#bf3989")


def data() -> dict:
    tok = small.tokenizer()
    questions = [turns[0]["content"] for turns in small.conversations()]
    documents = [[*tok.encode(text), tok.eos_id] for text in questions]
    packed = nanophi.Packed(documents, context=CONTEXT, batch_rows=4, seed=0)
    wanted = tok.encode("月亮")[0]
    rows = (packed.batch([row]) for row in range(len(packed)))
    batch = next(batch for batch in rows if wanted in batch.ids[0])
    return {
        "tokens": [tok.decode([token]) for token in batch.ids[0].tolist()],
        "borders": batch.cu_seqlens.tolist(),
        "learned": batch.learned.tolist(),
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    tokens = data["tokens"]
    for number, (begin, end) in enumerate(pairwise(data["borders"])):
        is_padding = begin not in data["learned"]
        colour = GREY if is_padding else COLOURS[number % len(COLOURS)]
        corners = [(begin, begin), (begin, end), (end, end)]
        for place in range(end - 1, begin - 1, -1):  # stairs, from the lower right to the start
            corners += [(place + 1, place), (place, place)]
        axes.fill(*zip(*corners, strict=True), color=colour, alpha=0.75, linewidth=0)
    for border in data["borders"]:
        axes.axhline(border, color=GREY, linewidth=0.8)
        axes.axvline(border, color=GREY, linewidth=0.8)
    places = [place + 0.5 for place in range(len(tokens))]
    axes.set_xticks(places, tokens, rotation=90, fontsize=9)
    axes.set_yticks(places, tokens, fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlim(0, len(tokens))
    axes.set_ylim(len(tokens), 0)
    axes.set_aspect("equal")
    axes.set_xlabel("key")
    axes.set_ylabel("query")
