"""The run on disk: what it counts, saves, and goes on with.

run_files.py says which files a run has. train_state.pt holds all that a resumed run needs (loop.py
says why that is so little); the other files are for people and for other engines.
"""

import contextlib
import json
import math
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from nanophi.cli import SHOWN, UserError, peak_memory_gb
from nanophi.files import OWN_NAMES, replacing, temporary_name, together, write_text
from nanophi.model import checkpoint
from nanophi.model.config import PHI
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train.distributed import is_distributed, part_like, put_together
from nanophi.train.plot import metrics_lines
from nanophi.train.precision import LossScale
from nanophi.train.run_files import (
    BOARD,
    METRICS,
    STATE,
    delete_folder,
    delete_parts,
    early_of,
    older_states,
    split_folder,
)
from nanophi.train.setup import Setup
from nanophi.train.split_state import likes_of, parts_in, put_back, take_out, write_rows
from nanophi.train.state import (
    check_optimizers,
    check_random_states,
    check_weights,
    read_state,
    seal,
)

# Flags that a resumed run may have otherwise than the run it goes on with: where things lie, how
# they are computed, how often they are saved, and how long the run is.
MAY_DIFFER = {
    *("out", "device", "micro_batch", "recompute", "compile", "shard"),
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


class RunDirectory:
    """The counters and files of a run. It saves and restores; it takes no step."""

    def __init__(
        self,
        model: Phi,
        optimizers: list[Optimizer],
        scale: LossScale,
        setup: Setup,
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
        self.early = early_of(self.out)
        self.keep = cfg.keep  # older states
        self.micro_batch = setup.micro_batch
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

        self.saved: int | None = None  # the step of the state on disk, None where there is none
        self.parts: list[Path] = []  # the files of its tensors, where the model is split
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

    def count(self, tokens: int, finite: bool, seconds: float) -> dict[str, float]:
        """Count one more step of so many tokens; returns the counters as the line of the step in
        metrics.jsonl has them.
        """
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

    def log(self, line: dict[str, Any]) -> None:
        """Append a line to metrics.jsonl; keep the model if it is the best. All ranks call it.

        line: numbers, and the text of a sample
        """
        if line.get("val_loss", float("inf")) < self.best:
            # Do this first, on all ranks: writing the line can fail on rank 0 only, and then the
            # other ranks would have another `best`.
            self.best = line["val_loss"]
            self.export(self.out / "best")
        if self.world.first:
            self._write_line(line)

    def _write_line(self, line: dict[str, Any]) -> None:
        first = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds")
        ordered = {name: line[name] for name in first} | line
        texts = {name: value for name, value in ordered.items() if isinstance(value, str)}
        numbers = {name: value for name, value in ordered.items() if name not in texts}
        finite = {name: value if math.isfinite(value) else None for name, value in numbers.items()}
        with open(self.out / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(finite | texts) + "\n")  # JSON has no nan: it is null
        if self.board is not None:
            for name, value in finite.items():
                if value is not None and name != "step":
                    self.board.add_scalar(name, value, self.step)
            for name, text in texts.items():
                self.board.add_text(name, text, self.step)

    # -- save

    def export(self, directory: str | Path) -> None:
        """Write the model as a checkpoint directory. All ranks of a sharded run call it."""
        weights = put_together(self.model.state_dict(), keep=self.world.first)
        if self.world.first:
            checkpoint.save(directory, self.model, self.tok, weights)

    def save(self) -> None:
        """Keep the previous state as step-..., then replace all files of it together.

        All ranks call it together, as each has a random state. Of a split model's state each writes
        its rows first; rank 0 writes the rest, and the others wait and hear what goes wrong.
        """
        cuda_state = torch.cuda.get_rng_state() if self.on_cuda else None
        random_states = self.world.gather((torch.get_rng_state(), cuda_state))
        state = self._state(random_states)
        tensors = take_out(state)
        folder = split_folder(self.out, self.step)
        try:
            if tensors:
                with self.world.failing_together():
                    checksum = write_rows(folder, tensors, self.world)
                state["parts"] = self.world.gather(checksum)
            weights = put_together(self.model.state_dict(), self.world.first)
            with self.world.failing_together():
                if self.world.first:
                    self._keep_previous()
                    with together(self.out):
                        self._write(state, weights)
            self.saved = self.step
            self.parts = parts_in(folder, self.world.size) if tensors else []
        finally:
            if self.world.first:
                delete_parts(self.out, keep=self.parts)

    def _state(self, random_states: list) -> dict:
        optimizer_states = [optimizer.state_dict() for optimizer in self.optimizers]
        for each in optimizer_states:  # the entries are the optimizer's own
            each["state"] = {number: dict(entry) for number, entry in each["state"].items()}
        return {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "skipped": self.skipped,
            "scale": [self.scale.value, self.scale.unbroken],
            "settings": self.settings,
            "micro_batch": self.micro_batch,
            "model": dict(self.model.state_dict()),
            "optimizers": optimizer_states,
            "rng": random_states,
        }

    def _write(self, state: dict, weights: dict[str, Tensor]) -> None:
        with replacing(self.out / STATE) as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as error:  # such as a full disk
                raise UserError(f"cannot write {self.out / STATE}: {error}") from None
            seal(beside)
        checkpoint.save(self.out, self.model, self.tok, weights)

    def _keep_previous(self) -> None:
        """Link the state on disk into step-..., and delete the oldest beyond `keep`."""
        if self.keep and self.saved is not None and self.saved != self.step:
            target = self.out / f"step-{self.saved:06d}"
            if not os.path.lexists(target):
                self._link_state(self.saved, target)
        for old in older_states(self.out)[: -self.keep or None]:
            delete_folder(old)

    def _link_state(self, step: int, target: Path) -> None:
        """Keep the state on disk as a directory of its own, by hard links.

        The next state is written to new files, which are renamed over the old names. So a link
        keeps the old content and costs no space:

            before    out/model.safetensors -> A
            link      out/model.safetensors -> A    out/step-000500/model.safetensors -> A
            save      out/model.safetensors -> B    out/step-000500/model.safetensors -> A
        """
        beside = temporary_name(target)
        beside.mkdir()
        try:
            for name in sorted(OWN_NAMES - {METRICS}):
                if (self.out / name).is_file():
                    _link(self.out / name, beside / name)
            for path in self.parts:
                linked = beside / path.relative_to(self.out)
                linked.parent.mkdir(exist_ok=True)
                _link(path, linked)
            text, _ = metrics_until(self.out / METRICS, step)
            write_text(beside / METRICS, text)
            os.replace(beside, target)
        except BaseException:
            delete_folder(beside)
            raise

    # -- resume

    def restore(self, steps: int) -> None:
        """Go on from train_state.pt. A state of other data or settings is refused, and one beyond
        `steps`, before anything is changed.

        The files beside it may be older or newer, so they are written again.
        """
        path = self.out / STATE
        with self.world.failing_together():
            state = self._read(path, steps)
        self.step = state["step"]
        self.saved = self.step
        folder = split_folder(self.out, self.step)
        self.parts = parts_in(folder, len(state.get("parts") or []))
        self.tokens = state["tokens"]
        self.seconds = state["seconds"]
        self.best = state["best"]
        self.skipped = state["skipped"]
        self.scale.value, self.scale.unbroken = state["scale"]
        self._restore_weights(state.pop("model"))  # the moments find room where they were
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            _restore_optimizer(optimizer, saved, came_in_rows=bool(self.parts))
        self._restore_random_state(state["rng"])
        weights = put_together(self.model.state_dict(), self.world.first)
        if self.world.first:
            self._write_again(weights)
            print(f"resume: {self.out} at step {self.step:,} of {steps:,}")

    def _read(self, path: Path, steps: int) -> dict:
        """A state that this run can go on with: its tensors are whole, or the rows of this rank."""
        state = read_state(path)
        check_random_states(state["rng"], self.on_cuda, f"{path}: rng")
        self._check_settings(state["settings"])
        self._check_dropout(state)
        if state["step"] > steps:
            raise UserError(
                f"{self.out} is at step {state['step']:,}, beyond the {steps:,} "
                "asked for: raise --steps"
            )
        weights = self.model.state_dict()
        folder = split_folder(self.out, state["step"])
        put_back(state, folder, likes_of(weights, self.optimizers), self.world)
        check_weights(state["model"], weights, f"{path}: model")
        check_optimizers(state, self.optimizers, path)
        return state

    def _write_again(self, weights: dict[str, Tensor]) -> None:
        """Make the other files those of the state: later lines of metrics.jsonl go."""
        text, unreadable = metrics_until(self.out / METRICS, self.step)
        if unreadable:
            print(
                f"note: {self.out / METRICS} was damaged: {len(unreadable):,} of its lines (the "
                f"first is line {unreadable[0]:,}) cannot be read and are left out"
            )
        with together(self.out):
            write_text(self.out / METRICS, text)
            checkpoint.save(self.out, self.model, self.tok, weights)

    def _check_settings(self, saved: dict[str, str]) -> None:
        """Refuse settings that would give another model. A flag added later had its default."""
        different = []
        for name in sorted(saved.keys() | self.settings.keys()):
            was = saved.get(name, self.defaults.get(name))
            now = self.settings.get(name)
            if was != now:
                # A model has many settings, and which of them differ should be seen.
                different.append(f"{name[:SHOWN]} was {str(was)[:1000]}, is {now}")
        if different:
            raise UserError(
                f"{self.out} cannot be resumed, as this would give another model: "
                f"{'; '.join(different)}"
            )

    def _check_dropout(self, state: dict) -> None:
        """With dropout, refuse another --micro-batch or number of ranks.

        What dropout switches off is drawn for a whole micro-batch at once, by each rank on its own.
        So the same seed draws other numbers when the step is cut otherwise.
        """
        shape = self.model.cfg
        if not max(shape.embd_pdrop, shape.resid_pdrop, shape.attention_dropout):
            return
        now = {"--micro-batch": self.micro_batch, "the number of ranks": self.world.size}
        was = {
            "--micro-batch": state.get("micro_batch") or self.micro_batch,  # older states lack it
            "the number of ranks": len(state["rng"]),
        }
        different = [
            f"{name} was {was[name]}, is {now[name]}" for name in now if was[name] != now[name]
        ]
        if different:
            raise UserError(
                f"{self.out} cannot be resumed: {'; '.join(different)}, and with dropout the "
                "random numbers depend on it, so this would give another model"
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


def _restore_optimizer(optimizer: Optimizer, saved: dict, came_in_rows: bool) -> None:
    """Load a saved state. Tensors of the shape of a weight are distributed like it.

    came_in_rows: distributed tensors were read as such, and share no memory with a file
    """
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for index, p in enumerate(parameters):
        for name, value in saved["state"].get(index, {}).items():
            if isinstance(value, Tensor) and value.shape == p.shape:
                saved["state"][index][name] = part_like(value, p)
    optimizer.load_state_dict(saved)
    for kept in optimizer.state.values():
        for name, value in kept.items():
            is_own = came_in_rows and is_distributed(value)
            if isinstance(value, Tensor) and not value.is_cuda and not is_own:
                kept[name] = value.clone()  # it may lie in the file still


def metrics_until(path: Path, step: int) -> tuple[str, list[int]]:
    """The lines of a metrics.jsonl up to a step, and the numbers of those that cannot be read."""
    kept = []
    unreadable = []
    for number, text, line in metrics_lines(path) if path.exists() else []:
        if line is None:
            unreadable.append(number)
        elif line["step"] <= step:
            kept.append(text + "\n")
    return "".join(kept), unreadable


def _link(source: Path, target: Path) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    real = os.path.realpath(source)  # the file itself: a link to it would show the next state
    try:
        os.link(real, target)
    except OSError:
        shutil.copyfile(real, target)
