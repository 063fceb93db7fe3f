"""metrics.jsonl of one or more runs -> a picture, and whether a run's loss is as it should be.

python -m nanophi.train.plot out/pretrain out/other --out loss.png
python -m nanophi.train.plot out/demo/pretrain --compare docs/reference/demo-pretrain.json

A reference is what runs of several seeds had in common: at each step the lowest and the highest of their smoothed
losses, 2 % added on both sides, with the settings and versions that gave them. `--reference FILE` makes one.
"""

import contextlib
import json
from dataclasses import dataclass
from pathlib import Path

from nanophi.cli import UserError, flag, run_command
from nanophi.files import replacing, write_text


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl."""
    path = Path(run_dir) / "metrics.jsonl"
    if not path.exists():
        raise UserError(f"{run_dir} is no run: it has no metrics.jsonl")
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(
            json.JSONDecodeError
        ):  # half a line, of a killed run or a full disk
            found.append(json.loads(line))
    return found


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    return [
        sum(part) / len(part)
        for i in range(len(values))
        if (part := values[max(0, i - window + 1) : i + 1])
    ]


def draw(panels: dict[str, list[str | Path]], out: str | Path, band: dict | None = None) -> None:
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
            lines, color = (
                [line for line in read_metrics(run_dir) if line["loss"] is not None],
                f"C{number}",
            )
            steps, losses = [line["step"] for line in lines], [line["loss"] for line in lines]
            axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
            name = Path(run_dir).name
            axis.plot(
                steps,
                smooth(losses, max(len(losses) // 40, 1)),
                color=color,
                label=f"{name}: loss, smoothed",
            )
            for key, style, label in (
                ("val_loss", "o", "validation loss"),
                ("margin", "--", "reward margin"),
            ):
                points = [(line["step"], line[key]) for line in lines if key in line]
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        style,
                        color=color,
                        markersize=4,
                        label=f"{name}: {label}",
                    )
        if band is not None:
            axis.fill_between(
                band["steps"], band["low"], band["high"], color="0.5", alpha=0.25, label="reference"
            )
        dpo = any("margin" in line for line in lines)
        axis.set(title=title, xlabel="step", ylabel="loss" if dpo else "loss (nats per token)")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    with replacing(out) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)


MARGIN = 0.02  # of a band, beyond what the runs that made it differ


def smoothed(run_dir: str | Path) -> dict[int, float]:
    """Step -> mean loss of the last fortieth of all steps."""
    lines = [line for line in read_metrics(run_dir) if line["loss"] is not None]
    values = smooth([line["loss"] for line in lines], max(len(lines) // 40, 1))
    return {line["step"]: value for line, value in zip(lines, values, strict=True)}


def make_reference(runs: list[str]) -> dict:
    """The band of several runs of the same settings."""
    curves = [smoothed(run_dir) for run_dir in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    told = [
        json.loads((Path(run_dir) / "run.json").read_text(encoding="utf-8")) for run_dir in runs
    ]
    paths = {"out", "data", "val_data", "tokenizer", "init_from", "seed", "overwrite", "resume"}
    return {
        "seeds": [one["config"]["seed"] for one in told],
        "versions": told[0]["versions"],
        "config": {name: value for name, value in told[0]["config"].items() if name not in paths},
        "steps": steps,
        "low": [round(min(curve[step] for curve in curves) * (1 - MARGIN), 4) for step in steps],
        "high": [round(max(curve[step] for curve in curves) * (1 + MARGIN), 4) for step in steps],
    }


def compare(run_dir: str, reference: dict) -> str:
    """Where a run is outside of the band of a reference, in words."""
    curve = smoothed(run_dir)
    band = zip(reference["steps"], reference["low"], reference["high"], strict=True)
    both = [(step, curve[step], low, high) for step, low, high in band if step in curve]
    if not both:
        raise UserError(f"{run_dir} and the reference have no step in common")
    outside = [
        (step, "above" if loss > high else "below")
        for step, loss, low, high in both
        if not low <= loss <= high
    ]
    step, loss, low, high = both[-1]
    last = f"at step {step:,} {loss:.3f}, the band is {low:.3f} to {high:.3f}"
    if len(outside) <= len(both) / 20 and low <= loss <= high:
        return f"{run_dir}: inside the band ({last})"
    first, side = outside[0]
    often = f"in {len(outside):,} of {len(both):,} steps"
    return f"{run_dir}: OUTSIDE the band {often}, first {side} it at {first:,} ({last})"


@dataclass(kw_only=True)
class Config:
    runs: list[str] = flag(positional=True, help="run directories, drawn over each other")
    out: str = flag("loss.png", help="the picture to write")
    compare: str | None = flag(
        None, help="a reference (.json): also say whether the runs are inside its band"
    )
    reference: str | None = flag(
        None, help="write a reference made of these runs, which differ in the seed alone"
    )


def main(cfg: Config) -> None:
    band = None
    if cfg.reference:
        made = (
            f"{json.dumps(name)}: {json.dumps(value)}"
            for name, value in make_reference(cfg.runs).items()
        )
        write_text(
            cfg.reference, "{\n" + ",\n".join(made) + "\n}\n"
        )  # a line for each, long lists too
        print(f"plot: a reference of {len(cfg.runs)} runs -> {cfg.reference}")
    if cfg.compare:
        try:
            band = json.loads(Path(cfg.compare).read_text(encoding="utf-8"))
            verdicts = [compare(run_dir, band) for run_dir in cfg.runs]
        except UserError:
            raise
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{cfg.compare} is no reference: {error}") from None
        print("\n".join(verdicts))
    draw({"training loss": cfg.runs}, cfg.out, band)
    print(f"plot: {len(cfg.runs)} runs -> {cfg.out}")


if __name__ == "__main__":
    run_command(Config, main)
