"""The directory of a training run: what it holds, when it may be written, how to save and resume.

    <out>/               the newest state: a checkpoint directory, train_state.pt, metrics.jsonl,
                         run.json
    <out>/step-000500/   an older state, complete
    <out>/best/          the model with the lowest validation loss
    <out>-early/         the model of --keep-at, whose answers DPO may reject

train_state.pt holds all that a resumed run needs (loop.py says why that is so little). The other
files are for people and for other engines.
"""

import contextlib
import json
import math
import os
import pickle
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanophi.cli import UserError, is_first_rank, peak_memory_gb
from nanophi.files import replacing, write_text
from nanophi.model import checkpoint
from nanophi.model.config import PHI
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.config import TrainConfig
from nanophi.train.distributed import part_like, put_together
from nanophi.train.packing import Batch
from nanophi.train.precision import LossScale

if TYPE_CHECKING:  # setup.py imports this file
    from nanophi.train.setup import Setup

STATE = "train_state.pt"
METRICS = "metrics.jsonl"
BOARD = "tensorboard"

# Flags that a resumed run may have otherwise than the run it goes on with: where things lie, how
# they are computed, how often they are saved, and how long the run is.
MAY_DIFFER = {
    *("out", "device", "micro_batch", "recompute", "shard"),
    *(
        "steps",
        "epochs",
        "save_every",
        "save_minutes",
        "keep",
        "keep_at",
        "keep_going",
        "eval_every",
    ),
    *("resume", "overwrite", "show_batch", "overfit_one_batch", "sample"),
    *("data", "val_data", "tokenizer", "init_from"),  # paths: data_id names what they hold
}


# ---- may the directory be written?


def claim(cfg: TrainConfig, starts_from: str | None = None) -> None:
    """Refuse an --out that must not be written.

    It must not hold a run, unless that run is resumed or overwritten; and it must be neither
    `starts_from`, the checkpoint to start from, nor a parent of it.
    """
    out = Path(cfg.out)
    if not is_first_rank() or cfg.show_batch or cfg.overfit_one_batch:
        # What rank 0 has begun to write would look like another run; the self-tests write nothing.
        return
    present = [path.name for path in files_of_a_run(out) if path.exists()]
    models = [name for name in present if name == checkpoint.WEIGHTS or name.startswith("step-")]
    if cfg.resume == "yes" and STATE not in present:
        raise UserError(f"nothing to resume in {out}: no {STATE}; --resume auto would start afresh")
    if cfg.resume == "auto" and models and STATE not in present and not cfg.overwrite:
        raise UserError(
            f"{out} holds {models[0]} without a {STATE}: there is nothing to resume, "
            "name another --out"
        )
    if cfg.resume is None and present and not cfg.overwrite:
        raise UserError(
            f"{out} holds a run ({', '.join(present)}): --resume goes on with it, "
            "--overwrite deletes it"
        )
    if starts_from is not None and Path(starts_from).resolve().is_relative_to(out.resolve()):
        raise UserError(
            f"--out {out} is or holds --init-from {starts_from}: training would overwrite what it "
            "starts from"
        )


def files_of_a_run(out: Path) -> list[Path]:
    """The files whose presence says that a directory holds a run. The state comes last, so that a
    deletion that is interrupted is still seen.
    """
    return [
        *out.glob("step-*"),
        out / "best",
        out / BOARD,
        out / METRICS,
        out / checkpoint.WEIGHTS,
        out / STATE,
    ]


def delete_run(out: Path) -> None:
    """Delete what `files_of_a_run` names."""
    for path in files_of_a_run(out):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


# ---- the run on disk


