"""The one training loop: pretraining, SFT and DPO differ in the `loss_fn` and `batch_at` that they
pass.

Read `train`. It prepares, and then repeats three things:

    step    training_step, step.py
    log     metrics.jsonl and the terminal; validation after each --eval-every steps
    save    a checkpoint after each --save-every steps, rundir.py

The batch and the learning rate of a step depend only on its number. So a saved run needs the
weights, the optimizers, the random states, the loss scale and a few counters, and a resumed run
equals the unbroken one bit for bit (on a GPU up to rounding: its attention adds up in an order that
varies).
"""

import contextlib
import inspect
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch.optim import Optimizer

import nanophi
from nanophi.cli import Progress, UserError, shows_colours
from nanophi.expect import Expected, check
from nanophi.files import write_json
from nanophi.model.checkpoint import check_architecture
from nanophi.model.phi import Phi
from nanophi.tokenizer.tokenizer import Tokenizer
from nanophi.train import preflight
from nanophi.train.config import TrainConfig, total_steps
from nanophi.train.distributed import World, distribute, leave_together
from nanophi.train.faults import Faults, or_uncompiled
from nanophi.train.interrupts import Interrupts
from nanophi.train.losses import LossFn
from nanophi.train.optim import build_optimizers, peak_rates, schedule, set_rates
from nanophi.train.packing import Batch
from nanophi.train.precision import LossScale
from nanophi.train.run_files import STATE, delete_run
from nanophi.train.rundir import RunDirectory
from nanophi.train.setup import Setup, begin
from nanophi.train.step import StepResult, training_step

try:
    from nanophi.model.speed import speed_up
except ModuleNotFoundError as error:  # if you delete that file, the plain network is trained
    if error.name != "nanophi.model.speed":
        raise

    def speed_up(model: Phi, recompute: bool = False, compile: bool = False) -> None:
        if recompute or compile:
            raise UserError("--recompute and --compile need the file nanophi/model/speed.py")


Evaluate = Callable[[Phi], dict[str, Any]]


def train(
    model: Phi,
    loss_fn: LossFn,
    batch_at: Callable[[int], Batch],
    cfg: TrainConfig | Setup,
    evaluate: Evaluate | None = None,
    resume: str | None = None,
    *,
    steps: int | None = None,
    tok: Tokenizer | None = None,
    data_id: str = "",
    stop_at: int | None = None,
) -> Phi:
    """Train `model` in place for `steps` (or cfg.steps) steps and leave its checkpoint in cfg.out.

    batch_at(step)   gives the batch of a step, from 0. Where it takes `part` too, a rank asks for
                     its own samples [start, stop) alone
    loss_fn          gives its summed loss, see losses.py
    cfg              a TrainConfig, or the Setup that `begin` has made of one
    evaluate(model)  gives figures to log; the model with the lowest "val_loss" is kept. All ranks
                     call it, and the figures of rank 0 count
    resume           None, "yes" or "auto"; overrides cfg.resume
    data_id          names the data: a run is not resumed with other data
    stop_at          save and return when the run has reached this step

    SIGINT and SIGTERM save at the end of the step and leave by SystemExit(130 or 143).
    """
    # 1. Prepare.
    setup = cfg if isinstance(cfg, Setup) else begin(cfg, resume)
    cfg = setup.cfg
    steps = steps_of(cfg) if steps is None else steps
    check(steps, Expected(int, at_least=1), "steps")
    example = batch_at(0)
    check_batch(example, setup)
    if cfg.micro_batch is None:
        context = example.ids.shape[1]
        setup = preflight.fit(
            model.cfg, setup, len(example), context, example.rows_per_sample, model
        )
    place(model, setup)
    if not setup.writes:
        return self_test(model, loss_fn, example, setup, tok)
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, cfg.weight_decay)
    rates = peak_rates(optimizers)
    scale = LossScale(setup.dtype)
    print(preflight.outlook(model, optimizers, setup, example, steps))
    few = preflight.note_on_few_tokens(model, example, setup.world)
    if few is not None:
        print(few)
    run = open_run(RunDirectory(model, optimizers, scale, setup, tok, data_id), setup, steps)
    mfu = preflight.mfu_by_speed(model, example, setup.world)
    faults = Faults()
    end = steps if stop_at is None else stop_at
    batches = Batches(batch_at, setup.world, len(example), end)

    with setup.locks, Interrupts() as interrupts, Progress("step", steps, run.step) as bar:
        clock = SaveClock(run, setup, interrupts)
        step = prepared_step(model, optimizers, loss_fn, setup, bar.say)
        if evaluate is not None and cfg.compile:
            evaluate = or_uncompiled(evaluate, partial(speed_up, model, cfg.recompute), bar.say)
        while run.step < steps and run.step != stop_at and not clock.stop:
            # 2. Step.
            began = time.perf_counter()
            factor = schedule(cfg.schedule, run.step, steps, cfg.warmup, cfg.decay)
            lr = set_rates(optimizers, rates, factor)
            batch = batches.take(run.step)
            along = [batch.real_tokens, *clock.votes()]
            meanwhile = partial(batches.build, run.step + 1)
            result = step(batch, scale=scale.value, along=along, meanwhile=meanwhile)
            scale.update(result.finite)
            tokens, *votes = result.sums

            # 3. Log.
            line = result.means | {"grad_norm": result.grad_norm, "lr": lr}
            line |= run.count(int(tokens), result.finite, time.perf_counter() - began)
            line |= mfu(line["tokens_per_s"])
            faults.watch(line, result.finite, batch, run, bar.say)
            if evaluate is not None and (run.step % cfg.eval_every == 0 or run.step == steps):
                line = add_validation(model, evaluate, line, setup, steps, bar.say)
            with forgiving(run, cfg, bar.say):
                run.log(line)
            bar.update(1, log_line(line))

            # 4. Save.
            clock.look(votes)
            save_what_is_due(run, cfg, steps, clock.due, bar.say)
        run.save()  # the state of the last step, or of the step at which the run was stopped
    leave_together()
    clock.leave_if_stopped(steps)
    return model.eval()


