"""Commands that repeat their work until a signal stops them."""

import re
import signal
import threading
import time
from collections.abc import Iterator
from types import FrameType

import typer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def parse_duration(value: str | float) -> float:
    """Return the seconds of text such as "90s", "5m", "1h" or "7d". A number is in seconds already."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", value.strip())
    if not found:
        raise typer.BadParameter(f"{value!r} is not a duration: give a number and s, m, h or d, such as 5m")
    return float(found[1]) * UNITS[found[2]]


def stop_event() -> threading.Event:
    """Return an event that SIGTERM and SIGINT set, so that the current step can finish."""
    stop = threading.Event()

    def set_it(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, set_it)
    return stop


def every(seconds: float, stop: threading.Event) -> Iterator[None]:
    """Yield at once, then every `seconds` from start to start, until `stop` is set. A longer turn delays the next."""
    while True:
        began = time.monotonic()
        yield
        if stop.wait(max(0.0, seconds - (time.monotonic() - began))):
            return
