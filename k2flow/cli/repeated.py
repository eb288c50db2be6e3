"""What commands that go on until they are stopped have in common: how often, and until when."""

import re
import signal
import threading
from types import FrameType

import typer

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def duration(text: str) -> float:
    """Seconds of "90s", "5m", "1h" or "7d"."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smhd])", text.strip())
    if not found:
        raise typer.BadParameter(f"{text!r} is no time: a number and s, m, h or d, as in 5m")
    return float(found[1]) * UNITS[found[2]]


def stop_event() -> threading.Event:
    """Set by SIGTERM and SIGINT: the step that runs is finished."""
    stop = threading.Event()

    def set_it(number: int, frame: FrameType | None) -> None:
        stop.set()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, set_it)
    return stop
