"""The same work on many items with several processes, results in order."""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import TypeVar

from nanophi.cli import UserError

A, B = TypeVar("A"), TypeVar("B")


def batches(texts: Iterable[A], size: int, of: Callable[[A], int] = len) -> Iterator[list[A]]:
    """Lists of consecutive items, each as soon as its sizes sum to `size`."""
    held, total = [], 0
    for item in texts:
        held.append(item)
        total += of(item)
        if total >= size:
            yield held
            held, total = [], 0
    if held:
        yield held


def ordered(work: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """work(item) for each item, in order; with several workers, at most three items a worker are under way, so that
    neither waiting items nor finished results fill the memory. `work` is a module's function, or a partial of one."""
    if workers <= 1:
        yield from map(work, items)
        return
    items = iter(items)
    with ProcessPoolExecutor(workers, get_context("forkserver"), _start, (work,)) as pool:
        under_way = deque(pool.submit(_do, item) for item in islice(items, 3 * workers))
        try:
            while under_way:
                try:
                    yield under_way.popleft().result()
                except BrokenProcessPool:
                    raise UserError(
                        "a worker process died, perhaps for want of memory: take fewer --workers"
                    ) from None
                under_way.extend(pool.submit(_do, item) for item in islice(items, 1))
        finally:
            pool.shutdown(cancel_futures=True)


_work: Callable  # of a worker process: what it does with each item, sent to it once


def _start(work: Callable) -> None:
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    signal.signal(
        signal.SIGINT, signal.SIG_IGN
    )  # Ctrl-C reaches every process; the parent alone deals with it


def _end_with_parent() -> None:
    """A parent that is killed cannot say so."""
    connection.wait([parent_process().sentinel])
    os._exit(1)


def _do(item):
    return _work(item)
