"""The one training loop: pretraining, SFT and DPO differ in the `loss_fn` and `batch_at` that they pass in.

Everything about time is a pure function of the step: the batch, the learning rate. The state of a run is therefore the
weights, the optimizers, the random generator and one integer, and a resumed run equals the unbroken one bit for bit (on
a GPU up to rounding: its attention adds up in an order that varies). rundir.py keeps it on disk.
"""

import contextlib
import math
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch

import nanophi
from nanophi.cli import Progress, UserError, flag
from nanophi.files import write_json
from nanophi.model.attention import BACKENDS
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train import preflight
from nanophi.train.distributed import World, computes_in, join, shard
from nanophi.train.faults import Faults, compiled_or_not
from nanophi.train.losses import LossFn
from nanophi.train.optim import build_optimizers, schedule
from nanophi.train.packing import Batch
from nanophi.train.rundir import STATE, Run, claim, files_of_a_run


@dataclass(kw_only=True)
class TrainConfig:
    """What pretrain.py, sft.py and dpo.py have in common."""

    out: str = flag(help="run directory: the newest checkpoint and its history")
    steps: int | None = flag(
        None, at_least=1, help="optimizer steps; --epochs instead counts passes over the data"
    )
    epochs: float | None = flag(
        None, above=0, help="passes over the data (1 where --steps is not given either)"
    )
    micro_batch: int = flag(
        8, at_least=1, help="rows (or pairs) a device holds at once; changes memory alone"
    )
    context: int | None = flag(None, at_least=2, help="tokens of a row (default: the model's)")
    lr: float = flag(
        2e-3,
        above=0,
        help="peak learning rate; with muon that of the matrices, the rest has half of it",
    )
    optimizer: Literal["muon", "adamw", "adafactor"] = flag(
        "muon", help="adafactor is the original's"
    )
    weight_decay: float = flag(0.1, at_least=0, help="decoupled; biases and norms have none")
    schedule: Literal["wsd", "cosine", "constant"] = flag(
        "wsd", help="of the learning rate, after the warm-up"
    )
    warmup: int = flag(20, at_least=0, help="steps until the peak learning rate")
    decay: float = flag(
        0.3, at_least=0, at_most=1, help="share of the steps in which wsd falls to zero"
    )
    clip: float = flag(1.0, above=0, help="largest norm of the gradient")
    seed: int = flag(0, at_least=0, help="of weights, data order and dropout")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", help="compute; weights are fp32. auto: bf16 on CUDA"
    )
    attention: Literal["auto", "manual", "sdpa", "documents", "varlen", "causal"] = flag(
        "auto", help="; ".join(f"{name}: {what}" for name, what in BACKENDS.items())
    )
    recompute: bool = flag(
        False, help="keep each block's input alone and compute it again: less memory, more time"
    )
    shard: bool = flag(
        False,
        help="under torchrun, for large models: split weights and optimizer over ranks (FSDP)",
    )
    compile: bool = flag(
        False, help="torch.compile the blocks; where that fails, it is said and left"
    )
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")
    save_every: int = flag(500, at_least=1, help="steps between checkpoints")
    save_minutes: float | None = flag(
        None, above=0, help="also save when so many minutes have passed"
    )
    keep_going: bool = flag(
        False, help="where a checkpoint cannot be written (a full disk), say so and train on"
    )
    keep: int = flag(1, at_least=0, help="older checkpoints kept as step-... beside the newest")
    keep_at: float | None = flag(
        None, above=0, at_most=1, help="keep the model of this share of the steps in <out>-early"
    )
    eval_every: int = flag(100, at_least=1, help="steps between validations")
    dropout: float | None = flag(
        None,
        at_least=0,
        at_most=0.9,
        help="of embeddings, attention and both branches (default: the model's)",
    )
    show_batch: bool = flag(
        False, help="print the first batch, its documents and what is learned, and do not train"
    )
    overfit_one_batch: bool = flag(
        False, help="self-test: learn the first batch by heart, and keep nothing"
    )
    bos: bool = flag(False, help="put [BOS] before every document")
    overwrite: bool = flag(False, help="delete the run that --out holds, once the new one begins")
    resume: str | None = flag(
        None, const="yes", help="go on from --out; `--resume auto` starts afresh where it is empty"
    )


def total_steps(cfg: TrainConfig, steps_per_epoch: float) -> int:
    """--steps, or as many as --epochs needs."""
    if steps_per_epoch < 1:
        name = "batch_pairs" if hasattr(cfg, "batch_pairs") else "batch_tokens"
        asked, fits = getattr(cfg, name), max(int(getattr(cfg, name) * steps_per_epoch), 1)
        flag_name = "--" + name.replace("_", "-")
        raise UserError(
            f"too little data for one batch of {flag_name} {asked:,}: give {flag_name} {fits} or more data"
        )
    epochs = 1 if cfg.epochs is None else cfg.epochs
    steps = cfg.steps if cfg.steps is not None else max(round(epochs * steps_per_epoch), 1)
    if steps <= cfg.warmup:
        print(
            f"note: {steps} steps end within the warm-up of {cfg.warmup}, so little will be learned; "
            "raise --epochs or take fewer tokens (or pairs) a step"
        )
    return steps


