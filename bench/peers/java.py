"""Programs of the peers: jars from Maven, and one Java process each."""

import contextlib
import json
import os
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil
from jgo.maven import MavenContext

from bench.measure import peak_resident
from k2flow.sandbox.kafka.jars import java

START_SECONDS = 120.0
LOG_END = 4_000
HADOOP = tuple(f"org.apache.hadoop:hadoop-client-{name}:3.4.3" for name in ("api", "runtime"))
"""What Iceberg's catalog in a folder needs."""


def jar(coordinates: str) -> Path:
    """Return one jar. The first call on a machine downloads it."""
    group, name, version = coordinates.split(":")
    return Path(MavenContext().project(group, name).at_version(version).artifact().resolve())


class JavaProcess:
    """One Java program; it writes its log to a file."""

    def __init__(
        self,
        command: Sequence[str],
        jars: Sequence[Path],
        log: Path,
        options: Sequence[str] = (),
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._log = log
        whole = [str(java()), *options, "-cp", os.pathsep.join(map(str, jars)), *command]
        with log.open("ab") as out:
            self._process = subprocess.Popen(whole, env={**os.environ, **(environment or {})}, stdout=out, stderr=out)

    def cpu(self) -> float:
        """Return the seconds of CPU of the process and of all that it has started."""
        own = psutil.Process(self._process.pid)
        used = [own.cpu_times(), *(child.cpu_times() for child in own.children(recursive=True))]
        return sum(each.user + each.system + each.children_user + each.children_system for each in used)

    def peak(self) -> int:
        """Return the peak of the resident bytes."""
        return peak_resident(self._process.pid)

    def wait_until(self, ready: Callable[[], bool], seconds: float = START_SECONDS) -> None:
        """Wait for `ready`. Raise RuntimeError with the end of the log if the process ends or takes too long."""
        deadline = time.monotonic() + seconds
        while not ready():
            if self._process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"no answer from Java: {self._log.read_text(errors='replace')[-LOG_END:]}")
            time.sleep(0.2)

    def kill(self) -> None:
        """Kill it with SIGKILL, if it still runs."""
        self._process.kill()
        self._process.wait()

    def stop(self) -> None:
        """Stop it with SIGTERM, and SIGKILL after 20 s."""
        self._process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        self.kill()


def ask(method: str, url: str, body: Any = None) -> Any:
    """Send a request with a body of JSON; return the answer. Raise RuntimeError with it if it is an error."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = answer.read()
    except urllib.error.HTTPError as error:
        raise RuntimeError(f"{method} {url}: {error.read().decode(errors='replace')[:LOG_END]}") from error
    return json.loads(text) if text else None


def answers(url: str) -> bool:
    """Return whether a server answers."""
    try:
        ask("GET", url)
    except (OSError, RuntimeError):
        return False
    return True
