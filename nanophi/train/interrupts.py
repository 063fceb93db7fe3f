"""Ctrl-C and SIGTERM during training: the current step is finished and saved. A second Ctrl-C stops
at once, and the last checkpoint stays.
"""

import contextlib
import os
import signal
from types import FrameType

from nanophi.cli import is_first_rank

NOTE = b"\nfinishing this step and saving; Ctrl-C again stops at once\n"


class Interrupts:
    """While active, the first SIGINT or SIGTERM only sets `signal`, which the loop reads."""

    def __init__(self) -> None:
        self.signal = 0  # the number of the last signal, 0 where none has come
        self.handlers: dict = {}  # those that were installed before

    def __enter__(self) -> "Interrupts":
        with contextlib.suppress(ValueError):  # outside of the main thread no handler can be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        # torchrun sends the signals of the terminal once more to its ranks: there the second one
        # says nothing new.
        under_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
        if self.signal and number == signal.SIGINT and not under_torchrun:
            raise KeyboardInterrupt
        if not self.signal and number == signal.SIGINT and is_first_rank():
            # Not print: the signal may have come while something else is printed.
            with contextlib.suppress(OSError):
                os.write(2, NOTE)
        self.signal = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
