"""The directory of a training run: what it holds, when it may be written, how it is saved and resumed.

<out>/                   the newest state: a checkpoint directory, train_state.pt, metrics.jsonl, run.json
<out>/step-000500/       older ones that are kept, complete
<out>/best/              the model of the lowest validation loss
<out>-early/             the model of --keep-at, whose answers DPO may reject
"""

import contextlib
import json
import math
import os
import pickle
import shutil
from dataclasses import asdict
from pathlib import Path

import torch

from nanophi.cli import UserError, peak_memory_gb
from nanophi.files import replacing, write_text
from nanophi.model import checkpoint
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import World, computes_in, is_first, part_like, put_together
from nanophi.train.packing import Batch
from nanophi.train.preflight import contradictions

STATE = "train_state.pt"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"

FIRST_SCALE = 32.0  # of an fp16 loss, which is a sum over tokens: 2,048 of them make it the usual 65,536 of a mean
GROW_AFTER = 1000  # sound steps

# What a resumed run may have otherwise than the one it goes on with; anything else would change the result.
MAY_DIFFER = {
    "out",
    "steps",
    "epochs",
    "micro_batch",
    "device",
    "save_every",
    "keep",
    "eval_every",
    "overwrite",
}
MAY_DIFFER |= {
    "save_minutes",
    "keep_going",
    "recompute",
    "shard",
    "show_batch",
    "overfit_one_batch",
    "sample",
}
MAY_DIFFER |= {
    "keep_at",
    "resume",
    "data",
    "val_data",
    "tokenizer",
    "init_from",
}  # paths; data_id names what they hold


def claim(cfg) -> None:
    """Refuse flags that contradict each other, and an --out that holds a run unless it is to be resumed or overwritten;
    scripts call it before long work. cfg: a TrainConfig (loop.py)."""
    if found := contradictions(cfg):
        raise UserError("; ".join(found))
    out = Path(cfg.out)
    if not is_first() or cfg.show_batch or cfg.overfit_one_batch:
        return  # what rank 0 has begun to write would look like another run; the self-tests write nothing
    holds = [path.name for path in files_of_a_run(out) if path.exists()]
    if cfg.resume == "yes" and STATE not in holds:
        raise UserError(f"nothing to resume in {out}: no {STATE}; --resume auto would start afresh")
    models = [name for name in holds if name == checkpoint.WEIGHTS or name.startswith("step-")]
    if cfg.resume == "auto" and models and STATE not in holds and not cfg.overwrite:
        raise UserError(
            f"{out} holds {models[0]} without a {STATE}: there is nothing to resume, name another --out"
        )
    if cfg.resume is None and holds and not cfg.overwrite:
        raise UserError(
            f"{out} holds a run ({', '.join(holds)}): --resume goes on with it, --overwrite deletes it"
        )
    start = getattr(cfg, "init_from", None)
    if start is not None and Path(start).resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"--out {out} is or holds --init-from {start}: training would overwrite what it starts from"
        )


def files_of_a_run(out: Path) -> list[Path]:
    """What tells that a directory holds a run; the state last, so that an interrupted deletion is still seen."""
    return [
        *out.glob("step-*"),
        out / "best",
        out / BOARD,
        out / METRICS,
        out / checkpoint.WEIGHTS,
        out / STATE,
    ]


