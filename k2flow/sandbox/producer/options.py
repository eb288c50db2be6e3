"""The options of the producer."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from k2flow.errors import ProduceError

MAX_OVER_SECONDS = 12 * 3600
"""Copies are up to six hours older than their original: together still within the deduplication window of Gold."""


@dataclass(frozen=True, kw_only=True)
class ProduceOptions:
    """How many messages to produce, how fast, and with how many defects.

    `rate` is in messages per second; 0: as fast as possible. `bad` and `duplicates` are shares of `count`, together at
    most 0.9. `start` is the Kafka timestamp of the first message; default: now, or `over_seconds` before now. With
    `over_seconds` the messages are sent as fast as possible, and their timestamps spread over that time.

    The same options with the same `start` give the same messages, byte for byte, in the same partitions. Another
    `start` gives other message ids too.

    Raises:
        ProduceError: a value makes no sense.
    """

    count: int
    rate: float = 0.0
    bad: float = 0.0
    duplicates: float = 0.0
    seed: int = 0
    start: datetime | None = None
    over_seconds: float | None = None
    schema_id: int = 1

    def __post_init__(self) -> None:
        checks = {
            "count must be 1 or more": self.count >= 1,
            "rate must be 0 (as fast as possible) or more": self.rate >= 0,
            "bad and duplicates must be 0 or more, and together at most 0.9": (
                self.bad >= 0 and self.duplicates >= 0 and self.bad + self.duplicates <= 0.9
            ),
            "seed must be 0 or more": self.seed >= 0,
            "start needs a time zone": self.start is None or self.start.tzinfo is not None,
            "over must be more than 0 and at most 12 hours": (
                self.over_seconds is None or 0 < self.over_seconds <= MAX_OVER_SECONDS
            ),
            "over spreads messages that are sent at once: omit rate, or over": not (self.over_seconds and self.rate),
            "schema_id must be from 0 to 4294967295": 0 <= self.schema_id < 2**32,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ProduceError(rule)

    def start_us(self) -> int:
        """Return the Kafka timestamp of the first message, in microseconds since 1970: a whole millisecond."""
        start = self.start or datetime.now(UTC) - timedelta(seconds=self.over_seconds or 0)
        return round(start.timestamp() * 1000) * 1000
