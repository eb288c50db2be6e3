"""A timeout for calls without one: database drivers and HTTP clients wait forever for a frozen server.

It counts from the last sign of progress, so that a slow storage that answers is never taken for a hung one.
"""

import itertools
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")
CHECKS = 10  # of the progress, in the time of a timeout


class DeadlinePassedError(Exception):
    """A call made no progress in time."""


class Progress:
    """Counts what this process has achieved of some kind."""

    def __init__(self) -> None:
        self._numbers = itertools.count(1)
        self.count = 0

    def made(self) -> None:
        """Note one more. Any thread may call it."""
        self.count = next(self._numbers)


REQUESTS = Progress()  # requests to the storage that began
SENT = Progress()  # data files, and parts of them, that the storage has accepted


def run_with_timeout(seconds: float, call: Callable[[], T], progress: Progress | None = None) -> T:
    """Return or raise the result of `call`, run in a thread of its own.

    Raises DeadlinePassedError after `seconds`; with `progress`, only after `seconds` in which it counted nothing. Then
    the call continues in its thread, and may still take effect. The caller must end the process, or check the effect
    before it repeats the call.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            future.set_exception(error)

    threading.Thread(target=run, name="run_with_timeout", daemon=True).start()
    seen, since = _count(progress), time.monotonic()
    while not wait([future], seconds / CHECKS).done:
        if _count(progress) != seen:
            seen, since = _count(progress), time.monotonic()
        elif time.monotonic() - since >= seconds:
            raise DeadlinePassedError(f"no answer within {seconds:g} s")
    return future.result()


def _count(progress: Progress | None) -> int:
    return progress.count if progress else 0
