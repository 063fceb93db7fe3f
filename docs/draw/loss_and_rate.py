"""The small model's pretraining: the loss of each step, and below it the learning rate."""

from docs.draw import BLUE, GREY, ORANGE
from examples import small
from nanophi.train.optim import schedule

SIZE = (7, 4)
WINDOW = 12  # steps of the running mean: two epochs


def data() -> dict:
    losses = small.losses("pretrain")
    steps = len(losses)
    return {
        "losses": [round(loss, 3) for loss in losses],
        "means": [
            round(sum(losses[step - WINDOW : step]) / WINDOW, 3)
            for step in range(WINDOW, steps + 1)
        ],
        "rates": [round(schedule("wsd", step, steps, warmup=10), 4) for step in range(steps)],
    }


def draw(figure, data: dict) -> None:
    above, below = figure.subplots(2, sharex=True, height_ratios=(3, 1))
    above.plot(data["losses"], color=BLUE, marker=".", linewidth=0.8, label="loss of the step")
    middles = [step + (WINDOW - 1) / 2 for step in range(len(data["means"]))]
    above.plot(middles, data["means"], color=ORANGE, label=f"mean of {WINDOW} steps")
    above.set_ylabel("nats per token")
    above.legend(frameon=False)
    below.plot(data["rates"], color=GREY)
    below.set_ylim(0, 1.1)
    below.set_ylabel("rate / peak")
    below.set_xlabel("step")
