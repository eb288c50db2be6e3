"""How the process of a command repeats its work until a signal, and how it ends after an error."""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from k2flow.errors import K2flowError
from k2flow.process_exit import ERROR_PREFIX

DEBUG = "K2FLOW_DEBUG"
TRUE = {"1", "true", "t", "yes", "y", "on"}


@contextmanager
def exit_on_error(code: int, context: str = "") -> Iterator[None]:
    """Print a K2flowError as one line on standard error, after `context`, and exit with `code`.

    With --debug the error passes, and Python prints its traceback.
    """
    try:
        yield
    except K2flowError as error:
        if os.environ.get(DEBUG, "").lower() in TRUE:
            raise
        print(f"{ERROR_PREFIX}{context}{error}", file=sys.stderr)
        raise SystemExit(code) from None


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set, so that the current step can finish."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda _number, _frame: stop.set())
    return stop


def every(seconds: float, stop: threading.Event) -> Iterator[None]:
    """Yield at once, then every `seconds` from start to start, until `stop` is set. A longer turn delays the next."""
    while True:
        began = time.monotonic()
        yield
        if stop.wait(max(0.0, seconds - (time.monotonic() - began))):
            return
