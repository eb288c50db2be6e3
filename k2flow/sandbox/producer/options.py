"""What may be asked of the producer."""

from dataclasses import dataclass
from datetime import UTC, datetime

from k2flow.errors import ProduceError


@dataclass(frozen=True)
class ProduceOptions:
    """How many messages, how fast, how bad. Raises ProduceError for values that make no sense.

    `rate` is in messages a second, 0 for as fast as possible; `bad` and `duplicates` are shares of `count`,
    together 0.9 at the most. `start` is the Kafka time of the first message, now if None. The same options
    with the same `start` give the same messages, byte for byte, in the same partitions; another `start` gives
    other message ids too.
    """

    count: int
    rate: float = 0.0
    bad: float = 0.0
    duplicates: float = 0.0
    seed: int = 0
    start: datetime | None = None
    schema_id: int = 1

    def __post_init__(self) -> None:
        checks = {
            "count must be 1 or more": self.count >= 1,
            "rate must be 0 (as fast as possible) or more": self.rate >= 0,
            "bad and duplicates must be 0 or more, and 0.9 together at the most": (
                self.bad >= 0 and self.duplicates >= 0 and self.bad + self.duplicates <= 0.9
            ),
            "seed must be 0 or more": self.seed >= 0,
            "start needs a time zone": self.start is None or self.start.tzinfo is not None,
            "schema_id must be from 0 to 4294967295": 0 <= self.schema_id < 2**32,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ProduceError(rule)

    def start_us(self) -> int:
        """The Kafka time of the first message, in microseconds since 1970: a whole millisecond."""
        return round((self.start or datetime.now(UTC)).timestamp() * 1000) * 1000