def context_of(cfg: TrainConfig, model: Phi) -> int:
    """--context, or the model's; a longer one would train positions that nobody learned before."""
    longest = model.cfg.max_position_embeddings
    if cfg.context is not None and cfg.context > longest:
        raise UserError(
            f"--context {cfg.context} exceeds the {longest} tokens the model was made for"
        )
    return cfg.context or longest


def precision(cfg: TrainConfig, device: str, cache: bool = True):
    """The autocast context of a run: bf16 or fp16 compute over fp32 weights, or nothing. A decorator too. cache: keep
    the weights' half-precision copies until the end of it, which one forward pass has no use for."""
    name = computes_in(cfg, device)
    return torch.autocast(
        device.split(":")[0], getattr(torch, name), enabled=name != "float32", cache_enabled=cache
    )


class _Interrupts:
    """While active, SIGINT and SIGTERM only leave a note, which the loop reads between steps."""

    def __enter__(self):
        self.signal: int | None = None
        self.before = {}
        with contextlib.suppress(
            ValueError
        ):  # not in the main thread: then nobody can signal this loop
            self.before = {
                number: signal.signal(number, self._note)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
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

    batch_at(step) gives the step's batch, loss_fn its summed loss (see losses.py). evaluate(model) gives what is logged
    every cfg.eval_every steps; its "val_loss" decides which model is the best. resume: None, "yes" or "auto", as
    cfg.resume, which it overrides. data_id names the data: a state trained on other data is not resumed. stop_at: save
    and return after that many steps. SIGINT and SIGTERM save at the step's end and leave by SystemExit(130 or 143).
    """
    resume = resume or cfg.resume
    cfg = replace(cfg, resume=resume)
    claim(cfg)
    steps = steps if steps is not None else total_steps(cfg, 1)
    world = join(cfg.device)
    out, device = Path(cfg.out), world.device
    assert cfg.attention in BACKENDS, (
        f"attention {cfg.attention!r} is none of {', '.join(BACKENDS)}"
    )
    model.attention, model.recompute = cfg.attention, cfg.recompute
    model.train()
    loss_fn = precision(cfg, device, cache=False)(
        loss_fn
    )  # and not backward, which knows the dtypes of forward
    if cfg.compile:
        model.compile_blocks()
    example = batch_at(0)
    if len(example) < world.size:
        name = "--batch-pairs" if example.rows_per_sample == 2 else "--batch-tokens"
        raise UserError(
            f"a step has {len(example)} samples for {world.size} ranks: raise {name}, or start fewer ranks"
        )
    if (
        cfg.shard and len(example) % world.size
    ):  # the ranks compute together, so each needs as much work
        raise UserError(
            f"--shard: the {len(example)} samples of a step cannot be divided among {world.size} ranks"
        )
    if cfg.show_batch and tok is not None:
        print(preflight.show_batch(example, tok))
        return model
    if cfg.shard:
        shard(model, world)
    else:
        model.to(device)
    if cfg.overfit_one_batch:
        print(overfit(model, loss_fn, example, cfg, world))
        return model
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    print(preflight.outlook(model, optimizers, cfg, example, steps, world))
    flops, peak = (
        preflight.flops_per_token(model.cfg, example.ids.shape[1]),
        preflight.peak_flops(device),
    )
    run = Run(model, optimizers, cfg, tok, data_id, world)
    torch.manual_seed(
        cfg.seed + 10_007 * world.rank
    )  # of dropout; a resumed run gets the state it had
    if resume and (out / STATE).exists():
        run.restore(steps)
    elif world.first:
        for old in files_of_a_run(out):
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
    if len(steps_of_ranks := set(world.gather(run.step))) > 1:
        raise UserError(
            f"the ranks would begin at steps {sorted(steps_of_ranks)}: --out must be a directory all see"
        )
    versions = {"nanophi": nanophi.__version__, "torch": torch.__version__}
    description = {
        "config": asdict(cfg),
        "steps": steps,
        "data_id": data_id,
        "ranks": world.size,
        "versions": versions,
    }
    if world.first:
        write_json(out / "run.json", description)
        run.open_board()
    faults, saved_at, stop, first = Faults(), time.monotonic(), 0, run.step
    with _Interrupts() as interrupts, Progress("step", steps, run.step) as bar:
        while run.step < steps and run.step != stop_at and not stop:
            factor = schedule(cfg.schedule, run.step, steps, cfg.warmup, cfg.decay)
            began = time.perf_counter()
            batch = batch_at(run.step)
            step = partial(accumulate, model, loss_fn, batch, cfg.micro_batch, world, run.scale)
            line = (
                step()
                if run.step > first or not cfg.compile
                else compiled_or_not(model, step, bar.say)
            )
            line["grad_norm"] = world.clip(model.parameters(), cfg.clip)
            sound = math.isfinite(line["loss"]) and math.isfinite(line["grad_norm"])
            line["lr"] = run.update(factor, sound)
            run.count(line, batch, time.perf_counter() - began)
            if peak is not None:
                line["mfu"] = round(line["tokens_per_s"] * flops / (peak * world.size), 4)
            for note in faults.look_at(line, sound):
                bar.say(note)
            if faults.hopeless:
                raise UserError(faults.give_up(run, batch))
            last = run.step == steps
            if evaluate is not None and (run.step % cfg.eval_every == 0 or last):
                with precision(cfg, device):
                    line |= (
                        evaluate(model) if world.first or cfg.shard else {}
                    )  # sharded: all ranks compute the same
                if cfg.shard:
                    line = world.gather(line)[0]  # and agree what is the best
                if world.first:
                    bar.say(
                        _log_line(line, steps)
                        + (f"  val {line['val_loss']:.3f}" if "val_loss" in line else "")
                    )
            tolerant = partial(_tolerant, run.step, bar if cfg.keep_going else None)
            tolerant(partial(run.log, line))
            bar.update(1, _log_line(line, steps).split("  ", 1)[1])
            if cfg.keep_at is not None and run.step == max(round(cfg.keep_at * steps), 1):
                tolerant(partial(run.export, f"{out}-early"))
            due = (
                cfg.save_minutes is not None and time.monotonic() - saved_at > 60 * cfg.save_minutes
            )
            stop, due = world.largest(
                [interrupts.signal or 0, due]
            )  # the same on all ranks, or they would part
            if (run.step % cfg.save_every == 0 or due) and not last:
                saved_at = time.monotonic()
                tolerant(run.save)
        run.save()  # the last step's, or the one at which it was stopped
    if stop and run.step < steps:
        print(f"interrupted: saved step {run.step:,} of {steps:,} in {out}; go on with --resume")
        raise SystemExit(128 + int(stop))
    return model.eval()


def _tolerant(step: int, bar: Progress | None, write: Callable[[], None]) -> None:
    """Write what belongs to a step. With --keep-going, for which the bar is given, a failure is only said there."""
    try:
        write()
    except (UserError, OSError) as error:
        if bar is None:
            raise
        bar.say(f"step {step:,} could not be written, the checkpoint before it stays: {error}")


def accumulate(
    model: Phi, loss_fn: LossFn, batch: Batch, micro_batch: int, world: World, scale: float = 1.0
) -> dict[str, float]:
    """Gradients of the mean loss over the whole step, in micro-steps and over all ranks; returns the means of loss and
    metrics. scale: what the loss is multiplied by before it is differentiated, so that fp16 gradients do not vanish."""
    for p in model.parameters():
        p.grad = None
    total, count, sums = 0.0, 0, {}
    begin, end = world.part(len(batch))
    for start in range(begin, end, micro_batch):
        part = batch.cut(start, min(start + micro_batch, end)).to(world.device)
        loss, n, metrics = loss_fn(model, part)
        (loss * scale if scale != 1 else loss).backward()
        total, count = total + loss.detach(), count + n
        sums = {name: sums.get(name, 0.0) + value for name, value in metrics.items()}
    world.add_gradients(model.parameters())
    names = ["loss", *sums]
    total, *others, count = world.add(
        [float(total), *(float(value) for value in sums.values()), count]
    )
    # Sums were differentiated: dividing once by the whole step's count weighs every token alike.
    torch._foreach_div_(
        [p.grad for p in model.parameters() if p.grad is not None], max(count, 1) * scale
    )
    return {
        name: value / max(count, 1) for name, value in zip(names, [total, *others], strict=True)
    }


def overfit(
    model: Phi, loss_fn: LossFn, batch: Batch, cfg: TrainConfig, world: World, steps: int = 100
) -> str:
    """Self-test: a sound model and loss learn one batch by heart. Trains the model, writes nothing; a UserError where
    the loss does not fall to a tenth."""
    optimizers, losses = build_optimizers(model, cfg.optimizer, cfg.lr, 0.0), []
    for _ in range(steps):
        losses.append(accumulate(model, loss_fn, batch, cfg.micro_batch, world)["loss"])
        world.clip(model.parameters(), cfg.clip)
        for optimizer in optimizers:
            optimizer.step()
    said = f"loss of one batch: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps"
    if not losses[-1] < losses[0] / 10:
        raise UserError(
            f"{said}, not a tenth: something is wrong, or --lr {cfg.lr:g} does not suit the model"
        )
    return f"{said}: the model can learn"


def _log_line(line: dict, steps: int) -> str:
    text = f"step {line['step']:,}/{steps:,}  loss {line['loss']:.3f}  lr {line['lr']:.1e}  grad {line['grad_norm']:.2f}"
    return f"{text}  {line['tokens_per_s']:,.0f} tok/s"