# ---- prepare


def check_batch(batch: Batch, setup: Setup) -> None:
    """Refuse a step whose samples do not give every rank something to do."""
    samples = len(batch)
    ranks = setup.world.size
    if samples < ranks:
        flag_name = "--batch-pairs" if batch.rows_per_sample == 2 else "--batch-tokens"
        raise UserError(
            f"a step has {samples} samples for {ranks} ranks: raise {flag_name}, "
            "or start fewer ranks"
        )
    # Ranks that share one model must run the same number of micro-batches.
    if setup.cfg.shard and samples % ranks:
        raise UserError(
            f"--shard: the {samples} samples of a step cannot be divided among {ranks} ranks"
        )


def steps_of(cfg: TrainConfig) -> int:
    """cfg.steps. Epochs mean nothing here: who knows the data calls `total_steps`."""
    if cfg.steps is None:
        raise UserError("train needs a number of steps: steps=..., or TrainConfig(steps=...)")
    return total_steps(cfg, 1)


def place(model: Phi, setup: Setup) -> None:
    """Make the model ready to train, in place: its backend, what speed.py adds, device or ranks."""
    check_architecture(model)
    if setup.cfg.attention != "auto":
        model.attention = setup.cfg.attention
    model.train()
    speed_up(model, setup.cfg.recompute, bool(setup.cfg.compile))
    if setup.cfg.shard:
        distribute(model, setup.world)
    else:
        model.to(setup.world.device)


def prepared_step(
    model: Phi,
    optimizers: list[Optimizer],
    loss_fn: LossFn,
    setup: Setup,
    say: Callable[[str], None],
) -> Callable[..., StepResult]:
    """`training_step` with all arguments but the batch and the scale of the loss."""
    cfg = setup.cfg
    step = partial(
        training_step,
        model,
        optimizers,
        loss_fn,
        micro_batch=setup.micro_batch,
        world=setup.world,
        clip=cfg.clip,
        autocast=setup.autocast,
    )
    if not cfg.compile:
        return step
    return or_uncompiled(step, partial(speed_up, model, cfg.recompute), say)


