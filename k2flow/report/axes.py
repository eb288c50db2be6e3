"""Axes of time and values, and their ticks, as pure functions."""

import math
from dataclasses import dataclass
from datetime import UTC, datetime

MILLISECOND_US = 1_000
SECOND_US = 1_000_000
MINUTE_US, HOUR_US, DAY_US = 60 * SECOND_US, 3_600 * SECOND_US, 86_400 * SECOND_US
STEPS_US = (
    *(n * MILLISECOND_US for n in (1, 2, 5, 10, 20, 50, 100, 200, 500)),
    *(n * SECOND_US for n in (1, 2, 5, 10, 15, 30)),
    *(n * MINUTE_US for n in (1, 2, 5, 10, 15, 30)),
    *(n * HOUR_US for n in (1, 2, 4, 6, 12)),
    *(n * DAY_US for n in (1, 2, 7, 14, 28, 91, 364)),
)
"""The lengths of a step of a time axis. Longer ones are doubles of the last one."""
STRETCH = 3  # an axis this many times longer than most rows need shows mainly a few outliers
_FIRST_SECOND, _LAST_SECOND = -62_135_596_800, 253_402_300_799


@dataclass(frozen=True)
class Axis:
    """`steps` equal steps of time: the i-th begins at `begin_us` + i * `step_us` (us since 1970)."""

    begin_us: int
    step_us: int
    steps: int

    @property
    def end_us(self) -> int:
        """The end of the last step."""
        return self.begin_us + self.steps * self.step_us


def axis(first_us: int, last_us: int, max_steps: int, shortest_us: int = MILLISECOND_US) -> Axis:
    """Divide the time from `first_us` to `last_us` inclusive into steps at multiples of their length.

    There are at most `max_steps`, 2 or more: a boundary may lie between any two moments.
    """
    step = next((s for s in STEPS_US if s >= shortest_us and _steps(first_us, last_us, s) <= max_steps), STEPS_US[-1])
    while _steps(first_us, last_us, step) > max_steps:
        step *= 2
    return Axis(first_us // step * step, step, _steps(first_us, last_us, step))


def _steps(first_us: int, last_us: int, step_us: int) -> int:
    return last_us // step_us - first_us // step_us + 1


def without_outliers(first_us: int, early_us: int, late_us: int, last_us: int) -> tuple[int, int]:
    """Return the bounds of an axis: of all rows, or of most (`early_us`, `late_us`) if the rest stretch it."""
    stretched = last_us - first_us > STRETCH * max(late_us - early_us, MILLISECOND_US)
    return (early_us, late_us) if stretched else (first_us, last_us)


def utc(us: int) -> datetime:
    """Return the second of us since 1970, clamped to the years 1 to 9999, which an axis may exceed."""
    return datetime.fromtimestamp(min(max(us // SECOND_US, _FIRST_SECOND), _LAST_SECOND), UTC)


TOLERANCE = 1e-12
"""Values that differ by less, absolutely or relatively, count as equal. Amounts have eight decimal places, and floats
cannot represent ticks between closer values."""


def value_ticks(low: float, high: float, min_step: float = 0.0, max_steps: int = 5) -> list[float]:
    """Return at most `max_steps` + 2 round values; the first is not above `low`, the last not below `high`.

    They are at least `min_step` apart. If `low` and `high` count as equal there is room on both sides, or above 0.
    """
    if high - low <= max(abs(low), 1.0) * TOLERANCE:
        room = abs(low) * 0.01
        low, high = (low - room, low + room) if room > TOLERANCE else (0.0, 1.0)
    raw = max(min_step, (high - low) / max_steps)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(n * power for n in (1, 2, 5, 10) if n * power >= raw * (1 - 1e-9))
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [n * step for n in range(first, max(last, first + 1) + 1)]


def time_ticks(begin_us: int, end_us: int, max_ticks: int) -> list[tuple[int, str]]:
    """Return at most `max_ticks` (2 or more) round moments in [begin_us, end_us], each with a short text in UTC.

    The text is a date if ticks are days apart or a day begins. It has fractions of seconds if ticks need them.
    """
    found = axis(begin_us, max(begin_us, end_us - 1), max_ticks)
    moments = range(found.begin_us, end_us + 1, found.step_us)
    return [(us, _text(us, found.step_us)) for us in moments if us >= begin_us][:max_ticks]


def _text(us: int, step_us: int) -> str:
    at = utc(us)
    if step_us >= DAY_US:
        return at.date().isoformat()
    if us % DAY_US == 0:
        return f"{at:%m-%d}"
    if step_us >= MINUTE_US:
        return f"{at:%H:%M}"
    if step_us >= SECOND_US:
        return f"{at:%H:%M:%S}"
    return f"{at:%H:%M:%S}.{us % SECOND_US // MILLISECOND_US:03d}"
