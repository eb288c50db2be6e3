"""One local Kafka broker: started once, found by any process, stopped cleanly, its data kept."""

import base64
import contextlib
import errno
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
from filelock import FileLock, Timeout

from k2flow.errors import KafkaError
from k2flow.kafka.admin import Admin
from k2flow.sandbox.kafka.config import HOST, java_options, server_properties
from k2flow.sandbox.kafka.jars import KAFKA_VERSION, class_path, java, require_local_extra
from k2flow.sandbox.kafka.process import (
    BrokerRecord,
    describe_listener,
    find_process,
    is_alive,
    last_lines,
    spawn_detached,
    stop_process,
)

START_SECONDS = 90.0
STOP_SECONDS = 20.0
LOCK_SECONDS = 300.0  # how long a start waits for another one, which may download Kafka


@dataclass(frozen=True)
class BrokerStatus:
    """The state of the broker.

    `state` is `starting` while the process lives but does not answer yet. `pid` and `memory_bytes` (resident) are None
    unless a process lives. `topics`, the number of partitions by name, is None unless the broker runs. `notes` name
    requests that were not met.
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
    """A real Apache Kafka (KRaft, one node) that listens on 127.0.0.1 only and keeps its files under `home`.

    The broker outlives the process that starts it. As a context manager (`with LocalKafka(home, free_port()) as kafka`)
    it stops at the end, unless it was already running. Messages are kept forever, or for `retention_hours`. After a
    stop or a kill, the next start has all acknowledged messages. `properties` are further lines of server.properties,
    for example of a second listener.
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

    def start(self, topics: Mapping[str, int] | None = None) -> BrokerStatus:
        """Start the broker unless it runs, and create the missing topics (name: partitions).

        Return when the broker answers. Any number of callers may start it at the same time. Raises KafkaError if Kafka
        cannot be downloaded, the port is in use, or the broker does not start; MissingExtraError without the packages
        of the extra `local`.
        """
        with self._locked():
            process = find_process(BrokerRecord.read(self._record), self._marker)
            if process is None:
                process = self._launch()
                self._started_here = True
            else:
                self._refuse_other_port()
                self._await_answer(process)
            notes = Admin(self.bootstrap).create(topics or {})
        return self.status(tuple(notes))

    def stop(self) -> None:
        """Stop the broker if it runs: cleanly, or by force after 20 s. Raises KafkaError if it cannot be stopped."""
        if not self._record.exists():
            return
        with self._locked():
            process = find_process(BrokerRecord.read(self._record), self._marker)
            if process is not None:
                stop_process(process, STOP_SECONDS)
        self._started_here = False

    def status(self, notes: tuple[str, ...] = ()) -> BrokerStatus:
        """Return the state of the broker, with `notes`."""
        record = BrokerRecord.read(self._record)
        process = find_process(record, self._marker)
        if process is None or record is None:
            return BrokerStatus("stopped", self.bootstrap, self.home, self.log, notes=notes)
        bootstrap = f"{HOST}:{record.port}"
        memory = None
        with contextlib.suppress(psutil.Error):
            memory = process.memory_info().rss
        admin = Admin(bootstrap)
        if not admin.answers(self._cluster(), 2.0):
            return BrokerStatus("starting", bootstrap, self.home, self.log, process.pid, memory, notes=notes)
        return BrokerStatus("running", bootstrap, self.home, self.log, process.pid, memory, admin.topics(), notes)

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._started_here:
            self.stop()

    def _launch(self) -> psutil.Process:
        require_local_extra()
        _refuse_taken(self.port)
        jars = class_path()
        record = BrokerRecord.read(self._record)
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
        process = spawn_detached(command, self.log)
        try:
            BrokerRecord(process.pid, process.create_time(), self.port, controller_port).write(self._record)
            self._await_answer(process)
        except psutil.NoSuchProcess:
            raise self._did_not_start("it ended at once") from None
        except BaseException:  # also Ctrl-C: a start that is interrupted must not leave a broker behind
            stop_process(process, STOP_SECONDS)
            raise
        return process

    def _format(self, jars: str, properties: Path, data: Path) -> None:
        """Give the data folder its cluster id, once."""
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
        """Return the id of this broker's cluster, created on first use: it identifies our broker on the port."""
        path = self.home / "cluster-id"
        if not path.exists():
            random = uuid.uuid4().bytes
            first = bytes([random[0] & 0x7F])  # the text must not start with '-', as an option does
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
            f"Kafka did not start at {self.bootstrap}: {how}; the end of {self.log}:\n{last_lines(self.log)}"
        )

    def _refuse_other_port(self) -> None:
        record = BrokerRecord.read(self._record)
        if record is not None and record.port != self.port:
            raise KafkaError(
                f"the Kafka in {self.home} runs on port {record.port}, not {self.port}: use that port, or stop it first"
            )

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Allow one start or stop at a time, across all processes and threads."""
        try:
            self.home.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.home / "lock", LOCK_SECONDS).acquire()
        except Timeout:
            raise KafkaError(
                f"another start or stop of {self.home} has not ended for {LOCK_SECONDS:.0f} s: end it first"
            ) from None
        except OSError as error:
            raise KafkaError(f"{self.home} cannot be written ({error.strerror}): choose another folder") from error
        with lock:
            yield


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that is free now."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # As Kafka does: recently closed connections do not count.
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
        process = describe_listener(port)
        raise KafkaError(
            f"port {port} is in use{f' by {process}' if process else ''}: stop that process, or choose another port; "
            "to use a Kafka that already runs there, start none"
        )
