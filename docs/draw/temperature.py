"""The first token of the answer at three temperatures: six tokens, and all others together."""

import torch

import nanophi
from docs.draw import BLUE, GREY, ORANGE
from examples import small

TEMPERATURES = (0.5, 1.0, 2.0)
SHOWN = 6  # the likeliest tokens


def data() -> dict:
    tok = small.tokenizer()
    model = small.model("sft").requires_grad_(False)
    prompt = nanophi.chat_prompt(small.QUESTION, tok)
    logits = model(torch.tensor([prompt]))[0, -1]
    likeliest = logits.topk(SHOWN).indices
    shares = {}
    for temperature in TEMPERATURES:
        p = (logits / temperature).softmax(-1)
        shown = p[likeliest].tolist()
        shares[str(temperature)] = [round(share, 3) for share in [*shown, 1 - sum(shown)]]
    return {"tokens": [tok.piece(i) for i in likeliest.tolist()], "shares": shares}


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    colours = (BLUE, GREY, ORANGE)
    for number, (temperature, shares) in enumerate(data["shares"].items()):
        places = [place + 0.27 * (number - 1) for place in range(len(shares))]
        bars = axes.bar(
            places, shares, 0.25, color=colours[number], label=f"temperature {temperature}"
        )
        labels = [f"{share:.2f}" if share > 0.015 else "" for share in shares]
        axes.bar_label(bars, labels, fontsize=8)
    axes.set_xticks(range(SHOWN + 1), [*data["tokens"], "all others"], fontsize=11)
    axes.tick_params(axis="x", length=0)
    axes.set_ylim(0, 1.1)
    axes.set_ylabel("probability")
    axes.legend(frameon=False, loc="upper center")
