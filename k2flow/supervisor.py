"""Runs the processes of one exchange's flow: starts them together, passes signals on, ends with them."""

import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from types import FrameType

from k2flow.errors import RunError
from k2flow.runtime import EXIT_FAILED

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

    def pass_on(number: int, _: FrameType | None) -> None:
        for child in children:
            if child.poll() is None:
                child.send_signal(signal.SIGTERM)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, pass_on)
    for i in range(processes):
        cluster = ["-i", str(i), "-a", addresses] if processes > 1 else []
        children.append(subprocess.Popen([*command, *cluster], env={**os.environ, **extra}))
    try:
        _wait(exchange, children)
    finally:
        for child in children:
            if child.poll() is None:
                child.kill()
            child.wait()


def _wait(exchange: str, children: list[subprocess.Popen[bytes]]) -> None:
    failed_at: float | None = None
    while any(child.poll() is None for child in children):
        if failed_at is None and any(child.returncode for child in children):
            failed_at = time.monotonic()
        if failed_at is not None and time.monotonic() > failed_at + PEERS_SECONDS:
            break
        time.sleep(POLL_SECONDS)
    codes = [child.returncode for child in children]
    if any(code not in (None, 0, EXIT_FAILED) for code in codes) or None in codes:
        i = next(i for i, code in enumerate(codes) if code not in (0, EXIT_FAILED))
        how = (
            "hung"
            if codes[i] is None
            else f"was ended by signal {-codes[i]}"
            if codes[i] < 0
            else f"ended with {codes[i]}"
        )
        raise RunError(
            f"process {i} of {len(children)} of {exchange} {how}; nothing is lost: start it again and it goes on "
            "where the tables end"
        )
    if EXIT_FAILED in codes:
        raise SystemExit(EXIT_FAILED)  # the process has said why


def _free_addresses(count: int) -> list[str]:
    """Addresses on loopback that nothing listens on now."""
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [f"127.0.0.1:{each.getsockname()[1]}" for each in sockets]
