"""Runs the processes of flows: starts an exchange's together, again after a crash, and passes signals on.

Each exchange has its own processes and fate: one that fails, waits or is restarted holds no other up.
"""

import logging
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from k2flow.config import secret_files
from k2flow.config.settings import PREFIX, Settings
from k2flow.errors import RunError, SettingsError
from k2flow.exchange import find_exchange
from k2flow.flow.runtime import SUPERVISED
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.endpoint import serve
from k2flow.observability.metrics import Stage
from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED, EXIT_TRY_AGAIN, EXIT_UNAVAILABLE, PEER_LOST

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
PEERS_SECONDS = 15.0
"""How long the others may take to end by themselves after one has failed: a peer of a dead one may hang for ever."""
LONGEST_PAUSE_SECONDS = 60.0
UP_SECONDS = 30.0
"""A flow that has run for so long has started well."""
HEALTHY_SECONDS = 300.0
"""After so long without a failure the next one counts as the first."""


@dataclass(frozen=True)
class Failure:
    """Why a flow ended: one line, and whether it is worth starting again."""

    reason: str
    retryable: bool


@dataclass(frozen=True)
class Plan:
    """The processes of one exchange that run on this host: those of `numbers`, at `addresses` (of all hosts).

    Without addresses they are all on this host, and get new ones at each start.
    """

    exchange: str
    numbers: Sequence[int]
    addresses: str | None = None


def plan(exchange: str, processes: int, cluster: str | None, process_id: int | None) -> Plan:
    """What this host runs of an exchange: `processes`, or of a cluster's the one whose number is told.

    Raises SettingsError where a cluster is told and which of its processes this is, is not.
    """
    if cluster is None:
        if process_id is not None:
            raise SettingsError(f"{PREFIX}PROCESS_ID means nothing without {PREFIX}CLUSTER, the addresses of all hosts")
        return Plan(exchange, range(processes))
    addresses = [address.strip() for address in cluster.split(";") if address.strip()]
    wrong = [address for address in addresses if not re.fullmatch(r"[^\s,]+:\d+", address)]
    if wrong or not addresses:
        raise SettingsError(f"{PREFIX}CLUSTER={cluster!r} is wrong: addresses are host:port, with ; between them")
    if process_id is None:
        digits = re.search(r"\d+$", socket.gethostname().partition(".")[0])
        if digits is None:
            raise SettingsError(f"set {PREFIX}PROCESS_ID: this host's name does not end with its number in the cluster")
        process_id = int(digits[0])
    if process_id >= len(addresses):
        raise SettingsError(
            f"process {process_id} is not one of the cluster's {len(addresses)}, 0 to {len(addresses) - 1}"
        )
    return Plan(exchange, [process_id], ";".join(addresses))


def run(plans: Sequence[Plan], settings: Settings, extra: Mapping[str, str]) -> None:
    """Runs the processes of all `plans` until they have ended; `extra` is added to their environment.

    When one crashes the others of its exchange are ended, and all are started again after a pause that doubles from one
    failure to the next, up to a minute, and varies by chance, so that flows that failed together do not start together.
    Nothing is lost: what was not committed is read again. SIGTERM and SIGINT are passed on to all, which then drain and
    commit; who has not after `stop_seconds` is killed. Where this process itself is killed they get a SIGTERM. Raises
    RunError, once all have ended, for errors that starting again would not mend, or that kept a flow from starting.
    """
    stopping = threading.Event()
    with tempfile.TemporaryDirectory(prefix="k2flow-counts-") as counts, ExitStack() as at_end:
        environment, alone = {**extra, SUPERVISED: counts}, len(plans) == 1
        flows = [_Flow(each, settings, environment, stopping, alone) for each in plans]
        if settings.metrics_port is not None:
            from k2flow.status.collector import StatusCollector
            from k2flow.status.metrics import StatusMetrics

            registry = CollectorRegistry()
            registry.register(Counts(counts))
            observer = StatusCollector(
                open_catalog(settings), settings, [find_exchange(each.exchange) for each in plans]
            )
            status = StatusMetrics(observer.look)
            registry.register(status)
            host, port = settings.metrics_host, settings.metrics_port
            serve(host, port, registry, lambda: _first_of(flows, "failed"), lambda: _first_of(flows, "not_ready"))
            status.start()
            at_end.callback(status.stop)

        def stop(number: int, _: FrameType | None) -> None:
            stopping.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, stop)
        threads = [threading.Thread(target=flow.run, name=flow.plan.exchange) for flow in flows]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    reasons = [flow.failed() for flow in flows if flow.failed()]
    if reasons:
        raise RunError("; ".join(filter(None, reasons)))


