"""What a process writes on standard error: its log, without the lines of native code."""

import logging
import os
import sys
import tempfile
import warnings
from typing import IO, Self

from typing_extensions import override

from k2flow.printable import printable

STDERR = 2
JSON_NAMES = {"levelname": "level", "name": "logger"}
"""Names of the JSON fields that differ from those of Python's log records."""


def set_up_logging(level: str, log_format: str = "text") -> None:
    """Write records of at least `level` to standard error, one line each, as text or as JSON.

    PyIceberg's warnings about its own experimental features are hidden: users cannot act on them. So are the lines of
    libraries about each request.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"
    handler.setFormatter(_json_formatter() if log_format == "json" else _LineFormatter(text))
    logging.basicConfig(level=level, handlers=[handler], force=True)
    for library in ("pyiceberg", "httpx2"):
        logging.getLogger(library).setLevel(max(logging.WARNING, logging.getLogger().level))
    warnings.filterwarnings("ignore", module="pyiceberg")


class _LineFormatter(logging.Formatter):
    """A record is one line, whatever values its message has; a traceback follows on lines of its own."""

    @override
    def formatMessage(self, record: logging.LogRecord) -> str:
        return printable(super().formatMessage(record))


def _json_formatter() -> logging.Formatter:
    from pythonjsonlogger.json import JsonFormatter

    return JsonFormatter("%(levelname)s %(name)s %(message)s", rename_fields=JSON_NAMES, timestamp="time")


class ClientLog:
    """A logger for librdkafka clients: their lines become DEBUG records of `log`.

    librdkafka logs each failed attempt, although it retries. A failure that lasts reaches the user as an error.
    """

    def __init__(self, log: logging.Logger) -> None:
        self._log = log

    def log(self, level: int, message: str, *args: object) -> None:
        """Log a line of librdkafka, whatever its level."""
        self._log.debug(message, *args)


class NativeStderr:
    """Sends file descriptor 2 into an unnamed file while entered; Python's `sys.stderr` still reaches the terminal.

    When an error ends a dataflow, Bytewax's Rust code prints a panic message and a long backtrace, which do not help a
    user. librdkafka and glibc may print lines of their own.
    """

    def __enter__(self) -> Self:
        sys.stderr.flush()
        self._file: IO[bytes] = tempfile.TemporaryFile()
        self._terminal = os.dup(STDERR)
        os.dup2(self._file.fileno(), STDERR)
        self._python_stderr = sys.stderr
        encoding = sys.stderr.encoding
        sys.stderr = os.fdopen(os.dup(self._terminal), "w", 1, encoding=encoding, errors="backslashreplace")
        return self

    def __exit__(self, *_: object) -> None:
        sys.stderr.flush()
        os.dup2(self._terminal, STDERR)
        sys.stderr = self._python_stderr

    def text(self) -> str:
        """Return the output of native code so far."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), size, 0).decode("utf-8", "replace")
