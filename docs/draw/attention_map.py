"""The attention weights of one head, on the question and the beginning of its answer.

It is the head that is farthest from equal weights. Each weight is multiplied by the number of
visible keys, so that 1 is what equal weights would give.
"""

import torch

import nanophi
from examples import small

SIZE = (7.2, 6.0)
ANSWER = 16  # tokens of the answer


def data() -> dict:
    tok = small.tokenizer()
    model = small.model("sft")
    ids, mask = nanophi.encode_chat(small.conversations()[0], tok)
    ids = ids[: mask.index(True) + ANSWER]
    record = nanophi.Record()
    with torch.no_grad():
        model(torch.tensor([ids]), record=record)
    weights = torch.stack(record.attention)[:, 0]  # (L, H, queries, keys)
    ratios = weights * torch.arange(1, len(ids) + 1)[:, None]
    distance = torch.xlogy(weights, ratios).sum(-1).mean(-1)  # (L, H), Kullback-Leibler
    layer, head = divmod(int(distance.argmax()), distance.shape[1])
    return {
        "layer": layer + 1,
        "head": head + 1,
        "tokens": [tok.decode([token]).replace("\n", "\\n") for token in ids],
        "ratios": [
            [round(ratio, 2) for ratio in row[: query + 1]]
            for query, row in enumerate(ratios[layer, head].tolist())
        ],
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    tokens = data["tokens"]
    rows = [row + [0.0] * (len(tokens) - len(row)) for row in data["ratios"]]
    image = axes.imshow(rows, cmap="Blues", vmin=0, vmax=3)
    figure.colorbar(image, shrink=0.5, label="weight x visible keys", ticks=[0, 1, 2, 3])
    axes.set_xticks(range(len(tokens)), tokens, rotation=90, fontsize=8)
    axes.set_yticks(range(len(tokens)), tokens, fontsize=8)
    axes.tick_params(length=0)
    axes.set_title(f"layer {data['layer']}, head {data['head']}", fontsize=10)
    axes.set_xlabel("key")
    axes.set_ylabel("query")
