"""metrics.jsonl of one or more runs -> a picture.

python -m nanophi.train.plot out/pretrain out/other --out loss.png
"""

import json
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import UserError, flag, run
from nanophi.files import replacing


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run_dir} is no run: it has no metrics.jsonl")
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    return [sum(part) / len(part) for i in range(len(values)) if (part := values[max(0, i - window + 1) : i + 1])]


def draw(panels: dict[str, list[str | Path]], out: str | Path) -> None:
    """One panel per title, with the loss of its runs over their steps; validation loss as dots, DPO's margin dashed."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'nanophi[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        for number, run_dir in enumerate(runs):
            lines, color = read_metrics(run_dir), f"C{number}"
            steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
            axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            name = Path(run_dir).name
            axis.plot(steps, smooth(losses, max(len(losses) // 40, 1)), color=color, label=f"{name}: loss, smoothed")
            for key, style, label in (("val_loss", "o", "validation loss"), ("margin", "--", "reward margin")):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    axis.plot(*zip(*points, strict=True), style, color=color, markersize=4, label=f"{name}: {label}")
        dpo = any("margin" in line for line in lines)
        axis.set(title=title, xlabel="step", ylabel="loss" if dpo else "loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with replacing(out) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)


@dataclass(kw_only=True)
class Config:
    runs: list[str] = flag(positional=True, help="run directories, drawn over each other")
    out: str = flag("loss.png", help="the picture to write")


def main(cfg: Config) -> None:
    draw({"training loss": cfg.runs}, cfg.out)
    print(f"plot: {len(cfg.runs)} runs -> {cfg.out}")


if __name__ == "__main__":
    run(Config, main)
