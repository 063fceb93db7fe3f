"""What goes wrong while training: losses that jump, gradients that are no numbers."""

import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import TypeVar

import torch

from nanophi.cli import UserError
from nanophi.files import replacing
from nanophi.model.phi import Phi
from nanophi.train.packing import Batch

T = TypeVar("T")

STREAK = 10  # skipped steps in a row after which a run gives up
MEMORY = 50  # steps whose losses say what is usual
BAD_BATCH = "bad-batch.pt"


@dataclass
class Faults:
    """Watches the steps of a run. It changes nothing, so that it need not be saved with a checkpoint."""

    streak: int = 0
    losses: deque = field(default_factory=lambda: deque(maxlen=MEMORY))

    def look_at(self, line: dict, sound: bool) -> list[str]:
        """Notes on a step, given its line of metrics and whether its loss and gradient were finite."""
        loss, notes = line["loss"], []
        if not sound:
            self.streak += 1
            return [
                f"step {line['step']:,}: loss {loss:.3g}, gradient {line['grad_norm']:.3g}: skipped"
            ]
        self.streak = 0
        if len(self.losses) == MEMORY:
            usual = statistics.median(self.losses)
            spread = statistics.median(abs(value - usual) for value in self.losses)
            if loss > usual + 10 * spread + 0.5:
                notes = [f"step {line['step']:,}: loss {loss:.3f} jumped from about {usual:.3f}"]
        self.losses.append(loss)
        return notes

    @property
    def hopeless(self) -> bool:
        return self.streak >= STREAK

    def give_up(self, run, batch: Batch) -> str:
        """Save the batch beside the run's last checkpoint, which stays as it is; returns what to say."""
        path = run.out / BAD_BATCH
        if run.world.first:
            with replacing(path) as beside:
                torch.save(asdict(batch), beside)
        return (
            f"{STREAK} steps in a row had a loss or gradient that is not finite; the last batch is in {path}, the last "
            "checkpoint is sound. Lower --lr, raise --warmup, or with --dtype float16 take bfloat16 or float32"
        )


def compiled_or_not(model: Phi, step: Callable[[], T], say: Callable[[str], None]) -> T:
    """A step with torch.compile, or where that fails (no compiler, an operation it does not know) once more without."""
    try:
        return step()
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = str(error).strip().split("\n")[0][:200]
        say(f"torch.compile failed, going on without it: {type(error).__name__}: {reason}")
        model.compile_blocks(False)
        return step()
