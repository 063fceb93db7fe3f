"""The loss of the small model's pretraining, with the borders of epochs and the mean of each."""

from docs.draw import BLUE, GREY, ORANGE
from examples import small


def data() -> dict:
    losses = small.losses("pretrain")
    steps = round(small.packed_documents().steps_per_epoch)
    epochs = range(0, len(losses), steps)
    return {
        "steps_per_epoch": steps,
        "losses": [round(loss, 3) for loss in losses],
        "means": [round(sum(losses[begin : begin + steps]) / steps, 3) for begin in epochs],
    }


def draw(figure, data: dict) -> None:
    axes = figure.subplots()
    steps = data["steps_per_epoch"]
    for number, mean in enumerate(data["means"]):
        begin = number * steps - 0.5
        axes.axvline(begin, color=GREY, linewidth=0.5)
        label = "mean of the epoch" if number == 0 else None
        axes.plot([begin, begin + steps], [mean, mean], color=ORANGE, linewidth=3, label=label)
    axes.plot(data["losses"], color=BLUE, marker=".", linewidth=0.8, label="loss of the step")
    axes.set_xlabel("step")
    axes.set_ylabel("nats per token")
    axes.set_xlim(-0.5, len(data["losses"]) - 0.5)
    axes.legend(frameon=False)
