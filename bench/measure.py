"""Runs commands as separate processes and measures them: by the kernel, by samples, and by their log."""

import contextlib
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import TypeVar

import psutil

SAMPLE_SECONDS = 0.25
POLL_SECONDS = 0.02
STARTED = ": trigger "
"""A flow logs this when it is about to read."""
START_SECONDS = 60.0
STOP_SECONDS = 60.0
LOG_END = 4_000
T = TypeVar("T")

_TIME = r"^(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) "
_STARTED = re.compile(_TIME + r".*" + STARTED, re.MULTILINE)
_COMMIT = re.compile(
    _TIME + r".* (\w+): \d+ rows in \d+ files from (\d+) offsets, commit (\d+) in (\d+) ms$", re.MULTILINE
)


@dataclass(frozen=True)
class Usage:
    """One finished process, with the processes that it started and waited for.

    `wall` and `cpu` (user and system, all threads) are in seconds; `peak` is the resident bytes of the largest process.
    """

    wall: float
    cpu: float
    peak: int
    output: str = ""

    def minus(self, baseline: "Usage") -> "Usage":
        """Subtract the time of `baseline`: start-up and imports."""
        return Usage(self.wall - baseline.wall, self.cpu - baseline.cpu, self.peak, self.output)


class Stopwatch:
    """Sums the time of its `with` blocks: `wall` and `cpu` (all threads of this process), in seconds."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def in_child(function: Callable[..., T], *arguments: object) -> T:
    """Call a function in a new process and return its result: its memory can be measured, and it is no second writer.

    A flow refuses to start while another writer of its tables runs.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def run(command: Sequence[str], environment: Mapping[str, str]) -> Usage:
    """Run `command` to its end. Raise subprocess.CalledProcessError, with its output, if it fails."""
    began = time.perf_counter()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=output, stderr=subprocess.STDOUT)
        peak, ended = 0, 0
        while not ended:
            time.sleep(POLL_SECONDS)
            peak = max(peak, peak_resident(process.pid))
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        wall = time.perf_counter() - began
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        text = output.read().decode(errors="replace")
    if process.returncode:
        error = subprocess.CalledProcessError(process.returncode, command, text)
        error.add_note(text)
        raise error
    return Usage(wall, used.ru_utime + used.ru_stime, peak, text)


def peak_resident(pid: int) -> int:
    """Return the peak resident bytes of a process or of one of its descendants, whichever is largest.

    (Their rusage would start at the peak of this process.)
    """
    try:
        found = re.search(r"^VmHWM:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
        threads = Path(f"/proc/{pid}/task").glob("*/children")
        children = [child for thread in threads for child in thread.read_text().split()]
    except OSError:
        return 0
    own = int(found[1]) * 1024 if found else 0  # none once it has ended
    return max([own, *(peak_resident(int(child)) for child in children)])


class FlowProcess:
    """The flow of one exchange as a separate process; its `log` is a file under K2FLOW_HOME."""

    def __init__(self, exchange: str, environment: Mapping[str, str]) -> None:
        home = Path(environment["K2FLOW_HOME"])
        home.mkdir(parents=True, exist_ok=True)
        self.log = home / f"{exchange}.log"
        command = [sys.executable, "-m", "bytewax.run", f"flows.{exchange}"]
        with self.log.open("wb") as out:
            self.process = subprocess.Popen(command, env={**os.environ, **environment}, stdout=out, stderr=out)

    def wait_until_reading(self) -> None:
        """Wait until the flow reads. Raise RuntimeError, with the end of the log, if it does not start."""
        deadline = time.monotonic() + START_SECONDS
        while STARTED not in self.log.read_text(errors="replace"):
            if self.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the flow did not start: {self._last_words()}")
            time.sleep(0.05)

    def end(self) -> None:
        """Let the flow drain and commit. Raise RuntimeError, with the end of the log, if it fails."""
        self.process.terminate()
        self.check()

    def check(self) -> None:
        """Wait until the flow has ended. Raise RuntimeError, with the end of the log, if it failed."""
        if self.process.wait(STOP_SECONDS):
            raise RuntimeError(f"the flow ended with exit code {self.process.returncode}: {self._last_words()}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def _last_words(self) -> str:
        return self.log.read_text(errors="replace")[-LOG_END:]


@contextlib.contextmanager
def running(exchange: str, environment: Mapping[str, str]) -> Iterator[FlowProcess]:
    """Run the flow of one exchange, and kill it at the end if it still runs."""
    flow = FlowProcess(exchange, environment)
    try:
        yield flow
    finally:
        flow.kill()


@dataclass(frozen=True)
class LoggedCommit:
    """One commit in the log of a flow, logged once it has landed; `at` is in seconds since 1970."""

    table: str
    sequence: int
    at: float
    seconds: float
    offsets: int


def logged_commits(log: Path) -> list[LoggedCommit]:
    """Return the commits in the log of a flow, in order."""
    return [
        LoggedCommit(table, int(sequence), _seconds(at), int(ms) / 1000, int(offsets))
        for at, table, offsets, sequence, ms in _COMMIT.findall(log.read_text(errors="replace"))
    ]


def logged(log: Path, pattern: str) -> list[tuple[float, re.Match[str]]]:
    """Return the matches of a pattern in the log of a flow, with the times of their lines in seconds since 1970."""
    lines = re.finditer(f"{_TIME}.*?{pattern}", log.read_text(errors="replace"), re.MULTILINE)
    return [(_seconds(found[1]), found) for found in lines]


def started_at(log: Path) -> float:
    """Return when the flow of this log began to read, in seconds since 1970."""
    found = _STARTED.search(log.read_text(errors="replace"))
    if found is None:
        raise ValueError(f"{log} does not say when the flow started")
    return _seconds(found[1])


def _seconds(log_time: str) -> float:
    return datetime.strptime(log_time, "%Y-%m-%d %H:%M:%S,%f").timestamp()  # in local time, as logging writes it


@dataclass(frozen=True)
class Sample:
    """A process at one moment, `at` in seconds since 1970: resident bytes, open files, threads."""

    at: float
    resident: int
    files: int
    threads: int


def samples(process: subprocess.Popen[bytes], active: Callable[[], bool] = lambda: True) -> list[Sample]:
    """Sample every SAMPLE_SECONDS until `process` has ended, or `active` returns False."""
    seen = psutil.Process(process.pid)
    taken = []
    with contextlib.suppress(psutil.NoSuchProcess, psutil.ZombieProcess):
        while process.poll() is None and active():
            with seen.oneshot():
                taken.append(Sample(time.time(), seen.memory_info().rss, seen.num_fds(), seen.num_threads()))
            time.sleep(SAMPLE_SECONDS)
    return taken


def machine() -> str:
    """Describe the machine and the versions that the figures depend on."""
    packages = ("bytewax", "confluent-kafka", "numpy", "pyarrow", "pyiceberg")
    versions = ", ".join(f"{name} {version(name)}" for name in packages)
    return f"{os.cpu_count()} cores ({platform.machine()}), Python {platform.python_version()}, {versions}"
