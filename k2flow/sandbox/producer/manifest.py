"""What a run sent, so that a demo, a test or an audit can check what became of it."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from k2flow.errors import ProduceError


@dataclass(frozen=True)
class PartitionRange:
    """What one Kafka partition got: `sent` messages, at offsets from `first` on, before `next`.

    `next - first` is more than `sent` where others wrote to the partition at the same time.
    """

    sent: int
    first: int
    next: int


@dataclass(frozen=True)
class Manifest:
    """One run into one topic, and what must come of it.

    `seed` is None for recorded trades. `started` and `ended` are ISO 8601, UTC. Valid messages are the
    `originals`, `duplicates_exact` (the same bytes again) and `duplicates_shifted` (the same message_id at
    another time). `bad` counts by reason code.
    """

    exchange: str
    topic: str
    schema_id: int
    seed: int | None
    started: str
    ended: str
    seconds: float
    originals: int
    duplicates_exact: int
    duplicates_shifted: int
    bad: Mapping[str, int]
    partitions: Mapping[int, PartitionRange]

    @property
    def sent(self) -> int:
        """All messages: the rows that Bronze must get."""
        return self.silver + self.dlq

    @property
    def silver(self) -> int:
        """Valid messages, copies included: the rows that Silver must get."""
        return self.originals + self.duplicates_exact + self.duplicates_shifted

    @property
    def dlq(self) -> int:
        """Bad messages: the rows that the dead-letter table must get."""
        return sum(self.bad.values())

    @property
    def gold(self) -> int:
        """Distinct message ids of valid messages: the rows that Gold must get."""
        return self.originals

    def to_json(self) -> str:
        """All of it, the expected rows of each table included, as indented JSON."""
        expected = {"bronze": self.sent, "silver": self.silver, "dlq": self.dlq, "gold": self.gold}
        return json.dumps({**asdict(self), "sent": self.sent, "expected_rows": expected}, indent=2)

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """The manifest that `to_json` wrote. Raises ProduceError for anything else."""
        try:
            fields = json.loads(text)
            for derived in ("sent", "expected_rows"):
                del fields[derived]
            ranges = {int(number): PartitionRange(**given) for number, given in fields.pop("partitions").items()}
            return Manifest(**fields, partitions=ranges)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ProduceError(f"this is not a manifest of k2flow: {error}") from error
