"""Numbers, durations and times as text; and text from messages, cleaned.

humanize formats durations with words and rounds; the report needs exact prices, axis steps and short units.
"""

import re
from decimal import Decimal

from k2flow.report.axes import DAY_US, HOUR_US, MILLISECOND_US, MINUTE_US, SECOND_US, utc

_UNSAFE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")
"""Characters that no document may contain, and those that change the direction of the text around them."""


def clean(text: str) -> str:
    """Replace characters that cannot be shown, or change how the rest is shown, by U+FFFD. Does not escape."""
    return _UNSAFE.sub("�", text)


def count(number: int | None) -> str:
    """Format a number with thousands separators; None as `unknown`."""
    return "unknown" if number is None else f"{number:,}"


def compact(value: float) -> str:
    """Format a number for an axis: 0.25, 250, 2.5k, 25M."""
    for scale, unit in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= scale:
            return f"{value / scale:.10g}{unit}"
    return f"{value:.10g}"


def size(number: int) -> str:
    """Format a number of bytes: 512 B, 1.5 MiB."""
    for power, unit in ((30, "GiB"), (20, "MiB"), (10, "KiB")):
        if number >= 1 << power:
            return f"{number / (1 << power):,.1f}".removesuffix(".0") + f" {unit}"
    return f"{number} B"


def amount(value: Decimal) -> str:
    """Format a price or quantity with all its digits, without trailing zeros of a fraction."""
    text = f"{value:,f}"
    return text.rstrip("0").rstrip(".") if "." in text else text


def duration(seconds: float | None) -> str:
    """Format a duration of `seconds` in its natural unit."""
    if seconds is None:
        return "unknown"
    if 0 < seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    units = ((86_400, "d"), (3_600, "h"), (60, "min"))
    length, unit = next((each for each in units if seconds >= 2 * each[0]), (1, "s"))
    return f"{max(0.0, seconds) / length:.1f}".removesuffix(".0") + f" {unit}"


def step(us: int) -> str:
    """Format the exact length of a step of a time axis: 5 min, 20 ms."""
    units = ((DAY_US, "d"), (HOUR_US, "h"), (MINUTE_US, "min"), (SECOND_US, "s"), (MILLISECOND_US, "ms"))
    return next(f"{us // length} {unit}" for length, unit in units if us % length == 0)


def moment(us: int | None, fractions: bool = False) -> str:
    """Format us since 1970 as date and time (UTC), to the second, or to the millisecond with `fractions`."""
    if us is None:
        return "never"
    text = utc(us).replace(tzinfo=None).isoformat(" ")  # strftime drops the zeros before years of three digits
    return text + (f".{us % SECOND_US // MILLISECOND_US:03d}" if fractions else "")
