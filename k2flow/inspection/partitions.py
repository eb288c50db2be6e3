"""The partitions of the audited topics, numbered, with the offsets that each table's ledger says it holds."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from k2flow.iceberg.ledger import Extent, Ledger
from k2flow.inspection.pinned import LAYERS, PinnedTables

NONE = Extent(0, 0, 0)
OUTSIDE = -1
"""The number of a partition for rows that no ledger knows."""

Ints = npt.NDArray[np.int64]


@dataclass
class Part:
    """One partition of one topic: (topic_id, partition), for a topic that is made again begins anew at offset 0.

    `extents` are the ledgers', by layer; a layer that has nothing of it is absent. The rest is found by the audit:
    `rows` in Bronze within its extent (each offset once), `low` to `high` the offsets of the rows that were decoded,
    `covered` whether every message of all extents was.
    """

    number: int
    pinned: PinnedTables
    topic_id: str
    partition: int
    current: bool
    extents: dict[str, Extent] = field(default_factory=dict)
    rows: int = 0
    missing: int = 0
    doubled: int = 0
    low: int = 0
    high: int = 0
    covered: bool = True
    kafka: tuple[int, int] | None = None

    @property
    def topic(self) -> str:
        return self.pinned.exchange.settings.topic

    def extent(self, layer: str) -> Extent:
        return self.extents.get(layer, NONE)

    def at(self, offset: int) -> dict[str, object]:
        """A sample that names one message."""
        return {"topic": self.topic, "partition": self.partition, "offset": offset}

    def between(self, first: int, end: int) -> dict[str, object]:
        """A sample that names the offsets [first, end)."""
        return self.at(first) if end == first + 1 else {**self.at(first), "first": first, "next": end}

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]{'' if self.current else ' of the earlier topic'}"


class Parts:
    """All partitions of one exchange, and which of them a row of Bronze or of the dead-letter table is of."""

    def __init__(self, pinned: PinnedTables, first_number: int) -> None:
        self._pinned = pinned
        self._parts: dict[tuple[str, int], Part] = {}
        current = next((pinned.ledgers[layer].topic_id for layer in LAYERS if pinned.ledgers[layer].topic_id), "")
        for layer in LAYERS:
            for topic_id, _, extents in _topics(pinned.ledgers[layer]):
                for partition, extent in extents.items():
                    key = (topic_id, partition)
                    if key not in self._parts:
                        number = first_number + len(self._parts)
                        self._parts[key] = Part(number, pinned, topic_id, partition, topic_id == current)
                    self._parts[key].extents[layer] = extent

    def __iter__(self) -> Iterator[Part]:
        return iter(self._parts.values())

    def numbers(self, layer: str, partition: npt.NDArray[np.int32], offset: Ints, written_us: Ints) -> Ints:
        """Of n rows the number of the part, OUTSIDE where the ledger of `layer` does not hold the row's offset.

        `written_us` (us since 1970) is when each row was written: rows of a topic that was deleted were written
        before the ledger forgot it, those of its successor after.
        """
        result = np.full(len(partition), OUTSIDE, np.int64)
        after = np.iinfo(np.int64).min
        for topic_id, until, extents in _topics(self._pinned.ledgers[layer]):
            own = (written_us > after) & (written_us <= until)
            for p, extent in extents.items():
                rows = own & (partition == p) & (offset >= extent.first) & (offset < extent.next)
                result[rows] = self._parts[topic_id, p].number
            after = until
        return result


def _topics(ledger: Ledger) -> list[tuple[str, int, dict[int, Extent]]]:
    """The topics of a ledger, oldest first: id, when the last row was written (us since 1970), extents."""
    end = int(np.iinfo(np.int64).max)
    earlier = [(e.topic_id, e.until * 1000 + 999, dict(e.partitions)) for e in ledger.earlier]
    return [*earlier, (ledger.topic_id, end, dict(ledger.partitions))]
