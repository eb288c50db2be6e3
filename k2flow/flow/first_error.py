"""The first error that stopped this process's dataflow.

Bytewax loses tracebacks in a process that is one of several, and wraps exceptions in others. So every callback that it
calls is decorated with `record_first_error`. The recorded error gives the line that the process ends with.
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
    """Decorate a callback: its exceptions are recorded, logged at DEBUG with their traceback, and raised again."""

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
            raise

    return call


def first_error() -> BaseException | None:
    """Return the first recorded error."""
    return _first
