"""One local Kafka broker: started once, found again by anybody, stopped cleanly, its data kept."""

import base64
import contextlib
import errno
import fcntl
import socket
import subprocess
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import psutil

from k2flow.errors import KafkaError
from k2flow.kafka.admin import Admin
from k2flow.sandbox.kafka.config import HOST, java_options, server_properties
from k2flow.sandbox.kafka.jars import KAFKA_VERSION, class_path, java
from k2flow.sandbox.kafka.process import Record, end, find, is_alive, last_lines, listener, spawn

START_SECONDS = 90.0
STOP_SECONDS = 20.0
# The first start downloads Kafka while it holds the lock.
LOCK_SECONDS = 300.0


@dataclass(frozen=True)
class Status:
    """The broker as it is now.

    `state` is `starting` while the process lives and does not answer yet. `pid` and `memory_bytes` (resident)
    are None unless a process lives; `topics`, name to number of partitions, is None unless the broker runs;
    `notes` say what was not done as asked.
    """

    state: Literal["running", "starting", "stopped"]
    bootstrap: str
    home: Path
    log: Path
    pid: int | None = None
    memory_bytes: int | None = None
    topics: Mapping[str, int] | None = None
    notes: tuple[str, ...] = ()
    version: str = KAFKA_VERSION


class LocalKafka:
    """A real Apache Kafka (KRaft, one node) that listens on 127.0.0.1 only and keeps all it has under `home`.

    It outlives the process that starts it, unless it is used as a context manager: `with LocalKafka(home,
    free_port()) as kafka:` stops at the end what it started, and leaves running what it found running.
    Messages are kept for ever, or for `retention_hours`. A broker that was stopped, or killed, has all
    acknowledged messages when it starts again. `properties` are further ones of server.properties, as for a
    second listener.
    """

    def __init__(
        self,
        home: Path,
        port: int = 9092,
        retention_hours: float | None = None,
        properties: Mapping[str, str] | None = None,
    ) -> None:
        self.home = home.expanduser().resolve()
        self.port = port
        self.bootstrap = f"{HOST}:{port}"
        self.log = self.home / "broker.log"
        self._retention_hours = retention_hours
        self._properties = properties or {}
        self._record = self.home / "broker.json"
        self._marker = f"-Dk2flow.kafka.home={self.home}"
        self._started_here = False

    def start(self, topics: Mapping[str, int] | None = None) -> Status:
        """Starts the broker if it does not run, makes the topics (name: partitions) that are missing.

        Returns when the broker answers. Any number of callers may do this at the same time. Raises KafkaError
        when Kafka cannot be downloaded, the port is taken, or the broker does not come up.
        """
        with self._locked():
            process = find(Record.read(self._record), self._marker)
            if process is None:
                process = self._launch()
                self._started_here = True
            else:
                self._refuse_other_port()
                self._await_answer(process)
            notes = Admin(self.bootstrap).create(topics or {})
        return self.status(tuple(notes))

    def stop(self) -> None:
        """Stops the broker if it runs: cleanly, or by force after 20 seconds. Raises KafkaError."""
        if not self._record.exists():
            return
        with self._locked():
            process = find(Record.read(self._record), self._marker)
            if process is not None:
                end(process, STOP_SECONDS)
        self._started_here = False

    def status(self, notes: tuple[str, ...] = ()) -> Status:
        """The broker as it is now; `notes` are passed on. Starts and stops nothing. Raises KafkaError."""
        record = Record.read(self._record)
        process = find(record, self._marker)
        if process is None or record is None:
            return Status("stopped", self.bootstrap, self.home, self.log, notes=notes)
        bootstrap = f"{HOST}:{record.port}"
        memory = None
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info().rss
        admin = Admin(bootstrap)
        if not admin.answers(self._cluster(), 2.0):
            return Status("starting", bootstrap, self.home, self.log, process.pid, memory, notes=notes)
        return Status("running", bootstrap, self.home, self.log, process.pid, memory, admin.topics(), notes)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started_here:
            self.stop()

    def _launch(self) -> psutil.Process:
        _refuse_taken(self.port)
        jars = class_path()
        record = Record.read(self._record)
        controller_port = record.controller_port if record is not None else 0
        if not controller_port or not _is_free(controller_port):
            controller_port = free_port()
        data = self.home / "data"
        properties = self.home / "server.properties"
        properties.write_text(
            server_properties(self.port, controller_port, data, self._retention_hours, self._properties)
        )
        self._format(jars, properties, data)
        command = [str(java()), *java_options(self._marker), "-cp", jars, "kafka.Kafka", str(properties)]
        process = spawn(command, self.log)
        try:
            Record(process.pid, process.create_time(), self.port, controller_port).write(self._record)
            self._await_answer(process)
        except psutil.NoSuchProcess:
            raise self._did_not_start("it ended at once") from None
        except BaseException:  # also Ctrl-C: whoever gives up waiting must not leave half a broker behind
            end(process, STOP_SECONDS)
            raise
        return process

    def _format(self, jars: str, properties: Path, data: Path) -> None:
        """Gives the data folder its cluster id, once."""
        if (data / "meta.properties").exists():
            return
        command = [str(java()), "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-cp", jars]
        command += ["kafka.tools.StorageTool", "format", "--ignore-formatted"]
        command += ["-t", self._cluster(), "-c", str(properties)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=START_SECONDS)
        if result.returncode != 0:
            output = (result.stderr or result.stdout).strip()
            raise KafkaError(f"{data} could not be formatted for Kafka: {output}")

    def _cluster(self) -> str:
        """The id of this broker's cluster, made on first use: it tells ours from any other on the port."""
        path = self.home / "cluster-id"
        if not path.exists():
            random = uuid.uuid4().bytes
            first = bytes([random[0] & 0x7F])  # so that the text never starts with '-', as an option would
            path.write_text(base64.urlsafe_b64encode(first + random[1:]).decode().rstrip("="))
        return path.read_text()

    def _await_answer(self, process: psutil.Process) -> None:
        deadline = time.monotonic() + START_SECONDS
        admin: Admin | None = None
        while time.monotonic() < deadline:
            if not is_alive(process):
                raise self._did_not_start("it ended")
            if admin is None and _is_listening(self.port):
                admin = Admin(self.bootstrap)
            if admin is not None and admin.answers(self._cluster(), 2.0):
                return
            time.sleep(0.1)
        raise self._did_not_start(f"it does not answer after {START_SECONDS:.0f} s")

    def _did_not_start(self, how: str) -> KafkaError:
        return KafkaError(
            f"Kafka did not come up at {self.bootstrap}: {how}. The end of {self.log}:\n{last_lines(self.log)}"
        )

    def _refuse_other_port(self) -> None:
        record = Record.read(self._record)
        if record is not None and record.port != self.port:
            raise KafkaError(
                f"the Kafka of {self.home} runs on port {record.port}, not {self.port}: use that port, or stop it first"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """One start or stop at a time, over all processes and threads."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            lock = (self.home / "lock").open("w")
        except OSError as error:
            raise KafkaError(f"{self.home} cannot be written ({error.strerror}): choose another folder") from error
        with lock:
            deadline = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise KafkaError(
                            f"another start or stop of {self.home} has not ended for {LOCK_SECONDS:.0f} s: end it first"
                        ) from None
                    time.sleep(0.05)
            yield


def free_port() -> int:
    """A TCP port of 127.0.0.1 that nobody uses now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As Kafka does: connections that were closed a moment ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                return False
            raise KafkaError(f"port {port} cannot be used ({error.strerror}): choose another one") from error
    return True


def _is_listening(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex((HOST, port)) == 0


def _refuse_taken(port: int) -> None:
    if not _is_free(port):
        who = listener(port)
        raise KafkaError(
            f"port {port} is taken{f' by {who}' if who else ''}: stop that, or choose another port; "
            "if it is a Kafka that you want to use, none needs to be started"
        )
