"""One flow's processes: started together, ended together, and restarted with back-off after a failure."""

import logging
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping

from prometheus_client.multiprocess import mark_process_dead

from k2flow.config import secret_files
from k2flow.config.settings import Settings
from k2flow.observability.metrics import SUPERVISED, Stage, process_stage
from k2flow.supervisor.failure import FlowFailure, StderrRelay, find_failure
from k2flow.supervisor.plan import ProcessPlan, free_addresses

log = logging.getLogger(__name__)
POLL_SECONDS = 0.1
PEER_EXIT_SECONDS = 15.0
"""How long the other processes may take to end by themselves after one has failed: its peers may hang forever."""
MAX_BACKOFF_SECONDS = 60.0
UP_SECONDS = 30.0  # a flow that has run this long has started well
HEALTHY_SECONDS = 300.0  # after a run this long, the next failure counts as the first in a row


class SupervisedFlow:
    """One flow's processes, run in a thread of their own.

    After a failure all processes are ended, and restarted after a pause. The pause doubles from failure to failure, up
    to a minute. It varies randomly, so that flows that failed together do not restart together.
    """

    def __init__(
        self, plan: ProcessPlan, settings: Settings, environment: Mapping[str, str], stopping: threading.Event
    ) -> None:
        self.plan = plan
        self._settings = settings
        self._environment = environment
        self._stopping = stopping
        self._processes: list[subprocess.Popen[bytes]] = []
        self._failure: FlowFailure | None = None
        self._ended = False

    @property
    def failure(self) -> FlowFailure | None:
        """Why the flow ended, if it failed and is not restarted."""
        return self._failure

    def failed(self) -> str | None:
        """Return in one line why the flow failed and is not restarted, or None."""
        return self._failure.reason if self._failure else None

    def not_ready(self) -> str | None:
        """Return in one line why a process does not read now, or None if all do."""
        if self._failure:
            return self._failure.reason
        stages = [self._stage(process) for process in self._processes if process.poll() is None]
        reading = stages.count(Stage.READING)
        if self._ended or reading == len(self.plan.numbers):
            return None
        return f"{self.plan.flow}: {reading} of {len(self.plan.numbers)} processes read"

    def run(self, log_failure: bool) -> None:
        """Run until the flow ends, or fails permanently."""
        try:
            self._run_with_backoff()
            if self._failure and log_failure:
                log.error("%s: %s", self.plan.flow, self._failure.reason)
        except Exception as error:  # an error of this thread would go unnoticed
            log.exception("%s: the supervisor failed", self.plan.flow)
            self._failure = FlowFailure(f"{self.plan.flow}: the supervisor failed: {error!r}", False, True)
        self._ended = True

    def _run_with_backoff(self) -> None:
        flow, failures = self.plan.flow, 0
        while not self._stopping.is_set():
            started = time.monotonic()
            failure = self._run_once(again=failures > 0)
            if failure is None:
                break
            if not failure.retryable or self._stopping.is_set():
                self._failure = failure
                break
            failures = 1 if time.monotonic() - started > HEALTHY_SECONDS else failures + 1
            pause = min(2.0 ** (failures - 1), MAX_BACKOFF_SECONDS) * random.uniform(0.5, 1)
            text = "%s; starting %s again in %.1f s (failure %d in a row)"
            log.error(text, failure.reason, flow, pause, failures)
            self._stopping.wait(pause)

    def _run_once(self, again: bool) -> FlowFailure | None:
        flow, started = self.plan.flow, time.monotonic()
        with StderrRelay() as stderr:
            try:
                self._start(stderr.pipe)
                connected = self._wait()
                codes = [process.poll() for process in self._processes]
            finally:
                self._kill()
        if self._stopping.is_set():  # SIGTERM kills a process that is still importing
            codes = [0 if code == -signal.SIGTERM else code for code in codes]
        elif not connected:
            seconds = self._settings.start_seconds
            text = f"the processes of {flow} did not connect to each other within {seconds:g} s"
            return FlowFailure(text, True, False)
        return find_failure(flow, codes, stderr.errors, again or time.monotonic() - started > UP_SECONDS)

    def _start(self, stderr: int) -> None:
        self._processes = []
        addresses = self.plan.addresses or ";".join(free_addresses(len(self.plan.numbers)))
        command = [sys.executable, "-m", "bytewax.run", f"flows.{self.plan.flow}"]
        environment = {**secret_files.inheritable_environment(), **self._environment}
        for i in self.plan.numbers:
            cluster = ["-i", str(i), "-a", addresses] if ";" in addresses else []
            self._processes.append(subprocess.Popen([*command, *cluster], env=environment, stderr=stderr))

    def _kill(self) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            mark_process_dead(process.pid, self._environment[SUPERVISED])  # type: ignore[no-untyped-call]

    def _wait(self) -> bool:
        """Wait until all processes have ended, PEER_EXIT_SECONDS after one failed, or `stop_seconds` after a stop.

        Return False if not all processes read `start_seconds` after the first one was ready to: if a process of a
        cluster is missing, the others connect forever.
        """
        failed_at = opened_at = stopped_at = None
        reading = False
        while any(process.poll() is None for process in self._processes):
            now = time.monotonic()
            if failed_at is None and any(process.returncode for process in self._processes):
                failed_at = now
            if failed_at is not None and now > failed_at + PEER_EXIT_SECONDS:
                break
            if self._stopping.is_set():
                if stopped_at is None:
                    stopped_at = now
                    for process in self._processes:
                        process.send_signal(signal.SIGTERM)  # does nothing to a process that has ended
                elif now > stopped_at + self._settings.stop_seconds:
                    text = "%s: not drained %g s after the signal to stop: killed; nothing is lost"
                    log.error(text, self.plan.flow, self._settings.stop_seconds)
                    break
            elif not reading and failed_at is None:
                stages = [self._stage(process) for process in self._processes]
                reading = all(stage == Stage.READING for stage in stages)
                opened_at = now if opened_at is None and Stage.OPENED in stages else opened_at
                if not reading and opened_at is not None and now > opened_at + self._settings.start_seconds:
                    return False
            time.sleep(POLL_SECONDS)
        return True

    def _stage(self, process: subprocess.Popen[bytes]) -> Stage:
        return process_stage(self._environment[SUPERVISED], self.plan.flow, process.pid)
