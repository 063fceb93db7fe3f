"""The singular values of a real gradient, before and after it is orthogonalized."""

import torch

import nanophi
from docs.draw import BLUE, ORANGE
from examples import small
from nanophi.train.optim import orthogonalize


def data() -> dict:
    model = small.model("pretrain")
    batch = small.packed_documents().batch_at(0)
    loss, count, _ = nanophi.next_token_loss(model, batch)
    (loss / count).backward()
    gradient = model.model.layers[1].self_attn.dense.weight.grad
    assert gradient is not None
    before = torch.linalg.svdvals(gradient)
    after = torch.linalg.svdvals(orthogonalize(gradient[None])[0])
    largest = before / before[0]
    return {
        "before": [round(value, 3) for value in largest.tolist()],
        "after": [round(value, 3) for value in after.tolist()],
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    numbers = range(1, len(data["before"]) + 1)
    axes.plot(numbers, data["after"], color=ORANGE, marker=".", label="after")
    axes.plot(numbers, data["before"], color=BLUE, marker=".", label="before, / the largest")
    axes.set_xlabel("number, by size")
    axes.set_ylabel("singular value")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
