"""What one to five Newton-Schulz steps make of a singular value between 0 and 1."""

from docs.draw import GREEN, GREY
from nanophi.train.optim import NS_COEFFICIENTS, NS_STEPS

POINTS = 160
SMALLEST = 1e-4


def data() -> dict:
    a, b, c = NS_COEFFICIENTS
    values = [SMALLEST ** (1 - point / POINTS) for point in range(POINTS + 1)]
    curves = []
    after = values
    for _ in range(NS_STEPS):
        after = [a * x + b * x**3 + c * x**5 for x in after]
        curves.append([round(x, 3) for x in after])
    return {"before": values, "after": curves}


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    count = len(data["after"])
    axes.axhline(1, color=GREY, linewidth=0.5)
    axes.plot(data["before"], data["before"], color=GREY, linestyle=":", label="0 steps")
    for number, curve in enumerate(data["after"], start=1):
        shade = 0.15 + 0.85 * (number / count) ** 2
        axes.plot(data["before"], curve, color=GREEN, alpha=shade, label=f"{number}")
    axes.set_xscale("log")
    axes.set_xlim(data["before"][0], 1)
    axes.set_xlabel("singular value before")
    axes.set_ylabel("after")
    axes.legend(frameon=False, loc="upper left")
