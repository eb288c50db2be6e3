"""The broker's process: recorded, identified safely, started detached, stopped cleanly."""

import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from pydantic import TypeAdapter

from k2flow.errors import KafkaError

CLOCK_SLACK_SECONDS = 2.0
DETACH = 'log="$1"; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'
"""The shell exits at once, so that the broker has no parent here: it cannot become a zombie of a long-lived one."""


@dataclass(frozen=True)
class BrokerRecord:
    """A started broker. `created` is its start time in seconds since 1970, by psutil."""

    pid: int
    created: float
    port: int
    controller_port: int

    def write(self, path: Path) -> None:
        """Replace the file at `path` atomically."""
        draft = path.with_suffix(".draft")
        draft.write_bytes(_RECORD.dump_json(self))
        draft.replace(path)

    @staticmethod
    def read(path: Path) -> "BrokerRecord | None":
        """Return the record, or None if it is missing or unreadable."""
        try:
            return _RECORD.validate_json(path.read_bytes())
        except (FileNotFoundError, ValueError):
            return None


_RECORD = TypeAdapter(BrokerRecord)


def find_process(record: BrokerRecord | None, marker: str) -> psutil.Process | None:
    """Return the live process of this record, or None.

    The operating system may have reused the process id: the start time and `marker`, an argument of the command line,
    must match too.
    """
    if record is None:
        return None
    try:
        process = psutil.Process(record.pid)
        if not is_alive(process) or marker not in process.cmdline():
            return None
        return process if abs(process.create_time() - record.created) < CLOCK_SLACK_SECONDS else None
    except psutil.Error:
        return None


def spawn_detached(command: Sequence[str], log: Path) -> psutil.Process:
    """Start a process that outlives this one; append its output to `log`. Raises KafkaError if it cannot be started."""
    try:
        shell = subprocess.run(
            ["/bin/sh", "-c", DETACH, "sh", str(log), *command],
            capture_output=True,
            text=True,
            check=True,
            start_new_session=True,
        )
        return psutil.Process(int(shell.stdout))
    except (OSError, ValueError, subprocess.CalledProcessError, psutil.Error) as error:
        raise KafkaError(f"Java could not be started ({error}): see {log}") from error


def is_alive(process: psutil.Process) -> bool:
    """Return False also for an ended process that was not reaped yet, as in a container without an init."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def stop_process(process: psutil.Process, patience_seconds: float) -> None:
    """Send SIGTERM, and SIGKILL after `patience_seconds`; return when the process has ended.

    Raises KafkaError if the process belongs to another user, or survives SIGKILL.
    """
    try:
        for send in (process.terminate, process.kill):
            send()
            deadline = time.monotonic() + patience_seconds
            while time.monotonic() < deadline:
                if not is_alive(process):
                    return
                time.sleep(0.05)
    except psutil.NoSuchProcess:
        return
    except psutil.AccessDenied as error:
        raise KafkaError(f"the broker, process {process.pid}, belongs to another user: stop it as that user") from error
    raise KafkaError(f"the broker, process {process.pid}, did not end after SIGKILL: check its state with ps")


def describe_listener(port: int) -> str:
    """Return the process that listens on this TCP port, as text for an error message; '' if it is unknown."""
    try:
        for connection in psutil.net_connections("tcp"):
            if connection.status == psutil.CONN_LISTEN and connection.laddr and connection.laddr.port == port:
                if connection.pid is None:
                    return ""
                return f"{psutil.Process(connection.pid).name()}, process {connection.pid}"
    except (psutil.Error, OSError):
        return ""
    return ""


def last_lines(log: Path, count: int = 15) -> str:
    """Return the last `count` lines of a log, from at most its last 64 KiB."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536), os.SEEK_SET)
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-count:])
    except FileNotFoundError:
        return "(no log)"
