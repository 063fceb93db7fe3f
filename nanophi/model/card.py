"""A model card: the README.md that makes a run directory ready to publish.

    python -m nanophi.infer.evaluate --model out/dpo --data held-out.jsonl --report out/dpo
    python -m nanophi.model.card     --model out/dpo --data "Wikipedia, 2 GB, CC BY-SA"

It reads what lies in the directory, and in those of the runs before it:

    config.json, tokenizer.json      what the model is
    run.json, metrics.jsonl          recipe and curve of this run and of those it goes on from
    evaluation.md                    how good it is; from evaluate.py --report

What no file says are the data and their licence: --data and --license.
"""

import json
import math
import shlex
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from nanophi.cli import UserError, flag, run_command
from nanophi.expect import read_json
from nanophi.files import refuse_special, together, write_text
from nanophi.model.checkpoint import load_with_tokenizer
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer

MARK = "<!-- written by nanophi.model.card -->"  # a README.md without it is somebody else's
CURVE = "loss.svg"

LIMITS = """A model of this size repeats itself and invents: nothing it says is advice, and facts in
it have to be checked. It has been taught in Chinese alone. Its data may hold prejudices, and so may
its answers. Who publishes or uses it answers for that."""

# ---- the runs that made a model


@dataclass
class Run:
    """One stage: its settings, and the losses that it logged."""

    directory: Path
    config: dict
    versions: dict
    losses: list[tuple[int, float]]  # (step, loss)
    held_out: list[tuple[int, float]]

    @property
    def command(self) -> str:
        """The command that gives this run, without what says only where and how to write."""
        words = ["python", f"{self.stage}.py"]
        for name, value in self.config.items():
            if value is None or value is False or name in ("out", "overwrite", "resume"):
                continue
            words.append(f"--{name.replace('_', '-')}")
            if value is not True:
                words += map(shown_path, value if isinstance(value, list) else [value])
        return shlex.join(words)

    @property
    def stage(self) -> str:
        """The script, by a flag that it alone has."""
        if "batch_pairs" in self.config:
            return "dpo"
        return "sft" if "learn" in self.config else "pretrain"


def shown_path(value: Any) -> str:
    """A path as a reader may see it: of one from the root, the name alone."""
    text = str(value)
    return Path(text).name if text.startswith("/") else text


def runs_of(directory: Path) -> list[Run]:
    """The run in a directory and those it goes on from, the first one first."""
    runs: list[Run] = []
    seen = set()
    while directory not in seen and (directory / "run.json").is_file():
        seen.add(directory)
        saved = read_json(directory / "run.json")
        config = saved.get("config") if isinstance(saved, dict) else None
        if not isinstance(config, dict):
            raise UserError(f"{directory / 'run.json'} holds no settings of a run")
        lines = metrics_of(directory)
        runs.insert(0, Run(
            directory, config, saved.get("versions") or {},
            points(lines, "loss"), points(lines, "val_loss"),
        ))  # fmt: skip
        directory = Path(str(config.get("init_from") or ""))
    return runs


def metrics_of(directory: Path) -> list[dict]:
    """The lines of metrics.jsonl that can be read; the last one of a killed run may be half."""
    path = directory / "metrics.jsonl"
    if not path.is_file():
        return []
    lines = []
    for text in path.read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except ValueError:
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def points(lines: list[dict], name: str) -> list[tuple[int, float]]:
    values = [(line["step"], line.get(name)) for line in lines]
    return [
        (step, value)
        for step, value in values
        if isinstance(value, int | float) and math.isfinite(value)
    ]


# ---- the picture

WIDTH, HEIGHT, MARGIN, GAP = 820, 260, 44, 24  # pixels
COLOURS = ("#1f6feb", "#d1242f", "#1a7f37")


def curves(runs: list[Run]) -> str:
    """The losses of the runs side by side, as SVG: a line for training, dots for held-out text."""
    runs = [run for run in runs if len(run.losses) > 1]
    if not runs:
        return ""
    each = (WIDTH - MARGIN - GAP * len(runs)) / len(runs)
    parts = []
    for number, run in enumerate(runs):
        left = MARGIN + number * (each + GAP)
        parts += curve(run, left, each, COLOURS[number % len(COLOURS)])
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" '
            'font-family="sans-serif" font-size="12">',
            f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>',
            *parts,
            "</svg>\n",
        ]
    )


def curve(run: Run, left: float, width: float, colour: str) -> list[str]:
    """One panel. Its scale goes from the smallest to the largest loss."""
    values = [loss for _, loss in run.losses + run.held_out]
    low, high = min(values), max(values)
    last = run.losses[-1][0]

    def place(step: int, loss: float) -> tuple[float, float]:
        share = (high - loss) / (high - low or 1)
        return left + width * step / last, MARGIN + (HEIGHT - 2 * MARGIN) * share

    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in run.losses))
    bottom = HEIGHT - MARGIN
    parts = [
        f'<text x="{left:.0f}" y="{MARGIN - 16}">{escape(run.stage)}: {high:.2f} to '
        f"{run.losses[-1][1]:.2f}</text>",
        f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.5"/>',
        f'<line x1="{left:.0f}" y1="{bottom}" x2="{left + width:.0f}" y2="{bottom}" '
        'stroke="#8c959f"/>',
        f'<text x="{left + width:.0f}" y="{bottom + 18}" text-anchor="end">step {last:,}</text>',
    ]
    for step, loss in run.held_out:
        x, y = place(step, loss)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="#1f2328"/>')
    return parts


