"""The flags that pretrain.py, sft.py and dpo.py share."""

from dataclasses import dataclass
from typing import Literal

from nanophi.cli import UserError, flag
from nanophi.model.backends import BACKENDS
from nanophi.model.phi import Phi
from nanophi.text.corpus import Skipped
from nanophi.tokenizer.template import template_flag
from nanophi.train.optim import OPTIMIZERS, SCHEDULES

# The largest values of flags. They are far above what anybody needs, and so small that nothing
# overflows, or takes hours, before the memory is checked.
MOST_STEPS = 10**9
MOST_TOKENS = 2**30  # of a step
MOST_SAMPLES = 2**20  # rows or pairs of a step
LONGEST_CONTEXT = 2**20
LARGEST_RATE = 1000.0  # fp32 cannot hold the products of rates above 1e38
LARGEST_SEED = 2**62  # each rank adds a number of its own, and the sum must fit into 64 bits
MOST_MINUTES = 10**6  # almost two years


@dataclass(kw_only=True)
class TrainConfig:
    """What pretrain.py, sft.py and dpo.py have in common. Each script adds its own flags."""

    # where, and how long
    out: str = flag(help="run directory: the newest checkpoint and its history")
    steps: int | None = flag(
        None,
        at_least=1,
        at_most=MOST_STEPS,
        help="optimizer steps; --epochs instead counts passes over the data",
    )
    epochs: float | None = flag(
        None,
        above=0,
        at_most=MOST_STEPS,
        help="passes over the data (1 where --steps is not given either)",
    )

    # the batch
    micro_batch: int | None = flag(
        None,
        at_least=1,
        at_most=MOST_SAMPLES,
        help="rows (or pairs) a device holds at once: memory, on a GPU speed, not the result "
        "(default: 8; on a GPU as many as fit)",
    )
    context: int | None = flag(
        None, at_least=2, at_most=LONGEST_CONTEXT, help="tokens of a row (default: the model's)"
    )
    bos: bool = flag(False, help="put [BOS] before every document")

    # the optimizer
    lr: float = flag(
        2e-3,
        above=0,
        at_most=LARGEST_RATE,
        help="peak learning rate; with muon that of the matrices, the rest has half of it",
    )
    optimizer: str = flag("muon", choices=OPTIMIZERS, help="adafactor is the original's")
    weight_decay: float = flag(
        0.1, at_least=0, at_most=LARGEST_RATE, help="decoupled; biases and norms have none"
    )
    schedule: str = flag("wsd", choices=SCHEDULES, help="of the learning rate, after the warm-up")
    warmup: int = flag(
        20, at_least=0, at_most=MOST_STEPS, help="steps until the peak learning rate"
    )
    decay: float = flag(
        0.3,
        at_least=0,
        at_most=1,
        help="share of the steps, the last ones, in which wsd falls towards zero",
    )
    clip: float = flag(1.0, above=0, help="largest norm of the gradient")
    dropout: float | None = flag(
        None,
        at_least=0,
        at_most=0.9,
        help="of embeddings, attention and both branches (default: the model's)",
    )
    seed: int = flag(0, at_least=0, at_most=LARGEST_SEED, help="of weights, data order and dropout")

    # the device
    device: str = flag("auto", help="auto: cuda where there is one, else cpu")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = flag(
        "auto", help="compute; weights are fp32. auto: bf16 on CUDA"
    )
    attention: str = flag(
        "auto",
        choices=BACKENDS,
        help="; ".join(f"{name}: {meaning}" for name, meaning in BACKENDS.items()),
    )
    recompute: bool = flag(
        False, help="keep only the input of each block and compute it again: less memory, more time"
    )
    shard: bool = flag(
        False,
        help="under torchrun, for large models: split weights and optimizer over ranks (FSDP)",
    )
    reduce_dtype: Literal["float32", "bfloat16"] = flag(
        "float32",
        help="of gradients on their way between ranks; bfloat16: half the traffic, rounded sums",
    )
    compile: bool | None = flag(
        None,
        help="torch.compile the blocks and the loss; if that fails, print a note and go on without "
        "(default: on a GPU, except in dpo.py)",
    )

    # what is kept, and when
    save_every: int = flag(500, at_least=1, help="steps between checkpoints")
    save_minutes: float | None = flag(
        None, above=0, at_most=MOST_MINUTES, help="also save when so many minutes have passed"
    )
    keep_going: bool = flag(
        False, help="if a checkpoint cannot be written (a full disk), say so and train on"
    )
    keep: int = flag(1, at_least=0, help="older checkpoints kept as step-... beside the newest")
    keep_at: float | None = flag(
        None,
        above=0,
        at_most=1,
        help="keep a copy of the model after this share of the steps in <out>-early",
    )
    eval_every: int = flag(100, at_least=1, help="steps between validations")
    overwrite: bool = flag(False, help="delete the run that --out holds, once the new one begins")
    resume: str | None = flag(
        None,
        const="yes",
        help="go on from --out; `--resume auto` starts afresh where it is empty",
    )

    # self-tests
    show_batch: bool = flag(
        False, help="print the first batch, its documents and what is learned, and do not train"
    )
    overfit_one_batch: bool = flag(
        False, help="self-test: learn the first batch by heart, and keep nothing"
    )


