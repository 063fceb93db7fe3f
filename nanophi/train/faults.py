"""What goes wrong while training: losses that jump or are not finite, the compiler."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, TypeVar

import torch

from nanophi.cli import UserError
from nanophi.files import replacing
from nanophi.train.packing import Batch

if TYPE_CHECKING:
    from nanophi.train.rundir import RunDirectory

T = TypeVar("T")

STREAK = 10  # skipped steps in a row after which a run gives up
MEMORY = 50  # steps whose losses say what is usual
BAD_BATCH = "bad-batch.pt"


@dataclass
class Faults:
    """Watches the losses of a run. A checkpoint need not hold it, because it changes nothing."""

    streak: int = 0  # skipped steps in a row
    losses: deque = field(default_factory=lambda: deque(maxlen=MEMORY))

    def look_at(self, line: dict[str, float], finite: bool) -> list[str]:
        """Notes on a step. finite: its loss and gradient were finite."""
        loss = line["loss"]
        step = f"step {line['step']:,}"
        if not finite:
            self.streak += 1
            return [f"{step}: loss {loss:.3g}, gradient {line['grad_norm']:.3g}: skipped"]
        self.streak = 0
        notes = []
        if len(self.losses) == MEMORY:
            usual = statistics.median(self.losses)
            spread = statistics.median(abs(value - usual) for value in self.losses)
            if loss > usual + 10 * spread + 0.5:
                notes.append(f"{step}: loss {loss:.3f} jumped from about {usual:.3f}")
        self.losses.append(loss)
        return notes

    def watch(
        self,
        line: dict[str, float],
        finite: bool,
        batch: Batch,
        run: "RunDirectory",
        say: Callable[[str], None],
    ) -> None:
        """Print the notes on a step. After STREAK skipped steps in a row, raise a UserError.

        The batch of the last one is kept beside the last checkpoint, which stays as it is.
        """
        for note in self.look_at(line, finite):
            say(note)
        if self.streak < STREAK:
            return
        path = run.out / BAD_BATCH
        if run.world.first:
            with replacing(path) as beside:
                torch.save(asdict(batch), beside)
        raise UserError(
            f"{STREAK} steps in a row had a loss or gradient that is not finite; the last batch is "
            f"in {path}, the last checkpoint is sound. Lower --lr, raise --warmup, or with "
            "--dtype float16 take bfloat16 or float32"
        )


def or_uncompiled(
    function: Callable[..., T], uncompile: Callable[[], None], say: Callable[[str], None]
) -> Callable[..., T]:
    """A function that runs a compiled model, with a way back.

    The compiler works at the first call, and again where a later one has other shapes. If it fails
    (no compiler, an operation that it does not know, a kernel that does not start), the model is
    uncompiled and the call done again. A training step and a validation are compiled each by
    itself, so both need it.
    """
    calls = 0

    def guarded(*args, **named) -> T:
        nonlocal calls
        calls += 1
        graphs = graphs_made()
        try:
            return function(*args, **named)
        except (UserError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            # Where the compiler has just worked, any failure may be of what it made.
            has_worked = calls == 1 or graphs_made() > graphs
            if not (has_worked or _is_of_the_compiler(error)):
                raise
            reason = str(error).strip().split("\n")[0][:200]
            say(f"torch.compile failed, going on without it: {type(error).__name__}: {reason}")
            uncompile()
            return function(*args, **named)

    return guarded


def graphs_made() -> int:
    """How many graphs the compiler has made in this process."""
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def _is_of_the_compiler(error: Exception) -> bool:
    from torch._dynamo.exc import TorchDynamoException  # takes a second to import

    return isinstance(error, TorchDynamoException)
