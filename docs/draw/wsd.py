"""The learning rate of 100 steps under the three schedules."""

from docs.draw import BLUE, GREY, ORANGE
from nanophi.train.optim import SCHEDULES, schedule

STEPS = 100


def data() -> dict:
    return {
        name: [schedule(name, step, STEPS, warmup=10) for step in range(STEPS)]
        for name in SCHEDULES
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    for (name, rates), colour in zip(data.items(), (BLUE, ORANGE, GREY), strict=False):
        axes.plot(rates, label=name, color=colour)
    axes.set_xlabel("step")
    axes.set_ylabel("learning rate / peak")
    axes.set_ylim(0, 1.05)
    axes.legend(frameon=False)
