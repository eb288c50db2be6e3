"""Starts `python -m MODULE` in processes that have imported everything already: that is most of a short run's CPU.

Each is forked from a server that has done nothing but import, and gets arguments, environment and output as a new
process does. `k2flow run` starts real ones of flows, in the tests of it.
"""

import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from multiprocessing.context import ForkServerProcess
from multiprocessing.reduction import DupFd
from pathlib import Path
from typing import Any, Protocol

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(["tests.integration.preloaded"])


class Started(Protocol):
    """What is done with a process, as subprocess.Popen has it."""

    pid: int

    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """One of them; `outputs` are the file descriptors of its standard output and error."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        outputs: tuple[int, int],
    ) -> None:
        told = (module, list(arguments), dict(environment), str(folder), [_Output(each) for each in outputs])
        self._process = ForkServerProcess(target=_run, args=told, daemon=True)
        self._process.start()
        self.pid: int = self._process.pid  # type: ignore[assignment]

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired(self._process.name, timeout or 0)
        return self._process.exitcode

    def send_signal(self, sig: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, sig)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def call(
    module: str, arguments: Sequence[str], environment: Mapping[str, str], folder: Path, seconds: float = 60
) -> subprocess.CompletedProcess[bytes]:
    """Runs one to its end, as subprocess.run does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Forked(module, arguments, environment, folder, (out.fileno(), err.fileno()))
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        said = [os.pread(each.fileno(), os.fstat(each.fileno()).st_size, 0) for each in (out, err)]
        return subprocess.CompletedProcess([module, *arguments], code, *said)


class _Output:
    """A file descriptor that goes to a process when it is started."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _taken, (DupFd(self._descriptor),)


def _taken(descriptor: Any) -> int:
    return int(descriptor.detach())


def _run(module: str, arguments: list[str], environment: dict[str, str], folder: str, outputs: list[int]) -> None:
    for standard, output in enumerate(outputs, 1):
        os.dup2(output, standard)
        os.close(output)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
