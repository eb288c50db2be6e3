"""Starts `python -m MODULE` in processes with everything already imported: imports are most of a short run's CPU.

Each process is forked from a server that has only imported modules. It gets arguments, environment and output as a new
process does. Tests of `k2flow run` start real processes of flows.
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
    """A started process, with the methods of subprocess.Popen."""

    pid: int

    @property
    def returncode(self) -> int | Any: ...
    def poll(self) -> int | None: ...
    def wait(self, timeout: float | None = None) -> int: ...
    def send_signal(self, sig: int) -> None: ...
    def kill(self) -> None: ...


class Forked:
    """One forked process; `outputs` are the file descriptors of its standard output and error."""

    def __init__(
        self,
        module: str,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        outputs: tuple[int, int],
    ) -> None:
        arguments_of_run = (
            module,
            list(arguments),
            dict(environment),
            str(folder),
            [_Output(each) for each in outputs],
        )
        self._process = ForkServerProcess(target=_run, args=arguments_of_run, daemon=True)
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
    """Run a module to its end, as subprocess.run does."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = Forked(module, arguments, environment, folder, (out.fileno(), err.fileno()))
        try:
            code = process.wait(seconds)
        finally:
            process.kill()
        outputs = [os.pread(each.fileno(), os.fstat(each.fileno()).st_size, 0) for each in (out, err)]
        return subprocess.CompletedProcess([module, *arguments], code, *outputs)


class _Output:
    """A file descriptor that is passed to a process at its start."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor

    def __reduce__(self) -> tuple[Any, tuple[Any]]:
        return _received, (DupFd(self._descriptor),)


def _received(descriptor: Any) -> int:
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