@dataclass(kw_only=True)
class TuningConfig(TrainConfig):
    """What sft.py and dpo.py have in common beyond that: they read rows of conversations."""

    template: str | None = template_flag()

    skip_bad: bool = flag(
        False, help="go on without rows that cannot be used; five of them are named"
    )


class BadRows(Skipped):
    """The rows that cannot be used, told all at once: who has mended one wants no other to follow.

    for conversation in read_rows(paths, on_bad=bad): ...
    bad.settle(cfg.skip_bad)
    """

    SHOWN = 5

    def settle(self, skip: bool) -> None:
        """When all is read: refuse the bad rows, or only print them where they are to be skipped.

        >>> bad = BadRows()
        >>> bad("a.jsonl, line 2: not JSON")
        >>> bad.settle(skip=False)  # doctest: +IGNORE_EXCEPTION_DETAIL
        Traceback (most recent call last):
        nanophi.cli.UserError: 1 rows cannot be used: a.jsonl, line 2: not JSON
        """
        if skip:
            print(self, end="")
        elif self.count:
            more = self.count - len(self.first)
            named = "; ".join(self.first) + (f"; and {more:,} more" if more else "")
            raise UserError(
                f"{self.count:,} rows cannot be used: {named}. Mend them, or give --skip-bad to go "
                "on without them"
            )


class Dropped:
    """Rows that could be read and teach nothing, counted by the reason; the first of each is shown.

    >>> dropped = Dropped()
    >>> for question in ("什么是茶？", "什么是水？"):
    ...     dropped("longer than 50 tokens", question)
    >>> dropped.tell("sft")
    sft: dropped 2 longer than 50 tokens, the first: 什么是茶？
    """

    SHOWN = 30  # characters

    def __init__(self):
        self.counts: dict[str, int] = {}
        self.first: dict[str, str] = {}

    def __call__(self, reason: str, text: str) -> None:
        """Count a row. text: what names it to a reader, its question for example"""
        self.counts[reason] = self.counts.get(reason, 0) + 1
        self.first.setdefault(reason, " ".join(text.split()))

    def __len__(self) -> int:
        return sum(self.counts.values())

    def __str__(self) -> str:
        return ", ".join(f"{count:,} {reason}" for reason, count in self.counts.items()) or "none"

    def tell(self, who: str) -> None:
        """Print a line for each reason."""
        for reason, count in self.counts.items():
            text = self.first[reason]
            text = text if len(text) <= self.SHOWN else text[: self.SHOWN] + "…"
            print(f"{who}: dropped {count:,} {reason}, the first: {text}")


def total_steps(
    cfg: TrainConfig, steps_per_epoch: float, batch_flag: str = "--batch-tokens", batch: int = 1
) -> int:
    """--steps, or as many steps as --epochs needs.

    Raises a UserError if the data do not fill one batch of `batch`, the value of `batch_flag`.
    """
    if steps_per_epoch < 1:
        fits = max(int(batch * steps_per_epoch), 1)
        raise UserError(
            f"too little data for one batch of {batch_flag} {batch:,}: give {batch_flag} {fits} "
            "or more data"
        )
    if cfg.steps is not None:
        steps = cfg.steps
    else:
        epochs = 1 if cfg.epochs is None else cfg.epochs
        steps = max(round(epochs * steps_per_epoch), 1)
        if steps > MOST_STEPS:
            raise UserError(
                f"--epochs {epochs:g} are {steps:.1e} steps, more than {MOST_STEPS:,}: lower it"
            )
    if steps <= cfg.warmup:
        print(
            f"note: {steps} steps end within the warm-up of {cfg.warmup}, so little will be "
            "learned; raise --epochs or take fewer tokens (or pairs) a step"
        )
    return steps


def context_of(cfg: TrainConfig, model: Phi) -> int:
    """--context, or the model's context.

    Raises a UserError if it is longer: it would train positions that the model has never seen.
    """
    longest = model.cfg.max_position_embeddings
    if cfg.context is not None and cfg.context > longest:
        raise UserError(
            f"--context {cfg.context} exceeds the {longest} tokens the model was made for"
        )
    return cfg.context or longest
