"""The one training loop: pretraining, SFT and DPO differ in the `loss_fn` and `batch_at` that they pass in.

Everything about time is a pure function of the step: the batch, the learning rate. The state of a run is therefore the
weights, the optimizers, the random generator and one integer, and a resumed run equals the unbroken one bit for bit.

    <out>/                   the newest state: a checkpoint directory, train_state.pt, metrics.jsonl, run.json
    <out>/step-000500/       older ones that are kept, complete
    <out>/best/              the model of the lowest validation loss
"""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

import nanophi
from nanophi.cli import Progress, UserError, flag
from nanophi.files import replacing, write_json, write_text
from nanophi.model import checkpoint
from nanophi.model.phi import Phi
from nanophi.text.tokenizer import Tokenizer
from nanophi.train.losses import LossFn
from nanophi.train.optim import build_optimizers, schedule
from nanophi.train.packing import Batch

STATE = "train_state.pt"
METRICS = "metrics.jsonl"


@dataclass(kw_only=True)
class TrainConfig:
    """What pretrain.py, sft.py and dpo.py have in common."""

    out: str = flag(help="run directory: the newest checkpoint and its history")
    steps: int | None = flag(None, help="optimizer steps; --epochs instead counts passes over the data")
    epochs: float | None = flag(None, help="passes over the data (default: 1 where --steps is not given)")
    batch_tokens: int = flag(16384, help="tokens of one optimizer step over all devices")
    micro_batch: int = flag(8, help="rows (or pairs) a device holds at once; changes memory, not the result")
    context: int | None = flag(None, help="tokens of a row (default: the model's)")
    lr: float = flag(2e-3, help="peak learning rate; with muon that of the matrices, the rest has half of it")
    optimizer: Literal["muon", "adamw", "adafactor"] = flag("muon", help="adafactor is the original's")
    weight_decay: float = flag(0.1, help="decoupled; biases and norms have none")
    schedule: Literal["wsd", "cosine", "constant"] = flag("wsd", help="of the learning rate, after the warm-up")
    warmup: int = flag(20, help="steps until the peak learning rate")
    decay: float = flag(0.3, help="share of the steps in which wsd falls to zero")
    clip: float = flag(1.0, help="largest norm of the gradient")
    seed: int = flag(0, help="of weights, data order and dropout")
    dtype: Literal["auto", "float32", "bfloat16"] = flag("auto", help="compute; weights are fp32. auto: bf16 on CUDA")
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")
    save_every: int = flag(500, help="steps between checkpoints")
    keep: int = flag(1, help="older checkpoints kept as step-... beside the newest")
    eval_every: int = flag(100, help="steps between validations")
    bos: bool = flag(False, help="put [BOS] before every document")
    overwrite: bool = flag(False, help="delete the run that --out holds")
    resume: str | None = flag(
        None, const="yes", help="go on from --out; `--resume auto` starts afresh where it is empty"
    )


def device_of(cfg: TrainConfig) -> str:
    return ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device


def total_steps(cfg: TrainConfig, steps_per_epoch: float) -> int:
    """--steps, or as many as --epochs needs."""
    if cfg.steps is not None and cfg.epochs is not None:
        raise UserError("give --steps or --epochs, not both")
    return cfg.steps if cfg.steps is not None else max(round((cfg.epochs or 1) * steps_per_epoch), 1)


def claim(cfg: TrainConfig) -> None:
    """Refuse an --out that holds a run unless it is to be resumed or overwritten; scripts call it before long work."""
    out = Path(cfg.out)
    if cfg.resume not in (None, "yes", "auto"):
        raise UserError(f"--resume {cfg.resume}: it stands alone, or is `--resume auto`")
    holds = [name for name in (STATE, METRICS, checkpoint.WEIGHTS) if (out / name).exists()]
    if cfg.resume == "yes" and STATE not in holds:
        raise UserError(f"nothing to resume in {out}: no {STATE}; --resume auto would start afresh")
    if cfg.resume is None and holds and not cfg.overwrite:
        raise UserError(f"{out} holds a run ({', '.join(holds)}): --resume goes on with it, --overwrite deletes it")
    if cfg.resume is None and cfg.overwrite:
        for old in [*(out / name for name in holds), *out.glob("step-*"), out / "best"]:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)


