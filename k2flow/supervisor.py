"""Runs the processes of one exchange's flow: starts them together, again after a crash, and passes signals on."""

import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from types import FrameType

from k2flow.errors import RunError
from k2flow.runtime import ERROR, EXIT_FAILED, EXIT_UNAVAILABLE, LOST_TOUCH

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
    passing: bool


def run(exchange: str, processes: int, extra: Mapping[str, str]) -> None:
    """Runs `processes` processes of flows.<exchange> until all have ended; `extra` is added to their environment.

    When one crashes the others are ended, and all are started again after a pause that doubles from one failure to the
    next, up to a minute, and varies by chance, so that flows that failed together do not start together. Nothing is
    lost: what was not committed is read again. SIGTERM and SIGINT are passed on to all, which then drain and commit.
    Raises RunError for an error that starting again would not mend, or that kept the flow from starting at all.
    """
    children: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def pass_on(number: int, _: FrameType | None) -> None:
        stopping.set()
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    failures = 0
    while not stopping.is_set():
        began = time.monotonic()
        failure = _run_once(exchange, processes, extra, children, stopping, again=failures > 0)
        if failure is None:
            return
        if not failure.passing or stopping.is_set():
            raise RunError(failure.reason)
        failures = 1 if time.monotonic() - began > HEALTHY_SECONDS else failures + 1
        pause = min(2.0 ** (failures - 1), LONGEST_PAUSE_SECONDS) * random.uniform(0.5, 1)
        log.error("%s; starting %s again in %.1f s (failure %d in a row)", failure.reason, exchange, pause, failures)
        stopping.wait(pause)


def _run_once(
    exchange: str,
    processes: int,
    extra: Mapping[str, str],
    children: list[subprocess.Popen[bytes]],
    stopping: threading.Event,
    again: bool,
) -> Failure | None:
    """Starts all processes, in `children`, and waits for their end; None if it was a good one."""
    command = [sys.executable, "-m", "bytewax.run", f"flows.{exchange}"]
    addresses = ";".join(free_addresses(processes))
    children.clear()
    began = time.monotonic()
    with _StandardError() as stderr:
        for i in range(processes):
            cluster = ["-i", str(i), "-a", addresses] if processes > 1 else []
            children.append(subprocess.Popen([*command, *cluster], env={**os.environ, **extra}, stderr=stderr.pipe))
        try:
            _wait(children)
            codes = [child.poll() for child in children]
        finally:
            for child in children:
                if child.poll() is None:
                    child.kill()
                child.wait()
    if stopping.is_set():  # a process that was still importing knows no better than to die of the signal
        codes = [0 if code == -signal.SIGTERM else code for code in codes]
    return _failure(exchange, codes, stderr.errors, again or time.monotonic() - began > UP_SECONDS)


def _wait(children: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or PEERS_SECONDS after the first one failed."""
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + PEERS_SECONDS:
            break
        time.sleep(POLL_SECONDS)


def _failure(exchange: str, codes: list[int | None], errors: list[str], was_up: bool) -> Failure | None:
    """Why the flow ended, if it failed: a process that was killed, or else the first error that one told of.

    `codes` are the exit codes, None for a process that hung after another one had failed. An error that may pass, or
    that nobody foresaw, is worth another start if the flow was up before: at the first start the user must know.
    """
    if not any(codes) and None not in codes:
        return None
    killed = [(i, f"was ended by signal {-code}") for i, code in enumerate(codes) if code is not None and code < 0]
    crashed = [(i, f"ended with exit code {code}") for i, code in enumerate(codes) if code]
    if errors and not killed:
        lasting = EXIT_FAILED in codes or (EXIT_UNAVAILABLE in codes and not was_up)
        return Failure(min(errors, key=lambda error: error == LOST_TOUCH), not lasting)
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
                if line.startswith(ERROR):
                    self.errors.append(line.removeprefix(ERROR).strip())
                else:
                    print(line, end="", file=sys.stderr, flush=True)


def free_addresses(count: int) -> list[str]:
    """Addresses on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
