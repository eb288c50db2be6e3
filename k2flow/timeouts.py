"""A time limit for calls that have none: drivers of databases and HTTP clients wait for ever for a frozen server."""

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


class DeadlinePassedError(Exception):
    """A call has not ended in time."""


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. Raises DeadlinePassedError if it takes longer than `seconds`.

    The call then goes on in its own thread, and may still take effect: whoever gives up must end the process, or look
    before doing it again.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again in the caller's thread
            errors.append(error)

    thread = threading.Thread(target=run, name="within", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if results:
        return results[0]
    raise DeadlinePassedError(f"no answer within {seconds:g} s")