class RunDirectory:
    """The counters and files of a run. It saves and restores; it takes no step."""

    def __init__(
        self,
        model: Phi,
        optimizers: list[Optimizer],
        scale: LossScale,
        setup: "Setup",
        tok: Tokenizer | None = None,
        data_id: str = "",
    ):
        """data_id names the data: a run can be resumed only with the same data."""
        cfg = setup.cfg
        self.model = model
        self.optimizers = optimizers
        self.scale = scale
        self.tok = tok
        self.world = setup.world
        self.out = Path(cfg.out)
        self.keep = cfg.keep  # older states
        # The settings that decide the result. They are strings, because
        # torch.load(weights_only=True) can read strings.
        self.settings = {
            name: str(value) for name, value in asdict(cfg).items() if name not in MAY_DIFFER
        }
        self.settings |= {
            "model": str(model.cfg),
            "architecture": model.architecture,
            "data": data_id,
            "dtype": setup.dtype,
        }
        # What an older state lacks had these values.
        self.defaults = {field.name: str(field.default) for field in fields(cfg)}
        self.defaults["architecture"] = PHI

        self.step = 0  # optimizer steps done
        self.tokens = 0  # inputs of all steps, without padding
        self.seconds = 0.0  # of all steps
        self.best = float("inf")  # lowest validation loss
        self.skipped = 0  # steps whose loss or gradient was not finite
        self.board: Any = None  # TensorBoard's writer, where that is installed

    def __repr__(self) -> str:
        return f"RunDirectory({self.out}, step {self.step:,}, {self.tokens:,} tokens)"

    @property
    def on_cuda(self) -> bool:
        return self.world.device.startswith("cuda")

    # -- counters and metrics

    def count(self, batch: Batch, finite: bool, seconds: float) -> dict[str, float]:
        """Count one more step; returns the counters as the step's line of metrics has them."""
        tokens = batch.real_tokens
        self.step += 1
        self.tokens += tokens
        self.seconds += seconds
        self.skipped += not finite
        peak_bytes = torch.cuda.max_memory_allocated() if self.on_cuda else None
        memory_gb = peak_memory_gb() if peak_bytes is None else peak_bytes / 1e9
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": round(self.seconds, 3),
            "tokens_per_s": round(tokens / seconds, 1),
            "skipped": self.skipped,
            "memory_gb": round(memory_gb, 3),
        }

    def open_board(self) -> None:
        """Write for TensorBoard too, if it is installed. Later steps of a killed run are hidden."""
        with contextlib.suppress(ImportError):
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(self.out / BOARD), purge_step=self.step + 1)

    def log(self, line: dict[str, float]) -> None:
        """Append a line to metrics.jsonl; keep the model if it is the best. All ranks call it."""
        if line.get("val_loss", float("inf")) < self.best:
            # Do this first, on all ranks: writing the line can fail on rank 0 only, and then the
            # other ranks would have another `best`.
            self.best = line["val_loss"]
            self.export(self.out / "best")
        if self.world.first:
            self._write_line(line)

    def _write_line(self, line: dict[str, float]) -> None:
        first = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds")
        ordered = {name: line[name] for name in first} | line
        finite = {name: value if math.isfinite(value) else None for name, value in ordered.items()}
        with open(self.out / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite) + "\n")  # JSON has no nan: it is null
        if self.board is not None:
            for name, value in finite.items():
                if value is not None and name != "step":
                    self.board.add_scalar(name, value, self.step)

    # -- save

    def export(self, directory: str | Path) -> None:
        """Write the model as a checkpoint directory. All ranks of a sharded run call it."""
        weights = put_together(self.model.state_dict(), keep=self.world.first)
        if self.world.first:
            checkpoint.save(directory, self.model, self.tok, weights)

    def save(self) -> None:
        """Keep the previous state as step-..., then replace it file by file.

        A resume reads only train_state.pt and writes the other files again, so a kill between two
        files harms nothing. All ranks call it together, as each has a random state; rank 0 writes,
        and the others wait and hear what goes wrong.
        """
        cuda_state = torch.cuda.get_rng_state() if self.on_cuda else None
        random_states = self.world.gather((torch.get_rng_state(), cuda_state))
        weights = put_together(self.model.state_dict(), self.world.first)
        optimizer_states = [optimizer.state_dict() for optimizer in self.optimizers]
        optimizer_states = put_together(optimizer_states, self.world.first)
        problem = None
        if self.world.first:
            try:
                self._write(random_states, weights, optimizer_states)
            except (UserError, OSError) as error:
                problem = error
        if self.world.gather(problem)[0] is not None:
            raise problem or UserError("rank 0 could not save")

    def _write(self, random_states: list, weights: dict, optimizer_states: list) -> None:
        self._keep_previous()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "skipped": self.skipped,
            "scale": [self.scale.value, self.scale.unbroken],
            "settings": self.settings,
            "model": weights,
            "optimizers": optimizer_states,
            "rng": random_states,
        }
        with replacing(self.out / STATE) as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as error:  # such as a full disk
                raise UserError(f"cannot write {self.out / STATE}: {error}") from None
        checkpoint.save(self.out, self.model, self.tok, weights)

    def _keep_previous(self) -> None:
        """Link the newest state on disk into step-..., and delete the oldest beyond `keep`."""
        for leftover in self.out.glob("step-*.tmp"):
            shutil.rmtree(leftover)
        if self.keep and (self.out / STATE).exists():
            state = torch.load(self.out / STATE, weights_only=True, mmap=True, map_location="cpu")
            previous = state["step"]
            target = self.out / f"step-{previous:06d}"
            if previous != self.step and not target.exists():
                self._link_state(previous, target)
        kept = sorted(self.out.glob("step-*"), key=lambda path: int(path.name[5:]))
        for old in kept[: -self.keep or None]:
            shutil.rmtree(old)

    def _link_state(self, step: int, target: Path) -> None:
        """Keep the state on disk as a directory of its own, by hard links.

        The next state is written to new files, which are renamed over the old names. So a link
        keeps the old content and costs no space:

            before    out/model.safetensors -> A
            link      out/model.safetensors -> A    out/step-000500/model.safetensors -> A
            save      out/model.safetensors -> B    out/step-000500/model.safetensors -> A
        """
        beside = target.with_suffix(".tmp")
        beside.mkdir()
        for file in self.out.iterdir():
            if file.is_file() and file.suffix != ".tmp" and file.name != METRICS:
                _link(file, beside / file.name)
        write_text(beside / METRICS, _metrics_until(self.out / METRICS, step))
        os.replace(beside, target)

    # -- resume

    def restore(self, steps: int) -> None:
        """Go on from train_state.pt. A state of other data or settings is refused, and one beyond
        `steps`.

        The files beside it may be older or newer, so they are written again.
        """
        state = self._read_state()
        self._check_settings(state["settings"])
        if state["step"] > steps:
            raise UserError(
                f"{self.out} is at step {state['step']:,}, beyond the {steps:,} "
                "asked for: raise --steps"
            )
        self.step = state["step"]
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
        self.best = state["best"]
        self.skipped = state["skipped"]
        self.scale.value, self.scale.unbroken = state["scale"]
        self._restore_weights(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            _restore_optimizer(optimizer, saved)
        self._restore_random_state(state["rng"])
        if self.world.first:
            write_text(self.out / METRICS, _metrics_until(self.out / METRICS, self.step))
            checkpoint.save(self.out, self.model, self.tok, state["model"])
            print(f"resume: {self.out} at step {self.step:,} of {steps:,}")

    def _read_state(self) -> dict:
        path = self.out / STATE
        try:
            return torch.load(path, weights_only=True, map_location="cpu")
        except (RuntimeError, OSError, EOFError, pickle.UnpicklingError) as error:
            raise UserError(
                f"{path} is damaged ({error}); an older state may lie in {self.out}/step-*"
            ) from None

    def _check_settings(self, saved: dict[str, str]) -> None:
        """Refuse settings that would give another model. A flag added later had its default."""
        different = []
        for name in sorted(saved.keys() | self.settings.keys()):
            was = saved.get(name, self.defaults.get(name))
            now = self.settings.get(name)
            if was != now:
                different.append(f"{name} was {was}, is {now}")
        if different:
            raise UserError(
                f"{self.out} cannot be resumed, as this would give another model: "
                f"{'; '.join(different)}"
            )

    def _restore_weights(self, saved: dict[str, Tensor]) -> None:
        current = self.model.state_dict()
        parts = {name: part_like(value, current[name]) for name, value in saved.items()}
        self.model.load_state_dict(parts)

    def _restore_random_state(self, saved: list) -> None:
        """Each rank its own; ranks that are new keep the state of their seed."""
        if self.world.rank >= len(saved):
            return
        cpu_state, cuda_state = saved[self.world.rank]
        torch.set_rng_state(cpu_state)
        if cuda_state is not None and self.on_cuda:
            torch.cuda.set_rng_state(cuda_state)


def _restore_optimizer(optimizer: Optimizer, saved: dict) -> None:
    """Load a saved state. Tensors of the shape of a weight are distributed like it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(parameters):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                saved["state"][index][name] = part_like(value, p)
    optimizer.load_state_dict(saved)


def _metrics_until(path: Path, step: int) -> str:
    """The lines of a metrics.jsonl up to a step, without a half last line."""
    if not path.exists():
        return ""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
    return "".join(kept)


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
