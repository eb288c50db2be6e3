"""The partitions of the inspected topics, numbered, with the offsets that each table's ledger says it holds."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.iceberg.ledger import CommittedRange, Ledger, Ranges
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import Layer

NO_EXTENT = CommittedRange(0, 0, 0)
OUTSIDE = -1  # the partition number of rows that no ledger holds
Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True, eq=False)
class TopicPartition:
    """One partition of one topic: (topic_id, partition), because a topic that is created again starts at offset 0.

    If its log was replaced under the same topic id, each log is one, and `log` counts them. `extents` are the ledgers',
    by layer; a layer that holds nothing of the partition is absent. `lost` are the offsets of an extent whose rows are
    lost, which was accepted. `current`: the topic and the log are those that exist today. `proven` are the beginnings
    of extents that an earlier audit has proven: `extent` leaves them out.
    """

    number: int
    pinned: PinnedTables
    topic_id: str
    partition: int
    log: int
    current: bool
    extents: dict[Layer, CommittedRange] = field(default_factory=dict)
    lost: dict[Layer, Ranges] = field(default_factory=dict)
    proven: dict[Layer, CommittedRange] = field(default_factory=dict)

    @property
    def topic(self) -> str:
        """The topic's name."""
        return self.pinned.exchange.settings.topic

    def ledger_extent(self, layer: Layer) -> CommittedRange:
        """Return the extent of a layer's ledger, NO_EXTENT if it holds nothing."""
        return self.extents.get(layer, NO_EXTENT)

    def extent(self, layer: Layer) -> CommittedRange:
        """Return the extent of a layer's ledger after the proven offsets, NO_EXTENT if it holds nothing."""
        held, proven = self.ledger_extent(layer), self.proven.get(layer)
        return CommittedRange(proven.next, held.next, held.rows - proven.rows) if proven else held

    def lost_of(self, layer: Layer) -> Ranges:
        """Return the lost offsets of `extent`."""
        first = self.extent(layer).first
        return tuple((start, end) for start, end in self.lost.get(layer, ()) if start >= first)

    def pieces(self, layer: Layer) -> list[tuple[int, int, bool]]:
        """Return all offsets as ranges [first, next), ascending, each with whether the layer holds its rows."""
        extent, end = self.extent(layer), int(np.iinfo(np.int64).max)
        edges = [(0, extent.first), *self.lost_of(layer), (extent.next, end)]
        held = [(gap[1], following[0], True) for gap, following in pairwise(edges)]
        return sorted(held + [(first, next_, False) for first, next_ in edges])

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
        self._partitions: dict[_Log, TopicPartition] = {}
        layers = pinned.exchange.layers
        current = next((pinned.ledgers[layer].topic_id for layer in layers if pinned.ledgers[layer].topic_id), "")
        logs = {layer: _logs(pinned.ledgers[layer]) for layer in layers}
        newest = {
            (key.topic_id, key.partition): key
            for layer in layers
            for key, _, _ in sorted(logs[layer], key=lambda log: log[0])
        }
        for layer in layers:
            for key, _, extent in logs[layer]:
                if key not in self._partitions:
                    self._partitions[key] = TopicPartition(
                        number=first_number + len(self._partitions),
                        pinned=pinned,
                        topic_id=key.topic_id,
                        partition=key.partition,
                        log=key.number,
                        current=key.topic_id == current and key == newest[current, key.partition],
                    )
                self._partitions[key].extents[layer] = extent
            for p, ranges in pinned.ledgers[layer].evidence.lost.items():
                self._partitions[[key for key, _, _ in logs[layer] if key.partition == p][-1]].lost[layer] = ranges

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
        after = dict.fromkeys(np.unique(partition).tolist(), np.iinfo(np.int64).min)
        for key, until, extent in _logs(self.pinned.ledgers[layer]):
            if (p := key.partition) in after:
                written = (written_us > after[p]) & (written_us <= until)
                rows = (partition == p) & (offset >= extent.first) & (offset < extent.next) & written
                result[rows] = self._partitions[key].number
                after[p] = until
        if same_topic.false_count:
            result[~same_topic.to_numpy(zero_copy_only=False)] = OUTSIDE
        return result


class _Log(NamedTuple):
    """One log of one partition: `number` counts those of the same topic id."""

    topic_id: str
    partition: int
    number: int


def _logs(ledger: Ledger) -> list[tuple[_Log, int, CommittedRange]]:
    """Return the logs of a ledger, oldest first: each with the time of the last row (us since 1970), and its extent."""
    end = int(np.iinfo(np.int64).max)
    former = [(each.topic_id, each.until * 1000 + 999, each.partitions) for each in ledger.former_topics]
    count = Counter[tuple[str, int]]()
    found = []
    for topic_id, until, extents in [*former, (ledger.topic_id, end, ledger.partitions)]:
        for partition, extent in extents.items():
            found.append((_Log(topic_id, partition, count[topic_id, partition]), until, extent))
            count[topic_id, partition] += 1
    return found
