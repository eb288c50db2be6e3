"""Keeps what native code writes to stderr apart from what k2flow says there.

When an error ends a dataflow, Bytewax's Rust side prints a panic message and a backtrace of many lines that tell a user
nothing; librdkafka and glibc may add theirs.
"""

import os
import sys
import tempfile
from types import TracebackType
from typing import IO

STDERR = 2


class NativeStderr:
    """While it is entered, file descriptor 2 leads into an unnamed file, and Python's stderr to where it led before."""

    def __enter__(self) -> "NativeStderr":
        sys.stderr.flush()
        self._file: IO[bytes] = tempfile.TemporaryFile()
        self._before = os.dup(STDERR)
        os.dup2(self._file.fileno(), STDERR)
        self._python = sys.stderr
        sys.stderr = os.fdopen(os.dup(self._before), "w", buffering=1)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        sys.stderr.flush()
        os.dup2(self._before, STDERR)
        sys.stderr = self._python

    def text(self) -> str:
        """What native code has written so far."""
        size = os.fstat(self._file.fileno()).st_size
        return os.pread(self._file.fileno(), size, 0).decode("utf-8", "replace")
