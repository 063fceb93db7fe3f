"""The same work on many items in several processes, with the results in order.

    items      0  1  2  3  4  5  6  7      `batches` makes them large enough to be worth sending
    worker A   0     2  3        6
    worker B      1        4  5     7      whichever is free takes the next item
    results    0  1  2  3  4  5  6  7      `ordered` yields them in the order of the items

It needs the standard library only and stands below all rooms, so that each of them may use it.
"""

import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import islice
from multiprocessing import connection, get_context, parent_process
from typing import Any, TypeVar

from nanophi.cli import UserError

A = TypeVar("A")
B = TypeVar("B")

ITEMS_A_WORKER = 3  # submitted at most and not yet yielded: one in work, two waiting


def batches(
    items: Iterable[A], size: int, size_of: Callable[[Any], int] = len
) -> Iterator[list[A]]:
    """Lists of consecutive items. A list ends with the item that makes its sizes sum to `size` or
    more; the last list may be smaller.

    >>> list(batches(["春天", "来了", "小草从土里探出头", "好"], 4))
    [['春天', '来了'], ['小草从土里探出头'], ['好']]
    """
    batch: list[A] = []
    total = 0  # sizes of the items in `batch`
    for item in items:
        batch.append(item)
        total += size_of(item)
        if total >= size:
            yield batch
            batch = []
            total = 0
    if batch:
        yield batch


def ordered(work: Callable[[A], B], items: Iterable[A], workers: int) -> Iterator[B]:
    """work(item) for each item, in the order of the items.

    work: a function of a module, or a partial of one, because it is pickled
    workers: processes; with 1 the work is done here, without any other process

    Items are taken from the iterator only when a result has been yielded: a few for each worker are
    under way. So neither waiting items nor finished results fill the memory.

    >>> list(ordered(len, ["一", "一二", ""], workers=1))
    [1, 2, 0]
    """
    if workers <= 1:
        yield from map(work, items)
        return
    items = iter(items)
    with ProcessPoolExecutor(workers, get_context("forkserver"), _start, (work,)) as pool:
        first_items = islice(items, ITEMS_A_WORKER * workers)
        under_way: deque[Future] = deque(pool.submit(_do, item) for item in first_items)
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


# ---- in a worker process

_work: Callable  # what this process does with each item; `_start` sets it


def _start(work: Callable) -> None:
    """Prepare this process. The work is sent once, not with every item: it may be large."""
    global _work
    _work = work
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # Ctrl-C interrupts every process of the terminal. Only the parent handles it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _end_with_parent() -> None:
    """End this process when its parent has ended. A killed parent cannot end its workers itself."""
    parent = parent_process()
    assert parent is not None
    connection.wait([parent.sentinel])
    os._exit(1)


def _do(item: Any) -> Any:
    return _work(item)
