"""A timeout for calls without one: database drivers and HTTP clients wait forever for a frozen server."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeadlinePassedError(Exception):
    """A call did not end in time."""


def run_with_timeout(seconds: float, call: Callable[[], T]) -> T:
    """Return or raise the result of `call`, run in a thread of its own.

    After a timeout the call continues in its thread, and may still take effect. The caller must end the process, or
    check the effect before it repeats the call.

    Raises:
        DeadlinePassedError: the call took longer than `seconds`.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="run_with_timeout", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    raise DeadlinePassedError(f"no answer within {seconds:g} s")
