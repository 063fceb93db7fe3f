"""Ctrl-C and SIGTERM during training: the current step is finished and saved."""

import contextlib
import signal
from types import FrameType


class Interrupts:
    """While active, SIGINT and SIGTERM only set `signal`, which the loop reads."""

    def __init__(self) -> None:
        self.signal = 0  # the number of the last signal, 0 where none has come
        self.handlers: dict = {}  # those that were installed before

    def __enter__(self) -> "Interrupts":
        with contextlib.suppress(ValueError):  # outside of the main thread no handler can be set
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.signal = number

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