class _Interrupts:
    """While active, SIGINT and SIGTERM only leave a note, which the loop reads between steps."""

    def __enter__(self):
        self.signal: int | None = None
        self.before = {}
        with contextlib.suppress(ValueError):  # not in the main thread: then nobody can signal this loop
            self.before = {number: signal.signal(number, self._note) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, number, frame):
        self.signal = number

    def __exit__(self, *exception):
        for number, handler in self.before.items():
            signal.signal(number, handler)


def train(
    model: Phi,
    loss_fn: LossFn,
    batch_at: Callable[[int], Batch],
    cfg: TrainConfig,
    evaluate: Callable[[Phi], dict[str, float]] | None = None,
    resume: str | None = None,
    *,
    steps: int | None = None,
    tok: Tokenizer | None = None,
    data_id: str = "",
    stop_at: int | None = None,
) -> Phi:
    """Train `model` in place for `steps` (or cfg.steps) steps and leave its checkpoint in cfg.out.

    batch_at(step) gives the step's batch, loss_fn its summed loss (see losses.py), evaluate(model) what is logged
    every cfg.eval_every steps. resume: None, "yes" or "auto", as cfg.resume, which it overrides. data_id names the
    data: a state trained on other data is not resumed. stop_at: save and return after that many steps.

    SIGINT and SIGTERM save at the end of the step and leave by SystemExit(130 or 143).
    """
    cfg.resume = resume or cfg.resume
    claim(cfg)
    steps = steps if steps is not None else total_steps(cfg, 1)
    out, device = Path(cfg.out), device_of(cfg)
    for leftover in out.glob("step-*.tmp"):
        shutil.rmtree(leftover)
    model.to(device).train()
    run = _Run(model, build_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay), out, tok, data_id, cfg.keep)
    if cfg.resume and (out / STATE).exists():
        run.restore()
        print(f"resume: {out} at step {run.step:,} of {steps:,}")
    write_json(out / "run.json", _description(cfg, steps, data_id))
    bf16 = cfg.dtype == "bfloat16" or (cfg.dtype == "auto" and device.startswith("cuda"))
    saved_at = run.step if cfg.resume and run.step else -1
    with _Interrupts() as interrupts, Progress("step", steps, run.step) as bar:
        while run.step < steps and run.step != stop_at and interrupts.signal is None:
            factor = schedule(cfg.schedule, run.step, steps, cfg.warmup, cfg.decay)
            began = time.perf_counter()
            batch = batch_at(run.step)
            with torch.autocast(device.split(":")[0], torch.bfloat16, enabled=bf16):
                line = _accumulate(model, loss_fn, batch, cfg.micro_batch, device)
            line["grad_norm"] = torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip).item()
            run.update(factor)
            run.count(line, batch, cfg.lr * factor, time.perf_counter() - began)
            last = run.step == steps
            if evaluate is not None and (run.step % cfg.eval_every == 0 or last):
                line |= evaluate(model)
                bar.say(_log_line(line, steps) + f"  val {line['val_loss']:.3f}")
            run.log(line)
            bar.update(1, _log_line(line, steps).split("  ", 1)[1])
            if run.step % cfg.save_every == 0 and not last:
                run.save()
                saved_at = run.step
            if "val_loss" in line and line["val_loss"] < run.best:
                run.best = line["val_loss"]
                checkpoint.save(out / "best", model, tok)
    if saved_at != run.step or run.step >= steps:  # at the end in any case: a kill may have left older weights beside
        run.save()
    if interrupts.signal is not None and run.step < steps:
        print(f"interrupted: saved step {run.step:,} of {steps:,} in {out}; go on with --resume")
        raise SystemExit(128 + interrupts.signal)
    return model.eval()


def _accumulate(model: Phi, loss_fn: LossFn, batch: Batch, micro_batch: int, device: str) -> dict[str, float]:
    """Gradients of the mean loss over the whole step, in micro-steps; returns the means of loss and metrics."""
    for p in model.parameters():
        p.grad = None
    total, count, sums = 0.0, 0, {}
    for start in range(0, len(batch), micro_batch):
        loss, n, metrics = loss_fn(model, batch.cut(start, start + micro_batch).to(device))
        loss.backward()
        total, count = total + loss.detach(), count + n
        sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
    # Sums were differentiated: dividing once by the whole step's count weighs every token alike.
    torch._foreach_div_([p.grad for p in model.parameters() if p.grad is not None], max(count, 1))
    return {name: float(value) / max(count, 1) for name, value in ({"loss": total} | sums).items()}


