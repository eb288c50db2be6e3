"""Separates the standard error of native code from that of Python.

When an error ends a dataflow, Bytewax's Rust code prints a panic message and a backtrace of many lines that do not help
a user. librdkafka and glibc may print lines of their own.
"""

import os
import sys
import tempfile
from types import TracebackType
from typing import IO, Self

STDERR = 2


class NativeStderr:
    """Sends file descriptor 2 into an unnamed file while entered; Python's `sys.stderr` still reaches the terminal."""

    def __enter__(self) -> Self:
        sys.stderr.flush()
        self._file: IO[bytes] = tempfile.TemporaryFile()
        self._terminal = os.dup(STDERR)
        os.dup2(self._file.fileno(), STDERR)
        self._python_stderr = sys.stderr
        sys.stderr = os.fdopen(os.dup(self._terminal), "w", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.flush()
        os.dup2(self._terminal, STDERR)
        sys.stderr = self._python_stderr

    def text(self) -> str:
        """Return the output of native code so far."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), size, 0).decode("utf-8", "replace")
