"""Requests to the storage at the same time: as many as a slow one needs, in bounded memory.

A request to an object store takes tens of milliseconds, whatever its size. So threads do not wait for each other, but
the bytes that they hold at once are bounded. What takes CPU runs on as many threads as there are cores.
"""

import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
THREADS = 64
CORES = os.cpu_count() or 1


class ByteBudget:
    """Bounds the bytes that threads hold at once. More than the whole budget is granted if nothing else is held."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0
        self._changed = threading.Condition()

    def take(self, size: int) -> None:
        """Wait until `size` bytes fit, and take them."""
        with self._changed:
            self._changed.wait_for(lambda: not self._held or self._held + size <= self._limit)
            self._held += size

    def give_back(self, size: int) -> None:
        """Give back bytes that were taken."""
        with self._changed:
            self._held -= size
            self._changed.notify_all()


def read_ahead(calls: Iterable[tuple[int, Callable[[], T]]], limit: int) -> Iterator[T]:
    """Yield the results of `calls` in their order, computed by up to THREADS threads ahead of the caller.

    Each call comes with the bytes of its result. Together the results that wait hold at most `limit` bytes, or one
    result. An error of a call is raised in its place; later ones are then cancelled.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    held = 0
    with ThreadPoolExecutor(THREADS, "read ahead") as pool:
        try:
            for size, call in calls:
                while waiting and (held + size > limit or len(waiting) >= 2 * THREADS):
                    done, result = waiting.popleft()
                    held -= done
                    yield result.result()
                waiting.append((size, pool.submit(call)))
                held += size
            while waiting:
                yield waiting.popleft()[1].result()
        finally:
            for _, result in waiting:
                result.cancel()
