"""Keeps a flow running as an operator would: it restarts after a pause whenever it ends."""

import contextlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from k2flow.exchange import find_exchange
from tests.integration.harness import ROOT, free_addresses
from torture import clock

PEERS_SECONDS = 5.0
DRAIN_SECONDS = 30.0
REPLACED_SECONDS = 15.0
CATCH_UP_ROWS = 20_000
CLOCK_SECONDS = 6.0  # for a flow to start and commit
ERROR = "k2flow: error: "


class FlowInstance:
    """The processes of one start of a flow, with their log."""

    def __init__(self, exchange: str, processes: int, environment: Mapping[str, str], log: Path) -> None:
        self.log = log
        addresses = ";".join(free_addresses(processes))
        self.processes = []
        with log.open("wb") as out:
            for i in range(processes):
                command = [sys.executable, "-m", "bytewax.run", f"flows.{exchange}"]
                cluster = ["-i", str(i), "-a", addresses] if processes > 1 else []
                self.processes.append(
                    subprocess.Popen([*command, *cluster], cwd=ROOT, env=environment, stdout=out, stderr=out)
                )

    def signal(self, number: int) -> None:
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def ended(self) -> bool:
        """Return whether every process has ended."""
        return all(process.poll() is not None for process in self.processes)

    def broken(self) -> bool:
        """Return whether a process has ended."""
        return any(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Return whether all end by themselves within `seconds`; kill the others."""
        deadline = time.monotonic() + seconds
        while not self.ended() and time.monotonic() < deadline:
            time.sleep(0.05)
        by_themselves = self.ended()
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        return by_themselves

    def codes(self) -> list[int | None]:
        return [process.returncode for process in self.processes]

    def reasons(self) -> list[str]:
        """Return why processes ended, without the numbers, so that equal reasons can be counted."""
        text = self.log.read_text(errors="replace")
        said = re.findall(rf"^{ERROR}(.*)$", text, re.MULTILINE)
        if "Traceback" in text or "panicked at" in text:
            last = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
            said += [f"TRACEBACK {last[-1] if last else ''}"]
        return [re.sub(r"\d+", "N", each)[:110] for each in said]


class Restarter(threading.Thread):
    """Keeps the flow of one exchange running until `stop`. Counts why instances of it ended."""

    def __init__(self, exchange: str, environment: Mapping[str, str], logs: Path, chance: random.Random) -> None:
        super().__init__(name=f"restarter-{exchange}", daemon=True)
        self.exchange = exchange
        self.processes = 1
        self.starts = 0
        self.reasons: Counter[str] = Counter()
        self.stuck = 0
        self._environment = dict(environment)
        self._logs = logs
        self._chance = chance
        self._ending = threading.Event()
        self._lock = threading.Lock()
        self._instances: list[FlowInstance] = []
        self._paused = threading.Event()
        self._clock: Mapping[str, str] = {}
        self._instance: FlowInstance | None = None

    def run(self) -> None:
        while not self._ending.is_set():
            with self._lock:
                instance = None if self._paused.is_set() else self.launch(self.processes, **self._clock)
                self._instance = instance
            if instance is None:
                time.sleep(0.05)
                continue
            while self._instance is instance and not instance.broken() and not self._ending.is_set():
                time.sleep(0.05)
            with self._lock:
                mine, self._instance = (
                    self._instance is instance,
                    None if self._instance is instance else self._instance,
                )
            if self._ending.is_set():
                instance.signal(signal.SIGCONT)
                instance.signal(signal.SIGTERM)
            if mine:
                self.end(instance, DRAIN_SECONDS if self._ending.is_set() else PEERS_SECONDS)
            self._ending.wait(self._chance.uniform(0.1, 1.0))

    def launch(self, processes: int, **extra: str) -> FlowInstance:
        """Start another instance of the flow."""
        self.starts += 1
        log = self._logs / f"{self.exchange}-{self.starts:03}.log"
        instance = FlowInstance(self.exchange, processes, {**self._environment, **extra}, log)
        self._instances.append(instance)
        return instance

    def end(self, instance: FlowInstance, seconds: float) -> bool:
        """Wait for an instance to end, kill it if it does not, and count why it ended."""
        by_itself = instance.wait(seconds)
        self.stuck += not by_itself
        self.reasons.update(instance.reasons())
        return by_itself

    def stop(self) -> None:
        """Stop the flow by SIGTERM, and restart it no more."""
        self._ending.set()
        self.join()

    def pids(self) -> list[int]:
        instance = self._instance
        return [process.pid for process in instance.processes] if instance else []

    def kill_everything(self) -> None:
        """Kill every process of every instance that was ever started."""
        self._ending.set()
        for instance in self._instances:
            instance.wait(0)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Run no instance: the current one drains and ends before."""
        with self._lock:
            self._paused.set()
        try:
            if instance := self._instance:
                instance.signal(signal.SIGCONT)
                instance.signal(signal.SIGTERM)
            deadline = time.monotonic() + DRAIN_SECONDS + PEERS_SECONDS
            while self._instance is not None and time.monotonic() < deadline:
                time.sleep(0.05)
            yield
        finally:
            self._paused.clear()

    def run_once(self, seconds: float, **extra: str) -> FlowInstance:
        """Run an instance of one process until it has caught up, in batches of many rows, or ended with an error."""
        many_rows = {find_exchange(self.exchange).setting("batch_rows"): str(CATCH_UP_ROWS)}
        instance = self.launch(1, K2FLOW_UNTIL_CAUGHT_UP="1", **many_rows, **extra)
        self.end(instance, seconds)
        return instance

    # The faults. Each returns whether a flow was running that it could hit.

    def kill(self, pick: float) -> bool:
        if instance := self._instance:
            instance.processes[int(pick * len(instance.processes))].kill()
        return instance is not None

    def kill_all(self) -> bool:
        if instance := self._instance:
            instance.signal(signal.SIGKILL)
        return instance is not None

    def between_starts(self, action: Callable[[], bool]) -> bool:
        """Kill all processes, and do `action` before the next start. Return what it does."""
        with self._lock:
            if instance := self._instance:
                instance.signal(signal.SIGKILL)
                for process in instance.processes:
                    process.wait()
            return action()

    def freeze(self, pick: float, seconds: float) -> bool:
        """Stop one process for a while; the others wait for it."""
        if instance := self._instance:
            process = instance.processes[int(pick * len(instance.processes))]
            process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)
        return instance is not None

    def replace_while_frozen(self, seconds: float) -> bool:
        """Freeze the whole instance until another one has replaced it. The frozen one then continues, and must end."""
        with self._lock:
            instance, self._instance = self._instance, None
        if instance:
            instance.signal(signal.SIGSTOP)
            time.sleep(seconds)
            instance.signal(signal.SIGCONT)
            deadline = time.monotonic() + REPLACED_SECONDS
            while not instance.broken() and time.monotonic() < deadline:
                time.sleep(0.05)
            instance.signal(signal.SIGTERM)  # it may still run if its successor failed
            self.end(instance, DRAIN_SECONDS)
        return instance is not None

    def rescale(self, processes: int) -> bool:
        self.processes = processes
        if instance := self._instance:
            instance.signal(signal.SIGTERM)
        return instance is not None

    def run_with_clock(self, minutes: float, seconds: float) -> bool:
        """Run the flow for a while with a clock that is `minutes` ahead of the right one; negative: behind."""
        self._clock = clock.shifted(minutes * 60)
        self.rescale(self.processes)
        time.sleep(seconds + CLOCK_SECONDS)
        self._clock = {}
        return self.rescale(self.processes)

    def run_second_copy(self, seconds: float, host: str | None) -> bool:
        """Run a second instance beside the first for a while, on this host or under another host name."""
        instance = self.launch(1, **({"TORTURE_HOST": host} if host else {}))
        deadline = time.monotonic() + seconds + 4
        while not instance.broken() and time.monotonic() < deadline:
            time.sleep(0.05)
        instance.signal(signal.SIGTERM)
        self.end(instance, PEERS_SECONDS)
        return True


def flow_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a flow: `extra`, no other setting of k2flow, and the torture's hooks."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("K2FLOW_", "PYICEBERG_", "BYTEWAX_"))}
    return {**outer, **extra, "PYTHONPATH": os.pathsep.join([str(ROOT / "torture" / "hooks"), str(ROOT)])}
