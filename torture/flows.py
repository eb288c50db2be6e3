"""Keeps a flow running as an operator would: started again after a pause whenever it ends."""

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
from collections.abc import Mapping
from pathlib import Path

from tests.integration.harness import ROOT, free_addresses

PEERS_SECONDS = 5.0
DRAIN_SECONDS = 30.0
SUPPLANTED_SECONDS = 15.0
ERROR = "k2flow: error: "


class Copy:
    """The processes of one start of a flow, and their log."""

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
        return all(process.poll() is not None for process in self.processes)

    def broken(self) -> bool:
        return any(process.poll() is not None for process in self.processes)

    def wait(self, seconds: float) -> bool:
        """Whether all have ended by themselves within `seconds`; those that have not are killed."""
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
        """Why processes ended, with what differs from one time to the next taken out."""
        text = self.log.read_text(errors="replace")
        said = re.findall(rf"^{ERROR}(.*)$", text, re.MULTILINE)
        if "Traceback" in text or "panicked at" in text:
            last = [line for line in text.splitlines() if re.match(r"[\w.]+(Error|Exception)\b", line)]
            said += [f"TRACEBACK {last[-1] if last else ''}"]
        return [re.sub(r"\d+", "N", each)[:110] for each in said]


class Keeper(threading.Thread):
    """Keeps the flow of one exchange running until it is stopped. Counts why copies of it ended."""

    def __init__(self, exchange: str, environment: Mapping[str, str], logs: Path, chance: random.Random) -> None:
        super().__init__(name=f"keeper-{exchange}", daemon=True)
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
        self._copies: list[Copy] = []
        self._copy: Copy | None = None

    def run(self) -> None:
        while not self._ending.is_set():
            copy = self.launch(self.processes)
            with self._lock:
                self._copy = copy
            while self._copy is copy and not copy.broken() and not self._ending.is_set():
                time.sleep(0.05)
            with self._lock:
                mine, self._copy = self._copy is copy, None if self._copy is copy else self._copy
            if self._ending.is_set():
                copy.signal(signal.SIGCONT)
                copy.signal(signal.SIGTERM)
            if mine:
                self.end(copy, DRAIN_SECONDS if self._ending.is_set() else PEERS_SECONDS)
            self._ending.wait(self._chance.uniform(0.1, 1.0))

    def launch(self, processes: int, **extra: str) -> Copy:
        """A further copy of the flow."""
        self.starts += 1
        log = self._logs / f"{self.exchange}-{self.starts:03}.log"
        copy = Copy(self.exchange, processes, {**self._environment, **extra}, log)
        self._copies.append(copy)
        return copy

    def end(self, copy: Copy, seconds: float) -> bool:
        """Waits for a copy to end, kills it if it does not, and counts why it ended."""
        by_itself = copy.wait(seconds)
        self.stuck += not by_itself
        self.reasons.update(copy.reasons())
        return by_itself

    def stop(self) -> None:
        """Ends the flow as SIGTERM does, and the keeping of it."""
        self._ending.set()
        self.join()

    def pids(self) -> list[int]:
        copy = self._copy
        return [process.pid for process in copy.processes] if copy else []

    def kill_everything(self) -> None:
        """Every process of every copy there ever was."""
        self._ending.set()
        for copy in self._copies:
            copy.wait(0)

    # What follows is done to the flow, and returns whether there was one to do it to.

    def kill(self, pick: float) -> bool:
        if copy := self._copy:
            copy.processes[int(pick * len(copy.processes))].kill()
        return copy is not None

    def kill_all(self) -> bool:
        if copy := self._copy:
            copy.signal(signal.SIGKILL)
        return copy is not None

    def freeze(self, pick: float, seconds: float) -> bool:
        """One process does not run for a while; the others wait for it."""
        if copy := self._copy:
            process = copy.processes[int(pick * len(copy.processes))]
            process.send_signal(signal.SIGSTOP)
            time.sleep(seconds)
            process.send_signal(signal.SIGCONT)
        return copy is not None

    def supplant(self, seconds: float) -> bool:
        """The whole copy is frozen, another one started; the frozen one goes on while that works, and must end."""
        with self._lock:
            copy, self._copy = self._copy, None
        if copy:
            copy.signal(signal.SIGSTOP)
            time.sleep(seconds)
            copy.signal(signal.SIGCONT)
            deadline = time.monotonic() + SUPPLANTED_SECONDS
            while not copy.broken() and time.monotonic() < deadline:
                time.sleep(0.05)
            copy.signal(signal.SIGTERM)  # it is rightly alive where its successor came to nothing
            self.end(copy, DRAIN_SECONDS)
        return copy is not None

    def rescale(self, processes: int) -> bool:
        self.processes = processes
        if copy := self._copy:
            copy.signal(signal.SIGTERM)
        return copy is not None

    def twin(self, seconds: float, host: str | None) -> bool:
        """A second copy beside the first for a while, on this host or on one that calls itself otherwise."""
        copy = self.launch(1, **({"TORTURE_HOST": host} if host else {}))
        deadline = time.monotonic() + seconds + 4
        while not copy.broken() and time.monotonic() < deadline:
            time.sleep(0.05)
        copy.signal(signal.SIGTERM)
        self.end(copy, PEERS_SECONDS)
        return True


def flow_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """The environment of a flow: `extra`, nothing else of k2flow's, and the hooks of the torture."""
    outer = {k: v for k, v in os.environ.items() if not k.startswith(("K2FLOW_", "PYICEBERG_", "BYTEWAX_"))}
    return {**outer, **extra, "PYTHONPATH": os.pathsep.join([str(ROOT / "torture" / "hooks"), str(ROOT)])}