def open_run(run: RunDirectory, setup: Setup, steps: int) -> RunDirectory:
    """Go on from the state in --out, or delete the run that it holds; then write run.json."""
    cfg = setup.cfg
    world = setup.world
    torch.manual_seed(cfg.seed + 10_007 * world.rank)  # for dropout; `restore` overrides it
    if cfg.resume and (run.out / STATE).exists():
        run.restore(steps)
        keep_early_model_of_resumed(run, cfg, steps)
    elif world.first:
        # `claim` has refused a directory with a run already, unless --overwrite is given.
        delete_run(run.out)
        if cfg.keep_at is not None:
            delete_run(run.early)
    first_steps = set(world.gather(run.step))
    if len(first_steps) > 1:
        raise UserError(
            f"the ranks would begin at steps {sorted(first_steps)}: --out must be a directory "
            "all see"
        )
    if world.first:
        description = {
            "config": asdict(cfg),
            "steps": steps,
            "data_id": run.settings["data"],
            "ranks": world.size,
            "versions": {"nanophi": nanophi.__version__, "torch": torch.__version__},
        }
        write_json(run.out / "run.json", description)
        run.open_board()
    return run


class Batches:
    """The samples of this rank, by step. A batch is built while the device computes the one before.

    samples: of a step, over all ranks
    end:     the step for which no batch is needed any more
    """

    def __init__(self, batch_at: Callable[..., Batch], world: World, samples: int, end: int):
        self.batch_at = batch_at
        self.part = None if world.size == 1 else world.part(samples)
        self.takes_part = "part" in inspect.signature(batch_at).parameters
        self.end = end
        self.ahead: tuple[int, Batch] | None = None  # its step, and the batch

    def take(self, step: int) -> Batch:
        """The batch of a step, which is gone then."""
        ahead, self.ahead = self.ahead, None
        return ahead[1] if ahead is not None and ahead[0] == step else self._batch(step)

    def build(self, step: int) -> None:
        """Build the batch of a later step, and keep it."""
        if step < self.end:
            self.ahead = (step, self._batch(step))

    def _batch(self, step: int) -> Batch:
        if self.part is None:
            return self.batch_at(step)
        if self.takes_part:
            return self.batch_at(step, part=self.part)
        return self.batch_at(step).cut(*self.part)


# ---- log


