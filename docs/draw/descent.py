"""Three ways down the same valley: gradient descent with a small and a large rate, and AdamW."""

import torch

from docs.draw import BLUE, GREEN, GREY, ORANGE

STEPS = 30
STEEP = 20.0  # how much steeper the valley is across than along
START = (-4.0, 1.0)


def height(x, y):
    return (x**2 + STEEP * y**2) / 2


def path(make_optimizer) -> list[list[float]]:
    point = torch.tensor(START, dtype=torch.float64, requires_grad=True)
    optimizer = make_optimizer([point])
    places = [list(START)]
    for _ in range(STEPS):
        optimizer.zero_grad()
        height(*point).backward()
        optimizer.step()
        places.append([round(value, 3) for value in point.tolist()])
    return places


def data() -> dict:
    sgd = torch.optim.SGD
    return {
        "gradient, rate 0.02": path(lambda point: sgd(point, lr=0.02)),
        "gradient, rate 0.095": path(lambda point: sgd(point, lr=0.095)),
        "AdamW, rate 0.3": path(lambda point: torch.optim.AdamW(point, lr=0.3, betas=(0.9, 0.95))),
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    xs = [-4.6 + 0.05 * i for i in range(125)]
    ys = [-1.3 + 0.05 * i for i in range(53)]
    levels = [0.05, 0.5, 1.5, 3, 5, 8, 12]
    heights = [[height(x, y) for x in xs] for y in ys]
    axes.contour(xs, ys, heights, levels=levels, colors=GREY, linewidths=0.5)
    for (name, places), colour in zip(data.items(), (BLUE, ORANGE, GREEN), strict=True):
        axes.plot(*zip(*places, strict=True), marker=".", color=colour, linewidth=1, label=name)
    axes.set_xlabel("w1")
    axes.set_ylabel("w2")
    axes.legend(frameon=False, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3)