def _log_line(line: dict, steps: int) -> str:
    text = (
        f"step {line['step']:,}/{steps:,}  loss {line['loss']:.3f}  lr {line['lr']:.1e}  grad {line['grad_norm']:.2f}"
    )
    return f"{text}  {line['tokens_per_s']:,.0f} tok/s"


def _description(cfg: TrainConfig, steps: int, data_id: str) -> dict:
    versions = {"nanophi": nanophi.__version__, "torch": torch.__version__}
    return {"config": asdict(cfg), "steps": steps, "data_id": data_id, "versions": versions}


class _Run:
    """The state of a run and its files."""

    def __init__(self, model: Phi, optimizers, out: Path, tok: Tokenizer | None, data_id: str, keep: int):
        self.model, self.optimizers, self.out, self.tok, self.keep = model, optimizers, out, tok, keep
        self.data_id = data_id
        self.step, self.tokens, self.seconds, self.best = 0, 0, 0.0, float("inf")
        self.peaks = [[group["lr"] for group in optimizer.param_groups] for optimizer in optimizers]

    def update(self, factor: float) -> None:
        """One step of every optimizer at `factor` times its peak learning rate."""
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            optimizer.step()

    def count(self, line: dict, batch: Batch, lr: float, seconds: float) -> None:
        """Advance the counters and complete the step's line of metrics."""
        self.step += 1
        self.tokens += batch.real_tokens
        self.seconds += seconds
        line |= {"step": self.step, "tokens": self.tokens, "lr": lr, "seconds": round(self.seconds, 3)}
        line["tokens_per_s"] = round(batch.real_tokens / seconds, 1)

    def log(self, line: dict) -> None:
        first = ("step", "tokens", "loss", "lr", "grad_norm", "tokens_per_s", "seconds")
        ordered = {name: line[name] for name in first} | line
        with open(self.out / METRICS, "a", encoding="utf-8") as file:
            file.write(json.dumps(ordered) + "\n")

    def save(self) -> None:
        """Keep the state that is there as step-..., then replace it file by file; train_state.pt alone is what a
        resume reads, so a kill between two files harms nothing."""
        self._keep_previous()
        state = {
            "step": self.step,
            "tokens": self.tokens,
            "seconds": self.seconds,
            "best": self.best,
            "data_id": self.data_id,
            "model": self.model.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        with replacing(self.out / STATE) as beside:
            torch.save(state, beside)
        checkpoint.save(self.out, self.model, self.tok)

    def _keep_previous(self) -> None:
        if self.keep and (self.out / STATE).exists():
            previous = torch.load(self.out / STATE, weights_only=True, mmap=True, map_location="cpu")["step"]
            target = self.out / f"step-{previous:06d}"
            if previous != self.step and not target.exists():
                beside = target.with_suffix(".tmp")
                beside.mkdir()
                for file in self.out.iterdir():
                    if file.is_file() and file.suffix != ".tmp" and file.name != METRICS:
                        _link(file, beside / file.name)
                write_text(beside / METRICS, _metrics_until(self.out / METRICS, previous))
                os.replace(beside, target)
        for old in sorted(self.out.glob("step-*"))[: -self.keep or None]:
            shutil.rmtree(old)

    def restore(self) -> None:
        """Load train_state.pt, refuse one of other data, and drop what metrics.jsonl holds beyond its step."""
        state = torch.load(self.out / STATE, weights_only=True, map_location="cpu")
        if state["data_id"] != self.data_id:
            raise UserError(
                f"{self.out} was trained on other data ({state['data_id']}, now {self.data_id}): resume with the data "
                "and the settings of the first start, or give another --out"
            )
        self.step, self.tokens = state["step"], state["tokens"]
        self.seconds, self.best = state["seconds"], state["best"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        torch.set_rng_state(state["rng"])
        if state["cuda_rng"]:
            torch.cuda.set_rng_state_all(state["cuda_rng"])
        path = self.out / METRICS
        write_text(path, _metrics_until(path, self.step))


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