def add_validation(
    model: Phi,
    evaluate: Evaluate,
    line: dict[str, Any],
    setup: Setup,
    steps: int,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """Add what `evaluate` measures to the line of metrics, and print the line.

    All ranks call `evaluate`, which may divide its work among them, see `losses.validate`. They
    take the numbers of rank 0, so that they agree on the best model.
    """
    with setup.autocast(cache=True):
        measured = evaluate(model)
    line = line | setup.world.gather(measured)[0]
    if setup.world.first:
        say(log_line(line, steps))
    return line


# What of a validation stands in the line, where `evaluate` gives it. metrics.jsonl has everything.
VALIDATION = {
    "val_loss": " val {:.3f}",
    "val_accuracy": " accuracy {:.0%}",
    "val_accuracy_error": "± {:.0%}",
    "val_accuracy_by_length": "(by length {:.0%})",
    "val_kl": " kl {:.3f}",
}


def log_line(line: dict[str, Any], steps: int | None = None) -> str:
    """The line of metrics for people; with the step and the validation where `steps` is given."""
    text = f"loss {line['loss']:.3f}  lr {line['lr']:.1e}  grad {line['grad_norm']:.2f}"
    text += f"  {line['tokens_per_s']:,.0f} tok/s"
    if steps is None:
        return text
    measured = [form.format(line[name]) for name, form in VALIDATION.items() if name in line]
    return " ".join([f"step {line['step']:,}/{steps:,}  {text}", *measured])


# ---- save


@contextlib.contextmanager
def forgiving(run: RunDirectory, cfg: TrainConfig, say: Callable[[str], None]) -> Iterator[None]:
    """Write what belongs to a step. With --keep-going, a failure (a full disk) is only printed."""
    try:
        yield
    except (UserError, OSError) as error:
        if not cfg.keep_going:
            raise
        say(f"step {run.step:,} could not be written, the checkpoint before it stays: {error}")


def step_to_keep(cfg: TrainConfig, steps: int) -> int | None:
    """The step after which the model of --keep-at is kept; None without the flag."""
    return None if cfg.keep_at is None else max(round(cfg.keep_at * steps), 1)


def keep_early_model_of_resumed(run: RunDirectory, cfg: TrainConfig, steps: int) -> None:
    """Keep the model of --keep-at if a run is resumed at its step; say so if that is past."""
    early = step_to_keep(cfg, steps)
    if early is None or run.step < early or (run.early / "config.json").exists():
        return
    if run.step == early:
        run.export(run.early)
    elif run.world.first:
        print(
            f"note: --keep-at {cfg.keep_at:g} is step {early:,}, which is past: {run.early} is not "
            "written"
        )


def save_what_is_due(
    run: RunDirectory, cfg: TrainConfig, steps: int, due: bool, say: Callable[[str], None]
) -> None:
    """Save the model of --keep-at at its step, and a checkpoint where one is due."""
    if run.step == step_to_keep(cfg, steps):
        with forgiving(run, cfg, say):
            run.export(run.early)
    if due and run.step < steps:
        with forgiving(run, cfg, say):
            run.save()


class SaveClock:
    """Knows after each step whether a checkpoint is due, and whether a signal ends the run."""

    def __init__(self, run: RunDirectory, setup: Setup, interrupts: Interrupts):
        self.run = run
        self.setup = setup
        self.interrupts = interrupts
        self.saved_at = time.monotonic()
        self.due = False  # after --save-every steps, or when --save-minutes have passed
        self.stop = 0  # the signal that ends the run, 0 where none has come

    def votes(self) -> list[float]:
        """What each rank has to say before a step; they are summed over the ranks on its way.

        Each rank has a clock and signals of its own.
        """
        cfg = self.setup.cfg
        waited_s = time.monotonic() - self.saved_at
        late = cfg.save_minutes is not None and waited_s > 60 * cfg.save_minutes
        heard = self.interrupts.signal
        return [heard == signal.SIGINT, heard == signal.SIGTERM, late]

    def look(self, votes: list[float]) -> None:
        """Decide after a step, by the summed votes: all ranks decide the same.

        A rank that is alone need not ask what it said before the step.
        """
        if self.setup.world.size == 1:
            votes = self.votes()
        interrupted, ended, late = votes
        self.stop = signal.SIGTERM if ended else signal.SIGINT if interrupted else 0
        self.due = self.run.step % self.setup.cfg.save_every == 0 or bool(late)
        if self.due:
            self.saved_at = time.monotonic()

    def leave_if_stopped(self, steps: int) -> None:
        """Exit with 130 or 143 if a signal has stopped the run before its last step."""
        run = self.run
        if self.stop and run.step < steps:
            print(
                f"interrupted: saved step {run.step:,} of {steps:,} in {run.out}; "
                "go on with --resume"
            )
            raise SystemExit(128 + self.stop)


# ---- self-tests


def self_test(
    model: Phi, loss_fn: LossFn, batch: Batch, setup: Setup, tok: Tokenizer | None
) -> Phi:
    """Print the first batch for --show-batch, learn it for --overfit-one-batch; write nothing."""
    if setup.cfg.overfit_one_batch:
        print(overfit(model, loss_fn, batch, setup))
    elif tok is not None:
        marks = preflight.GREEN if shows_colours() else preflight.PLAIN
        print(f"{preflight.legend(marks)}\n\n{preflight.show_batch(batch, tok, marks=marks)}")
    leave_together()
    return model


def overfit(model: Phi, loss_fn: LossFn, batch: Batch, setup: Setup, steps: int = 100) -> str:
    """Train the model on one batch, which a correct model and loss learn by heart.

    Raises a UserError if the loss does not fall to a tenth.
    """
    cfg = setup.cfg
    optimizers = build_optimizers(model, cfg.optimizer, cfg.lr, weight_decay=0.0)
    step = prepared_step(model, optimizers, loss_fn, setup, print)
    losses = [step(batch).means["loss"] for _ in range(steps)]
    summary = f"loss of one batch: {losses[0]:.3f} at first, {losses[-1]:.3f} after {steps} steps"
    if not losses[-1] < losses[0] / 10:
        raise UserError(
            f"{summary}, not a tenth: something is wrong, or --lr {cfg.lr:g} does not suit "
            "the model"
        )
    return f"{summary}: the model can learn"
