"""Draw the losses of runs as a picture, and tell whether a run's loss is as it should be.

    python -m nanophi.train.plot out/pretrain out/other --out loss.png
    python -m nanophi.train.plot out/demo/pretrain --compare docs/reference/demo-pretrain.json

A run writes one line of JSON per step into metrics.jsonl:

    {"step": 100, "loss": 3.41, "lr": 0.006, ..., "val_loss": 3.52}

A reference is the band in which runs of several seeds lay. At each step it holds the lowest and the
highest of their smoothed losses, with 2 % added on both sides, and the settings and versions that
gave them. `--reference FILE` makes one.

    loss │ ▒▒▒
         │  ▒▒▒▒▒            ▒ the band: a run of other seeds, and of the same settings, lies in it
         │     ▒▒▒▒▒▒▒▒
         └────────────── step

Read in this order: reading a run, the picture, the reference, the command.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nanophi.claims import Output, claim
from nanophi.cli import UserError, flag, run_command
from nanophi.expect import Expected, check_fields, parse_json, read_json
from nanophi.files import replacing, together, write_text

MARGIN = 0.02  # added on both sides of a band, as a share of the loss

# What is drawn beside the loss, where a run has it: key in metrics.jsonl -> (line style, label).
OTHER_CURVES = {
    "val_loss": ("o", "validation loss"),
    "margin": ("--", "reward margin"),
    "rewards_chosen": (":", "reward of chosen"),
    "rewards_rejected": ("-.", "reward of rejected"),
}

# Settings that say where files lie, or in which runs of one reference differ.
NOT_OF_A_REFERENCE = {
    "out",
    "data",
    "val_data",
    "tokenizer",
    "init_from",
    "seed",
    "overwrite",
    "resume",
}


# ---- reading a run


LARGEST_LOSS = 1e30  # sums of larger ones overflow

LOSS = Expected(float, at_least=-LARGEST_LOSS, at_most=LARGEST_LOSS, optional=True)
LINE = {"step": Expected(int, at_least=0), "loss": LOSS, **dict.fromkeys(OTHER_CURVES, LOSS)}


def metrics_lines(path: Path) -> Iterator[tuple[int, str, dict | None]]:
    """Number, text and content of each line of a metrics.jsonl.

    The content is None where the line is damaged. Half a line at the end, which a killed run or a
    full disk leaves, is passed over.
    """
    lines = path.read_bytes().split(b"\n")
    for number, raw in enumerate(lines, start=1):
        line = line_of(raw)
        is_half = line is None and number == len(lines)
        if raw.strip() and not is_half:
            yield number, raw.decode("utf-8", "replace"), line


def line_of(raw: bytes) -> dict | None:
    """What a line of metrics.jsonl holds; None where it is none.

    >>> line_of(b'{"step": 7, "loss": null}')
    {'step': 7, 'loss': None}
    >>> line_of(b'{"step": "7"}')
    """
    try:
        line = parse_json(raw.decode("utf-8"))
        check_fields(line, LINE, "")
    except ValueError:
        return None
    return line if "loss" in line else None


def read_metrics(run_dir: str | Path) -> list[dict]:
    """The lines of a run's metrics.jsonl that can be read; a UserError where there is no such
    file.
    """
    path = Path(run_dir) / "metrics.jsonl"
    if not path.is_file():
        raise UserError(f"{run_dir} is no run: it has no metrics.jsonl")
    return [line for _, _, line in metrics_lines(path) if line is not None]


def steps_with_loss(run_dir: str | Path) -> list[dict]:
    """The lines of a run without those whose loss is null: it was infinite or nan there. A
    UserError where none is left.
    """
    lines = [line for line in read_metrics(run_dir) if line["loss"] is not None]
    if not lines:
        raise UserError(
            f"{Path(run_dir) / 'metrics.jsonl'} has no line with a step and a finite loss"
        )
    return lines


def note_on_damage(run_dir: str | Path) -> None:
    """Say how many lines of a run's metrics cannot be read."""
    path = Path(run_dir) / "metrics.jsonl"
    damaged = [number for number, _, line in metrics_lines(path) if line is None]
    if damaged:
        print(
            f"note: {len(damaged):,} lines of {path} (the first is line {damaged[0]:,}) cannot be "
            "read and are left out"
        )