def _first_of(flows: Sequence["_Flow"], check: str) -> str | None:
    return next((wrong for flow in flows if (wrong := getattr(flow, check)())), None)


class Counts(Collector):
    """What the processes count, which they write into files of a folder.

    The files are read anew where one has just been made or removed: Prometheus' client does not expect that.
    """

    def __init__(self, folder: str) -> None:
        self._counts = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]

    def collect(self) -> Iterable[Metric]:
        reading = Retrying(
            retry=retry_if_exception_type((struct.error, ValueError, OSError)),
            wait=wait_fixed(0.02),
            stop=stop_after_attempt(50),
            reraise=True,
        )
        found: Iterable[Metric] = reading(lambda: list(self._counts.collect()))  # type: ignore[no-untyped-call]
        return found


class _Flow:
    """One exchange's processes, in a thread of its own."""

    def __init__(
        self, plan: Plan, settings: Settings, environment: Mapping[str, str], stopping: threading.Event, alone: bool
    ) -> None:
        self.plan = plan
        self._alone = alone
        self._settings = settings
        self._environment = environment
        self._stopping = stopping
        self._children: list[subprocess.Popen[bytes]] = []
        self._failure: str | None = None
        self._ended = False

    def failed(self) -> str | None:
        """Why it has ended for good, if it has failed."""
        return self._failure

    def not_ready(self) -> str | None:
        """What keeps its processes from all reading now, in one line; None if nothing does."""
        if self._failure:
            return self._failure
        stages = [self._stage(child) for child in self._children if child.poll() is None]
        reading = stages.count(Stage.READING)
        if self._ended or reading == len(self.plan.numbers):
            return None
        return f"{self.plan.exchange}: {reading} of {len(self.plan.numbers)} processes read"

    def run(self) -> None:
        """Until the end, which may be a failure."""
        try:
            self._run()
        except Exception as error:  # of a thread nobody would hear
            log.exception("%s: the supervisor failed", self.plan.exchange)
            self._failure = f"{self.plan.exchange}: the supervisor failed: {error!r}"
        self._ended = True

    def _run(self) -> None:
        exchange, failures = self.plan.exchange, 0
        while not self._stopping.is_set():
            began = time.monotonic()
            failure = self._run_once(again=failures > 0)
            if failure is None:
                break
            if not failure.retryable or self._stopping.is_set():
                self._failure = failure.reason
                if not self._alone:  # if it is, the command ends, and says so
                    log.error("%s: %s", exchange, failure.reason)
                break
            failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else failures + 1
            pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
            text = "%s; starting %s again in %.1f s (failure %d in a row)"
            log.error(text, failure.reason, exchange, pause, failures)
            self._stopping.wait(pause)

    def _run_once(self, again: bool) -> Failure | None:
        """Starts all processes and waits for their end; None if it was a good one."""
        numbers = self.plan.numbers
        command = [sys.executable, "-m", "bytewax.run", f"flows.{self.plan.exchange}"]
        addresses = self.plan.addresses or ";".join(free_addresses(len(numbers)))
        environment = {**secret_files.inherited(), **self._environment}
        self._children = []
        began = time.monotonic()
        with _StandardError() as stderr:
            for i in numbers:
                cluster = ["-i", str(i), "-a", addresses] if ";" in addresses else []
                self._children.append(subprocess.Popen([*command, *cluster], env=environment, stderr=stderr.pipe))
            try:
                connected = self._wait()
                codes = [child.poll() for child in self._children]
            finally:
                for child in self._children:
                    if child.poll() is None:
                        child.kill()
                    child.wait()
                    mark_process_dead(child.pid, self._environment[SUPERVISED])  # type: ignore[no-untyped-call]
        if self._stopping.is_set():  # a process that was still importing knows no better than to die of the signal
            codes = [0 if code == -signal.SIGTERM else code for code in codes]
        elif not connected:
            seconds = self._settings.start_seconds
            return Failure(f"the processes of {self.plan.exchange} have not found each other for {seconds:g} s", True)
        return cause_of_end(self.plan.exchange, codes, stderr.errors, again or time.monotonic() - began > UP_SECONDS)

    def _wait(self) -> bool:
        """Until all have ended, PEERS_SECONDS after the first one failed, or the deadline of a stop.

        False where they have not all begun to read `start_seconds` after the first was ready to: of a cluster one that
        is gone leaves the others connecting for ever.
        """
        failed_at = opened_at = told_at = None
        reading = False
        while any(child.poll() is None for child in self._children):
            now = time.monotonic()
            if failed_at is None and any(child.returncode for child in self._children):
                failed_at = now
            if failed_at is not None and now > failed_at + PEERS_SECONDS:
                break
            if self._stopping.is_set():
                if told_at is None:
                    told_at = now
                    self._signal(signal.SIGTERM)
                elif now > told_at + self._settings.stop_seconds:
                    text = "%s: not drained %g s after it was told to stop: killed; nothing is lost"
                    log.error(text, self.plan.exchange, self._settings.stop_seconds)
                    break
            elif not reading and failed_at is None:
                stages = [self._stage(child) for child in self._children]
                reading = all(stage == Stage.READING for stage in stages)
                opened_at = now if opened_at is None and Stage.OPENED in stages else opened_at
                if not reading and opened_at is not None and now > opened_at + self._settings.start_seconds:
                    return False
            time.sleep(POLL_SECONDS)
        return True

    def _signal(self, number: signal.Signals) -> None:
        for child in self._children:
            if child.poll() is None:
                child.send_signal(number)

    def _stage(self, child: subprocess.Popen[bytes]) -> Stage:
        """How far a process has come, as it has told its counts."""
        registry = CollectorRegistry()
        registry.register(Counts(self._environment[SUPERVISED]))
        labels = {"exchange": self.plan.exchange, "pid": str(child.pid)}
        return Stage(int(registry.get_sample_value("k2flow_process_stage", labels) or 0))


