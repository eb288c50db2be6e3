"""Numbers, spans and times for people; and text that nobody has to trust."""

import re
from decimal import Decimal

from k2flow.report.axes import DAY_US, HOUR_US, MILLISECOND_US, MINUTE_US, SECOND_US, utc

_UNSHOWN = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""What no document may hold, and what would turn the text around it."""


def clean(text: str) -> str:
    """`text` with U+FFFD for what cannot be shown, or would change how the rest is shown. Not escaped."""
    return _UNSHOWN.sub("�", text)


def count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def compact(value: float) -> str:
    """A number of an axis: 0.25, 250, 2.5k, 25M."""
    for size, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.10g}{unit}"
    return f"{value:.10g}"


def binary(size: int) -> str:
    """Bytes, in powers of 1024: 512 B, 1.5 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if size >= 1 << power:
            return f"{size / (1 << power):,.1f}".removesuffix(".0") + f" {unit}"
    return f"{size} B"


def amount(value: Decimal) -> str:
    """All digits of a price or a quantity but zeros at the end of a fraction."""
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def span(seconds: float | None) -> str:
    """A time of about so many seconds, in the unit in which people would say it."""
    if seconds is None:
        return "unknown"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    units = ((86_400, "d"), (3_600, "h"), (60, "min"))
    length, unit = next((each for each in units if seconds >= 2 * each[0]), (1, "s"))
    return f"{max(0.0, seconds) / length:.1f}".removesuffix(".0") + f" {unit}"


def step(us: int) -> str:
    """The length of a step of a time axis, exactly: 5 min, 20 ms."""
    units = ((DAY_US, "d"), (HOUR_US, "h"), (MINUTE_US, "min"), (SECOND_US, "s"), (MILLISECOND_US, "ms"))
    return next(f"{us // length} {unit}" for length, unit in units if us % length == 0)


def moment(us: int | None, fractions: bool = False) -> str:
    """Date and time (UTC) of us since 1970, to the second, or to the millisecond with `fractions`."""
    if us is None:
        return "never"
    text = utc(us).replace(tzinfo=None).isoformat(" ")  # strftime leaves out the zeros before years of three digits
    return text + (f".{us % SECOND_US // MILLISECOND_US:03d}" if fractions else "")
