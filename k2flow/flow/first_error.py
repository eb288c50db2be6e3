"""The first error that stopped this process's dataflow.

Bytewax loses tracebacks in a process that is one of several, and wraps exceptions in others. While it unwinds, it
panics, and an abort there would hide the reason. So every callback that it calls is decorated with
`record_first_error`: the process ends in the callback that fails, with a line for its error.
"""

import functools
import logging
import threading
from collections.abc import Callable
from typing import ParamSpec, TypeVar

log = logging.getLogger(__name__)
P = ParamSpec("P")
R = TypeVar("R")
_lock = threading.Lock()
_first: BaseException | None = None
_end: Callable[[BaseException], None] | None = None


def record_first_error(callback: Callable[P, R]) -> Callable[P, R]:
    """Decorate a callback: its exception is recorded, logged at DEBUG with its traceback, and ends the process.

    If `end_at_first_error` was not called, or another exception came first, it is raised.
    """

    @functools.wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return callback(*args, **kwargs)
        except StopIteration:  # the regular end of a source
            raise
        except Exception as error:
            global _first
            with _lock:
                _first = _first or error
            log.debug("callback failed", exc_info=error)
            if _end is not None and _first is error:
                _end(error)
            raise

    return call


def end_at_first_error(end: Callable[[BaseException], None]) -> None:
    """Call `end` with the error of the callback that fails first, in that callback. It ends the process."""
    global _end
    _end = end


def first_error() -> BaseException | None:
    """Return the first recorded error."""
    return _first
