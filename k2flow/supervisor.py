"""Runs the processes of one exchange's flow: starts them together, passes signals on, ends with them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import FrameType

from k2flow.errors import RunError
from k2flow.runtime import ERROR, LOST_TOUCH

log = logging.getLogger(__name__)

POLL_SECONDS = 0.1
PEERS_SECONDS = 15.0
"""How long the others may take to end by themselves after one has failed: a peer of a dead one may hang for ever."""


def run(exchange: str, processes: int, extra: Mapping[str, str]) -> None:
    """Runs `processes` processes of flows.<exchange> until all have ended; `extra` is added to their environment.

    SIGTERM and SIGINT are passed on to all, which then drain and commit. Raises RunError where one ended otherwise
    than by itself; the others are ended too, and what was not committed is read again at the next start.
    """
    command = [sys.executable, "-m", "bytewax.run", f"flows.{exchange}"]
    addresses = ";".join(_free_addresses(processes))
    children: list[subprocess.Popen[bytes]] = []
    stopping = threading.Event()

    def pass_on(number: int, _: FrameType | None) -> None:
        stopping.set()
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
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
    if failure := _failure(exchange, codes, stderr.errors):
        raise RunError(failure)


def _wait(children: list[subprocess.Popen[bytes]]) -> None:
    """Until all have ended, or PEERS_SECONDS after the first one failed."""
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + PEERS_SECONDS:
            break
        time.sleep(POLL_SECONDS)


def _failure(exchange: str, codes: list[int | None], errors: list[str]) -> str:
    """Why the flow ended, if it failed: a process that was killed, or else the first error that one told of.

    `codes` are the exit codes, None for a process that hung after another one had failed.
    """
    killed = [(i, f"was ended by signal {-code}") for i, code in enumerate(codes) if code is not None and code < 0]
    if errors and not killed:
        return min(errors, key=lambda error: error == LOST_TOUCH)
    failed = [(i, f"ended with exit code {code}") for i, code in enumerate(codes) if code]
    for i, how in killed + failed:
        return (
            f"process {i} of {len(codes)} of {exchange} {how}; nothing is lost: start it again and it goes on "
            "where the tables end"
        )
    return ""


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


def _free_addresses(count: int) -> list[str]:
    """Addresses on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
