"""The partitions of the inspected topics, numbered, with the offsets that each table's ledger says it holds."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.iceberg.ledger import CommittedRange, Ledger
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import Layer

NO_EXTENT = CommittedRange(0, 0, 0)
OUTSIDE = -1  # the partition number of rows that no ledger holds
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TopicPartition:
    """One partition of one topic: (topic_id, partition), because a topic that is created again starts at offset 0.

    `extents` are the ledgers', by layer; a layer that holds nothing of the partition is absent. `current`: the topic is
    the one that exists today.
    """

    number: int
    pinned: PinnedTables
    topic_id: str
    partition: int
    current: bool
    extents: dict[Layer, CommittedRange] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self.pinned.exchange.settings.topic

    def extent(self, layer: Layer) -> CommittedRange:
        """Return the extent of a layer's ledger, NO_EXTENT if it holds nothing."""
        return self.extents.get(layer, NO_EXTENT)

    def at(self, offset: int) -> dict[str, object]:
        """Return a sample that names one message."""
        return {"topic": self.topic, "partition": self.partition, "offset": offset}

    def between(self, first: int, end: int) -> dict[str, object]:
        """Return a sample that names the offsets [first, end)."""
        return self.at(first) if end == first + 1 else {**self.at(first), "first": first, "next": end}

    def __str__(self) -> str:
        return f"{self.topic}[{self.partition}]{'' if self.current else ' of the earlier topic'}"


class TopicPartitions:
    """All partitions of one exchange. Maps each row of Bronze or of the dead letters to its partition."""

    def __init__(self, pinned: PinnedTables, first_number: int = 0) -> None:
        self.pinned = pinned
        self._partitions: dict[tuple[str, int], TopicPartition] = {}
        layers = pinned.exchange.layers
        current = next((pinned.ledgers[layer].topic_id for layer in layers if pinned.ledgers[layer].topic_id), "")
        for layer in layers:
            for topic_id, _, extents in _topics(pinned.ledgers[layer]):
                for partition, extent in extents.items():
                    key = (topic_id, partition)
                    if key not in self._partitions:
                        self._partitions[key] = TopicPartition(
                            number=first_number + len(self._partitions),
                            pinned=pinned,
                            topic_id=topic_id,
                            partition=partition,
                            current=topic_id == current,
                        )
                    self._partitions[key].extents[layer] = extent

    def __iter__(self) -> Iterator[TopicPartition]:
        return iter(self._partitions.values())

    def samples(self, messages: Iterable[tuple[int, int]]) -> list[dict[str, object]]:
        """Return samples that name messages, by (number, offset)."""
        by_number = {each.number: each for each in self}
        return [by_number[number].at(offset) for number, offset in messages]

    def __len__(self) -> int:
        return len(self._partitions)

    def numbers(self, layer: Layer, batch: pa.RecordBatch) -> Ints:
        """Return the partition number of each of n rows of Bronze or the dead letters: (n,).

        OUTSIDE if the row is of another topic or the ledger of `layer` does not hold its offset. Rows of a deleted
        topic were written before the ledger closed it, those of its successor after.
        """
        partition = batch.column("partition").fill_null(OUTSIDE).to_numpy()
        offset = batch.column("offset").fill_null(OUTSIDE).to_numpy()
        written_us = batch.column(layer.event_time).cast(pa.int64()).fill_null(0).to_numpy()
        same_topic = pc.equal(batch.column("topic"), self.pinned.exchange.settings.topic).fill_null(False)
        result = np.full(len(partition), OUTSIDE, np.int64)
        after = np.iinfo(np.int64).min
        for topic_id, until, extents in _topics(self.pinned.ledgers[layer]):
            own = (written_us > after) & (written_us <= until)
            for p, extent in extents.items():
                rows = own & (partition == p) & (offset >= extent.first) & (offset < extent.next)
                result[rows] = self._partitions[topic_id, p].number
            after = until
        if same_topic.false_count:
            result[~same_topic.to_numpy(zero_copy_only=False)] = OUTSIDE
        return result


def _topics(ledger: Ledger) -> list[tuple[str, int, Mapping[int, CommittedRange]]]:
    """Return the topics of a ledger, oldest first: id, when the last row was written (us since 1970), extents."""
    end = int(np.iinfo(np.int64).max)
    earlier = [(each.topic_id, each.until * 1000 + 999, each.partitions) for each in ledger.former_topics]
    return [*earlier, (ledger.topic_id, end, ledger.partitions)]