# ---- the text


def card(
    name: str, model: Phi, tok: Tokenizer, runs: list[Run], evaluation: str, cfg: "Config"
) -> str:
    """The Markdown of a model card, with the head that model hubs read."""
    parameters = sum(p.numel() for p in model.parameters())
    head = {
        "language": "zh",
        "license": cfg.license,
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": "[phi, nanophi]",
    }
    sections = [
        "\n".join(["---", *(f"{key}: {value}" for key, value in head.items()), "---"]),
        f"{MARK}\n\n# {name}",
        f"A Chinese language model with {parameters:,} parameters, made from scratch with nanophi.",
        f"## What it is\n\n{shape_table(model, tok)}",
        f"## How to use it\n\n{usage(name)}",
        f"## Data\n\n{cfg.data}",
        f"## How it was made\n\n{recipe(runs)}",
    ]
    if curves(runs):
        sections.append(f"![the losses of training, and of held-out text as dots]({CURVE})")
    if evaluation:
        sections.append(evaluation.replace("\n## ", "\n### ").replace("# Eval", "## Eval", 1))
    else:
        sections.append("## Evaluation\n\nNone yet.")
    sections.append(f"## Licence and limits\n\nLicence: {cfg.license}.\n\n{LIMITS}")
    return "\n\n".join(section.strip() for section in sections) + "\n"


def shape_table(model: Phi, tok: Tokenizer) -> str:
    cfg = model.cfg
    rows = {
        "architecture": f"{model.architecture}: attention and MLP in parallel, partial rotary",
        "width, heads, layers, MLP": f"{cfg.hidden_size}, {cfg.num_attention_heads}, "
        f"{cfg.num_hidden_layers}, {cfg.intermediate_size}",
        "context": f"{cfg.max_position_embeddings:,} tokens",
        "vocabulary": f"{len(tok):,} tokens, {tok.level.name} level",
        "chat template": tok.template,
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {key} | {value} |" for key, value in rows.items())]
    )


def usage(name: str) -> str:
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tok = AutoTokenizer.from_pretrained("{name}")
model = AutoModelForCausalLM.from_pretrained("{name}")
asked = [{{"role": "user", "content": "你是谁？"}}]
ids = tok.apply_chat_template(asked, return_tensors="pt", return_dict=True)
answer = model.generate(**ids, max_new_tokens=200)[0, ids["input_ids"].shape[1] :]
print(tok.decode(answer, skip_special_tokens=True))
```"""


def recipe(runs: list[Run]) -> str:
    if not runs:
        return "The directory holds no run.json, so nobody knows."
    parts = []
    for run in runs:
        lines = [f"{run.stage}, {run.losses[-1][0]:,} steps" if run.losses else run.stage]
        if run.versions:
            versions = ", ".join(f"{name} {version}" for name, version in run.versions.items())
            lines[0] += f" ({versions})"
        parts.append(f"{lines[0]}:\n\n```bash\n{run.command}\n```")
    return "\n\n".join(parts)


# ---- the command


@dataclass(kw_only=True)
class Config:
    model: str = flag(help="the directory of a model; its README.md is written")
    name: str | None = flag(None, help="what the model is called (default: the directory's name)")
    data: str = flag("Not said.", help="what it was trained on, and who may use that")
    license: str = flag("mit", help="of the weights, by its short name")
    overwrite: bool = flag(False, help="replace a README.md that another hand has written")


def main(cfg: Config) -> None:
    directory = Path(cfg.model)
    path = directory / "README.md"
    for name in (path, directory / CURVE):
        refuse_special(name)
    if path.is_file() and not cfg.overwrite and MARK not in path.read_text(encoding="utf-8"):
        raise UserError(
            f"{path} is there already, and not by this command: --overwrite replaces it"
        )
    model, tok = load_with_tokenizer(cfg.model)
    runs = runs_of(directory)
    evaluation = directory / "evaluation.md"
    text = evaluation.read_text(encoding="utf-8") if evaluation.is_file() else ""
    with together(directory):
        write_text(path, card(cfg.name or directory.resolve().name, model, tok, runs, text, cfg))
        if picture := curves(runs):
            write_text(directory / CURVE, picture)
    missing = "" if text else "; no evaluation.md there: see evaluate.py --report"
    print(f"{path}: {len(runs)} runs{missing}")


if __name__ == "__main__":
    run_command(Config, main)
