"""Runs a command as a process of its own and says what it took, by the kernel's own account."""

import os
import platform
import subprocess
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version


@dataclass(frozen=True)
class Usage:
    """One finished process: `wall` and `cpu` (user and system, all its threads) in seconds, `peak` resident bytes."""

    wall: float
    cpu: float
    peak: int

    def beyond(self, baseline: "Usage") -> "Usage":
        """Without what `baseline` took: start-up and imports."""
        return Usage(self.wall - baseline.wall, self.cpu - baseline.cpu, self.peak)


def run(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Runs `command` to its end. Raises subprocess.CalledProcessError, with its output, where it fails."""
    began = time.perf_counter()
    with subprocess.Popen(
        command, env={**os.environ, **environment}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdout is not None
        output = process.stdout.read()
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - began
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command, output)
    return Usage(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024)


def machine() -> str:
    """The machine and the versions that figures depend on."""
    packages = ("bytewax", "confluent-kafka", "numpy", "pyarrow", "pyiceberg")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
