"""The file of a run, mapped into memory; a change by another program is noticed."""

import mmap
import os
import weakref
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from k2flow.errors import CacheError

Records: TypeAlias = npt.NDArray[Any]


class RunFile:
    """The records of a file. The file may be deleted or replaced by another one, but not changed, while it is used."""

    def __init__(self, path: Path, kind: np.dtype[Any], handle: int | None = None) -> None:
        """Map the whole file, or that of an open `handle`, which may no longer be at `path`.

        Raises CacheError if it ends within a record, and OSError.
        """
        self.path = path
        self._handle = os.open(path, os.O_RDONLY) if handle is None else os.dup(handle)
        weakref.finalize(self, os.close, self._handle)
        self._opened = self._state()
        size, _ = self._opened
        if size % kind.itemsize:
            raise CacheError(f"{path.name} ends within a record")
        self._map = mmap.mmap(self._handle, size, access=mmap.ACCESS_READ) if size else None
        self.records: Records = np.frombuffer(self._map, kind) if self._map else np.empty(0, kind)

    def check(self) -> None:
        """Raise CacheError if another program has changed the file since it was opened.

        Else a look-up could miss an id. Behind the end of a file that became shorter, it would kill the process.
        """
        if self._state() != self._opened:
            raise CacheError(
                f"{self.path} was changed while the flow used it: start the flow again, which reads its ids from Gold"
            )

    def forget_pages(self) -> None:
        """Unmap what was read: it stays in the kernel's cache, but is no memory of this process."""
        if self._map:
            self._map.madvise(mmap.MADV_DONTNEED)

    def _state(self) -> tuple[int, int]:
        status = os.fstat(self._handle)
        return status.st_size, status.st_mtime_ns
