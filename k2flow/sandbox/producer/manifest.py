"""The record of the messages that a run sent, so that a demo or a test can check the tables."""

import json
from collections.abc import Mapping
from dataclasses import dataclass

from pydantic import TypeAdapter

from k2flow.errors import ProduceError
from k2flow.exchange import DEDUP_KEY


@dataclass(frozen=True)
class PartitionRange:
    """The messages sent to one Kafka partition: `sent` of them, at offsets from `first` to before `next`.

    `next - first` is more than `sent` if others wrote to the partition at the same time.
    """

    sent: int
    first: int
    next: int


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """One run into one topic, and the rows that the tables must get from it.

    `seed` is None for recorded trades. `started` and `ended` are ISO 8601, UTC. Valid messages are the `originals`,
    `duplicates_exact` (the same bytes again) and `duplicates_shifted` (the same message_id with another timestamp).
    `bad` counts by reason code. `trades` counts the trades that any of the `handlers` has brought, once each; None in
    manifests of earlier versions. `dedup_key` is the exchange's.
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
    handlers: int = 1
    trades: int | None = None
    dedup_key: tuple[str, ...] = DEDUP_KEY

    @property
    def sent(self) -> int:
        """All messages: the expected rows of Bronze."""
        return self.silver + self.dlq

    @property
    def silver(self) -> int:
        """Valid messages with their copies: the expected rows of Silver."""
        return self.originals + self.duplicates_exact + self.duplicates_shifted

    @property
    def dlq(self) -> int:
        """Bad messages: the expected rows of the dead-letter table."""
        return sum(self.bad.values())

    @property
    def gold(self) -> int:
        """Distinct deduplication keys of valid messages: the expected rows of Gold. A key must name a trade."""
        return self.originals if self.trades is None or "message_id" in self.dedup_key else self.trades

    def to_json(self) -> str:
        """Return the manifest as indented JSON, with the expected rows of each table."""
        expected = {"bronze": self.sent, "silver": self.silver, "dlq": self.dlq, "gold": self.gold}
        fields = _MANIFEST.dump_python(self, mode="json")
        return json.dumps({**fields, "sent": self.sent, "expected_rows": expected}, indent=2)

    @staticmethod
    def from_json(text: str) -> "Manifest":
        """Return the manifest that `to_json` wrote. Raises ProduceError if `text` is something else."""
        try:
            return _MANIFEST.validate_json(text)
        except ValueError as error:
            raise ProduceError(f"this is not a manifest of k2flow: {error}") from error


_MANIFEST = TypeAdapter(Manifest)
