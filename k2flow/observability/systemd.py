"""Reports to systemd how this process does, by the protocol of sd_notify(3).

The libraries for it use the wall clock, block while systemd is busy, or raise errors when its socket is gone.
"""

import logging
import os
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from k2flow.observability.endpoint import HealthCheck
from k2flow.printable import printable

log = logging.getLogger(__name__)
STARTING_SECONDS = 1.0
"""Time between two reports until the process is ready."""
DEFAULT_WATCHDOG_SECONDS = 30.0  # without WatchdogSec in the unit
MAX_STATUS = 500  # characters: systemd ignores messages above 4096 bytes


@contextmanager
def report_to_systemd(health: HealthCheck, readiness: HealthCheck, stopping: threading.Event) -> Iterator[None]:
    """Report from a thread of its own while entered; without NOTIFY_SOCKET do nothing.

    READY=1 is sent once `readiness` finds no problem. WATCHDOG=1 is sent twice per WatchdogSec while `health` finds
    none; before READY=1 it also extends TimeoutStartSec, since a flow may wait for its broker for any time. STATUS is
    the problem. STOPPING=1 is sent once `stopping` is set, which leaving sets too.

    A socket that is gone or full costs nothing but its messages. Child processes do not inherit the variables: systemd
    listens to the main process of the service alone.
    """
    address, watchdog = os.environ.pop("NOTIFY_SOCKET", None), _watchdog_seconds()
    if address is None:
        yield
        return
    reporter = _Reporter(address, watchdog, health, readiness, stopping)
    thread = threading.Thread(target=reporter.run, name="systemd", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stopping.set()
        thread.join()


def _watchdog_seconds() -> float:
    """Take the variables of the watchdog out of the environment, and return its time."""
    microseconds, pid = os.environ.pop("WATCHDOG_USEC", ""), os.environ.pop("WATCHDOG_PID", "")
    wanted = microseconds.isdecimal() and int(microseconds) > 0 and pid in ("", str(os.getpid()))
    return int(microseconds) / 1e6 if wanted else DEFAULT_WATCHDOG_SECONDS


class _Reporter:
    def __init__(
        self, address: str, watchdog: float, health: HealthCheck, readiness: HealthCheck, stopping: threading.Event
    ) -> None:
        self._address = f"\0{address[1:]}" if address.startswith("@") else address  # an abstract socket
        self._watchdog = watchdog
        self._health = health
        self._readiness = readiness
        self._stopping = stopping
        self._ready = False
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.setblocking(False)

    def run(self) -> None:
        with self._socket:
            beat = self._watchdog / 2
            while not self._stopping.wait(beat if self._ready else min(STARTING_SECONDS, beat)):
                self._report()
            self._send("STOPPING=1", "STATUS=stopping")

    def _report(self) -> None:
        problem, missing = self._health(), self._readiness()
        lines = [f"STATUS={printable(problem or missing or 'ready')[:MAX_STATUS]}"]
        if problem is None:
            lines.append("WATCHDOG=1")
            if not self._ready:
                lines.append(f"EXTEND_TIMEOUT_USEC={self._watchdog * 1e6:.0f}")
        if missing is None:
            lines.append("READY=1")
        self._ready = self._send(*lines) and (self._ready or missing is None)

    def _send(self, *lines: str) -> bool:
        try:
            self._socket.sendto("\n".join(lines).encode(), self._address)
        except OSError as error:
            log.debug("systemd cannot be notified: %s", error)
            return False
        return True