def smooth(values: list[float], window: int) -> list[float]:
    """Mean over the last `window` values, over fewer at the start.

    >>> smooth([1, 2, 3, 4], window=2)
    [1.0, 1.5, 2.5, 3.5]
    """
    means = []
    for end in range(1, len(values) + 1):
        part = values[max(0, end - window) : end]
        means.append(sum(part) / len(part))
    return means


def smoothed_losses(lines: list[dict]) -> list[float]:
    """The loss of each line, averaged over the last fortieth of all lines."""
    losses = [line["loss"] for line in lines]
    return smooth(losses, window=max(len(losses) // 40, 1))


def smoothed_curve(run_dir: str | Path) -> dict[int, float]:
    """Step -> smoothed loss of a run."""
    lines = steps_with_loss(run_dir)
    steps = [line["step"] for line in lines]
    return dict(zip(steps, smoothed_losses(lines), strict=True))


# ---- the picture


def draw(panels: dict[str, list[str | Path]], out: str | Path, band: dict | None = None) -> None:
    """Write a .png with one panel for each title, side by side.

    panels: title -> run directories, drawn over each other
    band: a reference, drawn as a grey area
    """
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(5.2 * len(panels), 3.8), squeeze=False, layout="constrained"
    )
    for axis, (title, runs) in zip(axes[0], panels.items(), strict=True):
        draw_panel(axis, title, runs, band)
    with replacing(out) as beside:
        figure.savefig(beside, format="png", dpi=110)
    pyplot.close(figure)


def import_pyplot():
    """matplotlib.pyplot, set up to write files and to open no window."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'nanophi[plot]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw_panel(axis, title: str, runs: list[str | Path], band: dict | None) -> None:
    """Draw the curves of all runs, the band, and the labels of one panel."""
    for number, run_dir in enumerate(runs):
        lines = steps_with_loss(run_dir)
        draw_run(axis, label_of(run_dir), lines, color=f"C{number}")
    if band is not None:
        axis.fill_between(
            band["steps"], band["low"], band["high"], color="0.5", alpha=0.25, label="reference"
        )
    # A panel holds runs of one kind, so the last one tells the unit of all. DPO's loss is per pair.
    is_dpo = any("margin" in line for line in lines)
    axis.set(title=title, xlabel="step", ylabel="loss" if is_dpo else "loss (nats per token)")
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)


def label_of(run_dir: str | Path) -> str:
    """A run's name in the legend, where $ would begin a formula and _ hide the line.

    >>> label_of("out/_a$b")
    ' _a\\\\$b'
    """
    name = Path(run_dir).resolve().name
    text = name.encode("utf-8", "replace").decode()  # a name that is no text has ? there
    return " " * text.startswith("_") + text.replace("$", r"\$")


def draw_run(axis, name: str, lines: list[dict], color: str) -> None:
    """Draw one run: the loss pale, the smoothed loss, validation loss as dots, DPO's margin
    dashed.
    """
    steps = [line["step"] for line in lines]
    losses = [line["loss"] for line in lines]
    axis.plot(steps, losses, color=color, alpha=0.25, linewidth=0.8)
    axis.plot(steps, smoothed_losses(lines), color=color, label=f"{name}: loss, smoothed")
    for key, (style, label) in OTHER_CURVES.items():
        measured = [line for line in lines if line.get(key) is not None]
        if measured:
            x = [line["step"] for line in measured]
            y = [line[key] for line in measured]
            axis.plot(x, y, style, color=color, markersize=4, label=f"{name}: {label}")


# ---- the reference


def make_reference(runs: list[str]) -> dict:
    """The band of several runs of the same settings, as a dict for JSON."""
    curves = [smoothed_curve(run_dir) for run_dir in runs]
    steps = sorted(set.intersection(*map(set, curves)))
    if not steps:
        raise UserError("the runs of a reference have no step in common: take runs of one length")
    lows = [min(curve[step] for curve in curves) for step in steps]
    highs = [max(curve[step] for curve in curves) for step in steps]

    records = [read_record(run_dir) for run_dir in runs]
    settings = records[0]["config"]
    return {
        "seeds": [record["config"]["seed"] for record in records],
        "versions": records[0]["versions"],
        "config": {
            name: value for name, value in settings.items() if name not in NOT_OF_A_REFERENCE
        },
        "steps": steps,
        "low": [round(low * (1 - MARGIN), 4) for low in lows],
        "high": [round(high * (1 + MARGIN), 4) for high in highs],
    }


def read_record(run_dir: str | Path) -> dict:
    """The run.json of a run: its settings and versions."""
    path = Path(run_dir) / "run.json"
    record = read_json(path, "a run writes it when it begins")
    check_fields(record, {"config": Expected(dict), "versions": Expected(dict)}, path)
    check_fields(record["config"], {"seed": Expected(int)}, f"{path}: config")
    return record


BAND = {
    "steps": Expected(list, of=Expected(int, at_least=0)),
    "low": Expected(list, of=Expected(float, at_least=-LARGEST_LOSS, at_most=LARGEST_LOSS)),
    "high": Expected(list, of=Expected(float, at_least=-LARGEST_LOSS, at_most=LARGEST_LOSS)),
}


def read_reference(path: str | Path) -> dict:
    """A reference that `write_reference` has written; a UserError where it is none."""
    advice = "it is no reference, which --reference writes"
    reference = read_json(path, advice)
    check_fields(reference, BAND, path, advice)
    lengths = {name: len(reference[name]) for name in BAND}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: steps, low and high have {lengths} entries; {advice}")
    return reference


def write_reference(path: str, reference: dict) -> None:
    """Write a reference as JSON with one line for each key, however long its list is."""
    lines = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in reference.items()]
    write_text(path, "{\n" + ",\n".join(lines) + "\n}\n")


def compare(run_dir: str, reference: dict) -> str:
    """One sentence: whether a run is inside of the band, and otherwise where it leaves it.

    A run is inside when its last step is, and at least 95 % of the steps that both have.
    """
    curve = smoothed_curve(run_dir)
    band = zip(reference["steps"], reference["low"], reference["high"], strict=True)
    common = [(step, curve[step], low, high) for step, low, high in band if step in curve]
    if not common:
        raise UserError(f"{run_dir} and the reference have no step in common")

    outside = []
    for step, loss, low, high in common:
        if not low <= loss <= high:
            outside.append((step, "above" if loss > high else "below"))

    step, loss, low, high = common[-1]
    last = f"at step {step:,} {loss:.3f}, the band is {low:.3f} to {high:.3f}"
    if len(outside) <= len(common) / 20 and low <= loss <= high:
        return f"{run_dir}: inside the band ({last})"
    first, side = outside[0]
    share = f"in {len(outside):,} of {len(common):,} steps"
    return f"{run_dir}: OUTSIDE the band {share}, first {side} it at {first:,} ({last})"


# ---- the command


@dataclass(kw_only=True)
class Config:
    runs: list[str] = flag(positional=True, help="run directories, drawn over each other")
    out: str = flag("loss.png", help="the picture to write")
    compare: str | None = flag(
        None, help="a reference (.json): also say whether the runs are inside its band"
    )
    reference: str | None = flag(
        None, help="write a reference made of these runs, which differ only in the seed"
    )


def main(cfg: Config) -> None:
    import_pyplot()  # where it is missing, say so first
    inputs = [
        Path(run_dir) / name for run_dir in cfg.runs for name in ("metrics.jsonl", "run.json")
    ]
    if cfg.compare is not None:
        inputs.append(Path(cfg.compare))
    outputs = (
        Output("--out", cfg.out, suffix=".png"),
        Output("--reference", cfg.reference, suffix=".json", begins=b"{"),
    )
    with claim(inputs, *outputs):
        for run_dir in cfg.runs:
            steps_with_loss(run_dir)  # a UserError where there is nothing to draw
            note_on_damage(run_dir)
        reference = make_reference(cfg.runs) if cfg.reference is not None else None
        band = read_reference(cfg.compare) if cfg.compare is not None else None
        verdicts = [compare(run_dir, band) for run_dir in cfg.runs] if band is not None else []
        with together():
            if cfg.reference is not None and reference is not None:
                write_reference(cfg.reference, reference)
            draw({"training loss": list(cfg.runs)}, cfg.out, band)
    if reference is not None:
        print(f"plot: a reference of {len(cfg.runs)} runs -> {cfg.reference}")
    for verdict in verdicts:
        print(verdict)
    print(f"plot: {len(cfg.runs)} runs -> {cfg.out}")


if __name__ == "__main__":
    run_command(Config, main)