def cause_of_end(exchange: str, codes: list[int | None], errors: list[str], was_up: bool) -> Failure | None:
    """Why the flow ended, if it failed: a process that was killed, or else the first error that one told of.

    `codes` are the exit codes, None for a process that hung after another one had failed. An error that may pass, or
    that nobody foresaw, is worth another start if the flow was up before: at the first start the user must know.
    """
    if not any(codes) and None not in codes:
        return None
    killed = [(i, f"was ended by signal {-code}") for i, code in enumerate(codes) if code is not None and code < 0]
    causes = [error for error in errors if error != PEER_LOST]
    if causes and not killed:
        lasting = EXIT_FAILED in codes or (EXIT_UNAVAILABLE in codes and not was_up)
        return Failure(causes[0], not lasting)
    if errors and not killed and all(code in (0, EXIT_TRY_AGAIN, None) for code in codes):
        return Failure(PEER_LOST, True)
    crashed = [
        (i, f"ended with exit code {code}") for i, code in enumerate(codes) if code not in (0, None, EXIT_TRY_AGAIN)
    ]
    i, how = next(iter(killed + crashed), (codes.index(None) if None in codes else 0, "hung"))
    reason = f"process {i} of {len(codes)} of {exchange} {how}; nothing is lost: it goes on where the tables end"
    return Failure(reason, bool(killed) or not crashed or was_up)


class _StandardError:
    """The standard error of all processes: passed on line by line, but for their last words, which are gathered.

    Each process of a flow that cannot run says so; the user is told once.
    """

    def __init__(self) -> None:
        self.errors: list[str] = []
        self._read, self.pipe = os.pipe()
        self._relay = threading.Thread(target=self._pass_on)

    def __enter__(self) -> "_StandardError":
        self._relay.start()
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.pipe)
        self._relay.join()

    def _pass_on(self) -> None:
        with open(self._read, encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.startswith(ERROR_PREFIX):
                    self.errors.append(line.removeprefix(ERROR_PREFIX).strip())
                else:
                    print(line, end="", file=sys.stderr, flush=True)


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
