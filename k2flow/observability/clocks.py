"""Warns if the host's clock is off: against the tables that it commits to, and against Kafka's time.

A wrong clock loses and duplicates nothing, but retention, time travel and the ages on dashboards are wrong with it.
"""

import logging
import time
from collections.abc import Callable

from k2flow.observability.metrics import KAFKA_CLOCK_OFFSET, TABLE_CLOCK_OFFSET

log = logging.getLogger(__name__)
LIMIT_SECONDS = 60.0
WARN_EVERY_SECONDS = 600.0
INTERVAL_SECONDS = 60.0
_warned: dict[str, float] = {}  # the monotonic time of the last warning, by what was compared


def compare_with_table(table: str, last_commit_ms: int) -> None:
    """Compare the clock with the last commit of a table, in ms since 1970: it may not be in the future."""
    ahead = last_commit_ms / 1000 - time.time()
    TABLE_CLOCK_OFFSET.labels(table).set(max(0.0, ahead))
    if ahead > LIMIT_SECONDS:
        text = "%s: its last commit is %.0f s ahead of this host's clock: set the clocks of all hosts; commits continue"
        _warn(table, text, table, ahead)


def warn_of_catalog(table: str) -> None:
    """Warn that the catalog's clock is behind the newest snapshot of a table."""
    text = "%s: its newest snapshot is ahead of the catalog's clock: set the clocks of all hosts; commits continue"
    _warn(f"catalog {table}", text, table)


class KafkaClock:
    """Compares the clock with Kafka's time of messages that arrive as they are appended.

    Of each minute the message counts that is nearest to the clock: one producer with a wrong clock, or late messages,
    say nothing about this host. The time is the broker's if the topic has LogAppendTime. Otherwise it is the
    producers': then only a difference from all of them is seen. Nothing is seen of a topic without new messages.
    """

    def __init__(self, exchange: str, clock: Callable[[], float] = time.time) -> None:
        self._exchange = exchange
        self._clock = clock
        self._nearest: float | None = None  # seconds that the host's clock is ahead, in this interval
        self._until = 0.0  # the end of the interval, monotonic

    def on_fresh_message(self, time_ms: int, now: float) -> None:
        """Note the Kafka time of a message that was appended just now; `now` is a monotonic time in seconds."""
        if time_ms < 0:
            return
        ahead = self._clock() - time_ms / 1000
        if self._nearest is None:
            self._nearest, self._until = ahead, now + INTERVAL_SECONDS
        self._nearest = min(self._nearest, ahead, key=abs)
        if now >= self._until:
            self._report(self._nearest)
            self._nearest = None

    def _report(self, ahead: float) -> None:
        KAFKA_CLOCK_OFFSET.labels(self._exchange).set(ahead)
        if abs(ahead) > LIMIT_SECONDS:
            where = "ahead of" if ahead > 0 else "behind"
            text = "%s: this host's clock is %.0f s %s Kafka's time of new messages: set the clocks of all hosts"
            _warn(f"kafka {self._exchange}", text, self._exchange, abs(ahead), where)


def _warn(what: str, text: str, *values: object) -> None:
    now = time.monotonic()
    if now - _warned.get(what, -WARN_EVERY_SECONDS) >= WARN_EVERY_SECONDS:
        _warned[what] = now
        log.warning(text, *values)
