"""The first error that stopped this process's dataflow.

Bytewax loses tracebacks in a process that is one of several and wraps exceptions in others, so every callback that it
calls is `record_first_error`: the error is kept here, for the one line that the process ends with.
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


def record_first_error(callback: Callable[P, R]) -> Callable[P, R]:
    """`callback`, whose exceptions are kept, record_first_error at DEBUG with their traceback, and raised on."""

    @functools.wraps(callback)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        try:
            return callback(*args, **kwargs)
        except StopIteration:  # the regular end of a source
            raise
        except Exception as error:
            keep(error)
            raise

    return call


def keep(error: BaseException) -> None:
    """Remembers `error` if it is the first one."""
    global _first
    with _lock:
        if _first is None:
            _first = error
    log.debug("callback failed", exc_info=error)


def first() -> BaseException | None:
    """The first error that was kept."""
    return _first
