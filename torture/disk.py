"""The disk of the tables, which can fill up: a small file system in memory, if this process may mount one."""

import contextlib
import resource
import shutil
import subprocess
from collections.abc import Iterable, Iterator
from pathlib import Path

FILE_BYTES = 512


class Disk:
    """Holds the folder of the tables. Without the right to mount, a limit on file size stops the processes instead."""

    def __init__(self, folder: Path, seconds: float) -> None:
        self._folder = folder
        self._megabytes = 256 + 4 * int(seconds)
        folder.mkdir(parents=True)
        mount = ["mount", "-t", "tmpfs", "-o", f"size={self._megabytes}m", "tmpfs", str(folder)]
        self.mounted = shutil.which("mount") is not None and (
            subprocess.run(mount, check=False, stderr=subprocess.DEVNULL).returncode == 0
        )

    @contextlib.contextmanager
    def full(self, pids: Iterable[int]) -> Iterator[None]:
        """Stop every file from growing while the context lasts."""
        if self.mounted:
            while not self._resize(f"{shutil.disk_usage(self._folder).used}"):
                pass  # it has grown since it was measured
        else:
            limited = [(pid, limit) for pid in pids if (limit := _limit(pid, (FILE_BYTES, resource.RLIM_INFINITY)))]
        try:
            yield
        finally:
            if self.mounted:
                self._resize(f"{self._megabytes}m")
            else:
                for pid, limit in limited:
                    _limit(pid, limit)

    def close(self) -> None:
        if self.mounted:
            subprocess.run(["umount", "-l", str(self._folder)], check=False)

    def _resize(self, size: str) -> bool:
        command = ["mount", "-o", f"remount,size={size}", str(self._folder)]
        return subprocess.run(command, check=False, stderr=subprocess.DEVNULL).returncode == 0


def _limit(pid: int, limit: tuple[int, int]) -> tuple[int, int] | None:
    """Limit the size of the files that a process writes. Return the limit before, or None if the process has ended."""
    with contextlib.suppress(ProcessLookupError):
        return resource.prlimit(pid, resource.RLIMIT_FSIZE, limit)
    return None
