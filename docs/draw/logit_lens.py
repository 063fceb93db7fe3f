"""What the model would say after each layer: the probability of the right next token."""

import torch

import nanophi
from examples import small

SIZE = (7.4, 2.9)
SHOWN = 14  # tokens of the answer


def data() -> dict:
    tok = small.tokenizer()
    model = small.model("sft")
    ids, mask = nanophi.encode_chat(small.conversations()[0], tok)
    first = mask.index(True)
    places = range(first, first + SHOWN)
    record = nanophi.Record()
    with torch.no_grad():
        model(torch.tensor([ids]), record=record)
        logits = [model.lm_head(model.model.final_layernorm(x))[0] for x in record.hidden]
    return {
        "tokens": [tok.decode([ids[place]]) for place in places],
        "probabilities": [
            [round(layer.softmax(-1)[place - 1, ids[place]].item(), 3) for place in places]
            for layer in logits
        ],
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    rows = data["probabilities"]
    axes.imshow(rows, cmap="Blues", vmin=0, vmax=1, aspect="auto", origin="lower")
    for layer, row in enumerate(rows):
        for place, value in enumerate(row):
            colour = "white" if value > 0.5 else "black"
            axes.text(place, layer, f"{value:.2f}", ha="center", va="center", color=colour, size=8)
    axes.set_xticks(range(len(data["tokens"])), data["tokens"])
    layers = ["embedding", *(f"layer {number}" for number in range(1, len(rows)))]
    axes.set_yticks(range(len(rows)), layers)
    axes.tick_params(length=0)
