"""The broker's process: recorded, recognised without doubt, started detached, ended cleanly."""

import json
import os
import subprocess
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import psutil

from k2flow.errors import KafkaError

CLOCK_SLACK_SECONDS = 2.0
# The shell leaves at once, so the broker is nobody's child: it cannot become a zombie of a long-lived parent.
DETACH = 'log="$1"; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'


@dataclass(frozen=True)
class Record:
    """What is kept about a started broker; `created` is its start in seconds since the epoch, by psutil."""

    pid: int
    created: float
    port: int
    controller_port: int

    def write(self, path: Path) -> None:
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(asdict(self)))
        draft.replace(path)

    @staticmethod
    def read(path: Path) -> "Record | None":
        """The record, or None if there is none that can be read."""
        try:
            return Record(**json.loads(path.read_text()))
        except (FileNotFoundError, ValueError, TypeError):
            return None


def find(record: Record | None, marker: str) -> psutil.Process | None:
    """The live process of this record, or None.

    A process id alone may have been given to another process since: the start time and `marker`, an argument
    of the command line, must match too.
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


def spawn(command: Sequence[str], log: Path) -> psutil.Process:
    """Starts a process that outlives this one, its output appended to `log`. Raises KafkaError."""
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
        raise KafkaError(f"Java could not be started ({error}): look at {log}") from error


def is_alive(process: psutil.Process) -> bool:
    """False also for one that ended and was not reaped yet, as in a container without an init."""
    try:
        return process.is_running() and process.status() not in (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
    except psutil.NoSuchProcess:
        return False


def end(process: psutil.Process, patience_seconds: float) -> None:
    """SIGTERM, and SIGKILL after `patience_seconds`; returns when it has ended. Raises KafkaError."""
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
        raise KafkaError(f"the broker, process {process.pid}, is somebody else's: stop it as them") from error
    raise KafkaError(f"the broker, process {process.pid}, does not end, even by SIGKILL")


def listener(port: int) -> str:
    """Who listens on this TCP port, as text for an error message; '' if that cannot be known."""
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
    """The last `count` lines of a log, read from at most its last 64 KiB."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - 65536), os.SEEK_SET)
            return "\n".join(file.read().decode("utf-8", "replace").splitlines()[-count:])
    except FileNotFoundError:
        return "(no log)"
