"""How the process of a command repeats its work until a signal, and how it ends after an error."""

import io
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from k2flow.errors import K2flowError
from k2flow.printable import printable
from k2flow.process_exit import ERROR_PREFIX

DEBUG = "K2FLOW_DEBUG"
EXIT_BROKEN_PIPE = 128 + signal.SIGPIPE
TRUE = {"1", "true", "t", "yes", "y", "on"}


@contextmanager
def exit_on_error(
    code: int, context: str = "", kind: type[K2flowError] = K2flowError, retryable_code: int | None = None
) -> Iterator[None]:
    """Print an error of this kind as one line on standard error, after `context`, and exit with `code`.

    Retryable errors exit with `retryable_code`, if it is given. With --debug the error passes, and Python prints its
    traceback.
    """
    try:
        yield
    except kind as error:
        if os.environ.get(DEBUG, "").lower() in TRUE:
            raise
        print(f"{ERROR_PREFIX}{context}{printable(str(error))}", file=sys.stderr)
        raise SystemExit(retryable_code if error.retryable and retryable_code is not None else code) from None


@contextmanager
def any_output() -> Iterator[None]:
    """Let the command write any text to any terminal or pipe.

    Characters that the encoding lacks are escaped. If the reader of standard output leaves, as `head` does, the command
    ends without an error line, as if SIGPIPE had ended it.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    output = sys.stdout
    try:
        try:
            yield
        finally:
            output.flush()  # or Python would report the broken pipe when it exits
            if sys.stdout is not output:  # Typer has met it
                raise BrokenPipeError
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), output.fileno())
        raise SystemExit(EXIT_BROKEN_PIPE) from None


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