class Run:
    """The state of a run and its files."""

    def __init__(
        self, model: Phi, optimizers, cfg, tok: Tokenizer | None, data_id: str, world: World
    ):
        self.model, self.optimizers, self.tok, self.world = model, optimizers, tok, world
        self.out, self.keep = Path(cfg.out), cfg.keep
        # What fixes the result beside the step; strings, so that the state loads with weights_only=True.
        self.settings = {
            name: str(value) for name, value in asdict(cfg).items() if name not in MAY_DIFFER
        }
        self.settings |= {
            "model": str(model.cfg),
            "data": data_id,
            "dtype": computes_in(cfg, world.device),
        }
        self.board = None  # TensorBoard, from `open_board` on
        self.step, self.tokens, self.seconds, self.best, self.skipped = 0, 0, 0.0, float("inf"), 0
        self.fp16 = self.settings["dtype"] == "float16"
        self.scale, self.unbroken = (
            (FIRST_SCALE if self.fp16 else 1.0),
            0,
        )  # of the loss; steps since it changed
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def open_board(self) -> None:
        """Write for TensorBoard too, where that is installed; what a killed run wrote beyond this step is hidden."""
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.out / BOARD), purge_step=self.step + 1)

    @property
    def cuda(self) -> bool:
        return self.world.device.startswith("cuda")

    def update(self, factor: float, sound: bool) -> float:
        """One step of every optimizer at `factor` times its peak learning rate; returns the first group's rate.

        sound: loss and gradient are finite; otherwise the step is skipped and counted. In fp16 the loss is then scaled
        by less, and by more after GROW_AFTER sound steps (Micikevicius et al. 2018, section 3.2).
        """
        self.skipped += not sound
        self.unbroken = self.unbroken + 1 if sound else 0
        if self.fp16 and not sound:
            self.scale /= 2
        elif self.fp16 and self.unbroken == GROW_AFTER:
            self.scale, self.unbroken = self.scale * 2, 0
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            if sound:
                optimizer.step()
        return self.optimizers[0].param_groups[0]["lr"]

    def count(self, line: dict, batch: Batch, seconds: float) -> None:
        """Advance the counters and complete the step's line of metrics."""
        self.step += 1
        self.tokens += batch.real_tokens
        self.seconds += seconds
        line |= {"step": self.step, "tokens": self.tokens, "seconds": round(self.seconds, 3)}
        memory = torch.cuda.max_memory_allocated() / 1e9 if self.cuda else peak_memory_gb()
        line |= {"tokens_per_s": round(batch.real_tokens / seconds, 1), "skipped": self.skipped}
        line["memory_gb"] = round(memory, 3)

    def log(self, line: dict) -> None:
        """Append the step to metrics.jsonl; keep the model where it is the best so far. All ranks call it."""
        if line.get("val_loss", float("inf")) < self.best:
            self.best = line[
                "val_loss"
            ]  # before what may fail on rank 0 alone, or sharded ranks would part here
            self.export(self.out / "best")
        if self.world.first:
            self._write_line(line)

    def export(self, directory: str | Path) -> None:
        """The model as a checkpoint directory. All ranks of a sharded run call it."""
        weights = put_together(self.model.state_dict(), keep=self.world.first)
        if self.world.first:
            checkpoint.save(directory, self.model, self.tok, weights)

    def _write_line(self, line: dict) -> None:
        first = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds")
        ordered = {name: line[name] for name in first} | line
        ordered = {
            name: value if math.isfinite(value) else None for name, value in ordered.items()
        }  # JSON has no NaN
        with open(self.out / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(ordered) + "\n")
        if self.board is not None:
            for name, value in ordered.items():
                if value is not None and name != "step":
                    self.board.add_scalar(name, value, self.step)

    def save(self) -> None:
        """Keep the state that is there as step-..., then replace it file by file. train_state.pt alone is what a
        resume reads, and it writes the others again, so a kill between two files harms nothing. All ranks call it
        together, as each has a random state; rank 0 writes, and the others wait and hear of what goes wrong."""
        rng = self.world.gather(
            (torch.get_rng_state(), torch.cuda.get_rng_state() if self.cuda else None)
        )
        weights = put_together(self.model.state_dict(), self.world.first)
        optimizers = put_together(
            [optimizer.state_dict() for optimizer in self.optimizers], self.world.first
        )
        problem = None
        if self.world.first:
            try:
                self._write(rng, weights, optimizers)
            except (UserError, OSError) as error:
                problem = error
        if self.world.gather(problem)[0] is not None:
            raise problem or UserError("rank 0 could not save")

    def _write(self, rng: list, weights: dict, optimizers: list) -> None:
        self._keep_previous()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "skipped": self.skipped,
            "scale": [self.scale, self.unbroken],
            "settings": self.settings,
            "model": weights,
            "optimizers": optimizers,
            "rng": rng,
        }
        with replacing(self.out / STATE) as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as error:  # a full disk, for one
                raise UserError(f"cannot write {self.out / STATE}: {error}") from None
        checkpoint.save(self.out, self.model, self.tok, weights)

    def _keep_previous(self) -> None:
        for leftover in self.out.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        if self.keep and (self.out / STATE).exists():
            previous = torch.load(
                self.out / STATE, weights_only=True, mmap=True, map_location="cpu"
            )["step"]
            target = self.out / f"step-{previous:06d}"
            if previous != self.step and not target.exists():
                beside = target.with_suffix(".tmp")
                beside.mkdir()
                for file in self.out.iterdir():
                    if file.is_file() and file.suffix != ".tmp" and file.name != METRICS:
                        _link(file, beside / file.name)
                write_text(beside / METRICS, _metrics_until(self.out / METRICS, previous))
                os.replace(beside, target)
        for old in sorted(self.out.glob("step-*"), key=lambda path: int(path.name[5:]))[
            : -self.keep or None
        ]:
            shutil.rmtree(old)

    def restore(self, steps: int) -> None:
        """Load train_state.pt, refuse one of other data or settings, and write the files that may be older or newer."""
        path = self.out / STATE
        try:
            state = torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} is damaged ({error}); an older state may lie in {self.out}/step-*"
            ) from None
        theirs = state["settings"]
        different = [
            f"{name} was {theirs.get(name)}, is {self.settings.get(name)}"
            for name in sorted(theirs.keys() | self.settings.keys())
            if theirs.get(name) != self.settings.get(name)
        ]
        if different:
            raise UserError(
                f"{self.out} cannot be resumed, as this would give another model: {'; '.join(different)}"
            )
        if state["step"] > steps:
            raise UserError(
                f"{self.out} is at step {state['step']:,}, beyond the {steps:,} asked for: raise --steps"
            )
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.best, self.skipped = state["seconds"], state["best"], state["skipped"]
        self.scale, self.unbroken = state["scale"]
        weights = self.model.state_dict()
        self.model.load_state_dict(
            {name: part_like(value, weights[name]) for name, value in state["model"].items()}
        )
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            for index, p in enumerate(
                p for group in optimizer.param_groups for p in group["params"]
            ):
                for name, value in saved["state"].get(index, {}).items():
                    if value.shape == p.shape:  # one number a weight, so sharded as the weight is
                        saved["state"][index][name] = part_like(value, p)
            optimizer.load_state_dict(saved)
        if self.world.rank < len(state["rng"]):  # more ranks than before have seeds of their own
            cpu, cuda = state["rng"][self.world.rank]
            torch.set_rng_state(cpu)
            if cuda is not None and self.cuda:
                torch.cuda.set_rng_state(cuda)
        if not self.world.first:
            return
        write_text(self.out / METRICS, _metrics_until(self.out / METRICS, self.step))
        checkpoint.save(self.out, self.model, self.tok, state["model"])
        print(f"resume: {self.out} at step {self.step:,} of {steps:,}")


def _metrics_until(path: Path, step: int) -> str:
    """The lines of a metrics.jsonl up to a step."""
    kept = ""
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else []:
        with contextlib.suppress(json.JSONDecodeError):  # the last line of a killed run may be half
            if json.loads(line)["step"] <= step:
                kept += line + "\n"
    return kept


def _link(source: Path, target: Path) -> None:
    """A second name for a file that will be replaced, not rewritten; a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
