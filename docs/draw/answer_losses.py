"""A conversation token by token: the loss of each before and after SFT, and which of them count."""

import torch

import nanophi
from docs.draw import BLUE, GREY, ORANGE
from examples import small

SIZE = (8.5, 3.6)
FIRST = 38  # tokens that are shown; then the last two


def data() -> dict:
    tok = small.tokenizer()
    ids, mask = nanophi.encode_chat(small.conversations()[0], tok)
    shown = [*range(1, FIRST), len(ids) - 2, len(ids) - 1]
    losses = {}
    for stage in ("pretrain", "sft"):
        model = small.model(stage).requires_grad_(False)
        log_p = model(torch.tensor([ids]))[0].log_softmax(-1)
        losses[stage] = [round(-log_p[place - 1, ids[place]].item(), 2) for place in shown]
    return {
        "tokens": [tok.piece(ids[place]) for place in shown],
        "learned": [mask[place] for place in shown],
        **losses,
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    places = [float(place) for place in range(len(data["tokens"]))]
    gap = 1.0  # between the beginning of the answer and its last two tokens
    places[-2:] = [place + gap for place in places[-2:]]
    first = data["learned"].index(True)
    axes.axvspan(-0.6, first - 0.5, color=GREY, alpha=0.15, linewidth=0)
    for begin, end, colour, label in (
        (0, first, GREY, "after SFT, not counted"),
        (first, len(places), BLUE, "after SFT, counted"),
    ):
        axes.bar(places[begin:end], data["sft"][begin:end], 0.7, color=colour, label=label)
    axes.plot(places, data["pretrain"], "_", color=ORANGE, markersize=8, label="before SFT")
    labels = ["⏎" if token == "\n" else "\n".join(token) for token in data["tokens"]]
    labels[-1] = "E\nO\nS"
    axes.set_xticks(places, labels, fontsize=9)
    axes.tick_params(axis="x", length=0)
    axes.text(places[-2] - 1, 0.1, "…", ha="center")
    axes.set_xlim(-0.6, places[-1] + 0.6)
    axes.set_ylabel("-ln p, nats")
    axes.legend(frameon=False, loc="upper right")
