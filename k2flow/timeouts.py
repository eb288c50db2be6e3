"""A timeout for calls without one: database drivers and HTTP clients wait forever for a frozen server."""

import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from typing import TypeVar

T = TypeVar("T")


class DeadlinePassedError(Exception):
    """A call did not end in time."""


def run_with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Return or raise the result of `call`, run in a thread of its own. Raises DeadlinePassedError after `seconds`.

    After a timeout the call continues in its thread, and may still take effect. The caller must end the process, or
    check the effect before it repeats the call.
    """
    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            future.set_exception(error)

    threading.Thread(target=run, name="run_with_timeout", daemon=True).start()
    if not wait([future], seconds).done:
        raise DeadlinePassedError(f"no answer within {seconds:g} s")
    return future.result()
