"""The messages of the next batch, while they are gathered."""

from collections.abc import Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.iceberg.ledger import Mark
from k2flow.kafka.consumer import FetchedMessages, last_of_each
from k2flow.kafka.marks import checksum
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, empty_batch, timestamps


class BatchBuffer:
    """Gathers messages into batches without gaps: each batch begins at the offsets where the last one ended."""

    def __init__(self, max_rows: int, max_bytes: int) -> None:
        self.position: dict[int, int] = {}  # the next offset to read, by partition
        self.rows = 0  # messages gathered since the last batch
        self.nbytes = 0  # their size in memory
        self._max_rows = max_rows
        self._max_bytes = max_bytes
        self._first: dict[int, int] = {}  # of the next batch
        self._end: dict[int, int] = {}
        self._marks: dict[int, Mark] = {}  # the last message read, by partition
        self._unmarked: dict[int, tuple[pa.RecordBatch, int, Mark]] = {}  # the same, still without its checksum
        self._schema_headers: dict[tuple[int, int], tuple[str, bytes]] = {}
        self._parts: list[tuple[pa.RecordBatch, npt.NDArray[np.int32], npt.NDArray[np.int64]]] = []

    def begin(
        self, offsets: Mapping[int, int], ends: Mapping[int, int], marks: Mapping[int, Mark] = MappingProxyType({})
    ) -> None:
        """Add partitions, with the offsets to begin at, and the offsets to stop before in those that have an end.

        `marks` are of the last messages that were read before.
        """
        self._marks |= marks
        self.position |= offsets
        self._first |= offsets
        self._end |= ends

    def add(self, fetched: FetchedMessages) -> dict[int, int]:
        """Add messages, except those after a partition's end. Return the time in ms of the last one by partition.

        A message after the end shows that the partition is read up to it, even if its last offsets have no message.
        """
        columns = [fetched.key, fetched.value, timestamps(fetched.timestamp_ms)]
        rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
        partition, offset, time_ms = fetched.partition, fetched.offset, fetched.timestamp_ms
        if self._end:
            keep = offset < _by_partition(self._end, partition)
            if not keep.all():
                for p in np.unique(partition[~keep]).tolist():
                    self.skip_to(p, self._end[p])
                rows = rows.filter(pa.array(keep))
                partition, offset, time_ms = partition[keep], offset[keep], time_ms[keep]
        for i, header in fetched.schema_headers.items():
            self._schema_headers[int(fetched.partition[i]), int(fetched.offset[i])] = header
        last_times = {}
        for p, last in last_of_each(partition):
            self.position[p] = max(self.position[p], int(offset[last]) + 1)
            last_times[p] = int(time_ms[last])
            mark = Mark(int(offset[last]), last_times[p], "", fetched.leader_epoch.get(p, -1))
            self._unmarked[p] = (rows, last, mark)
        if rows.num_rows:
            self._parts.append((rows, partition, offset))
            self.rows += rows.num_rows
            self.nbytes += rows.nbytes
        return last_times

    def marks(self) -> dict[int, Mark]:
        """Return the mark of the last message read of each partition; of its former readers', if there was none yet."""
        for p, (rows, i, mark) in self._unmarked.items():
            key, value = rows["key"][i].as_py(), rows["value"][i].as_py()
            self._marks[p] = mark._replace(checksum=checksum(key, value))
        self._unmarked = {}
        return dict(self._marks)

    def skip_to(self, partition: int, offset: int) -> None:
        """Move the position to the end of a log, past transaction markers and compacted offsets."""
        end = self._end.get(partition, offset)
        self.position[partition] = max(self.position[partition], min(offset, end))

    def drop_from(self, partition: int, offset: int) -> None:
        """Take back the messages of a partition from this offset on, unless a batch has them already.

        The next batch then ends at the last message that is left: the offsets behind it may be damaged too.
        """
        position = self._first[partition]
        parts, self._parts, self.rows, self.nbytes = self._parts, [], 0, 0
        for rows, partitions, offsets in parts:
            keep = (partitions != partition) | (offsets < offset)
            kept = rows.filter(pa.array(keep))
            self._parts.append((kept, partitions[keep], offsets[keep]))
            self.rows += kept.num_rows
            self.nbytes += kept.nbytes
            left = offsets[keep & (partitions == partition)]
            position = int(left[-1]) + 1 if len(left) else position
        self.position[partition] = position

    def at_end(self, partition: int) -> bool:
        """Whether the partition has an end and is read up to it."""
        return self.position[partition] == self._end.get(partition)

    @property
    def all_at_end(self) -> bool:
        """Whether every partition that has an end is read up to it."""
        return all(self.position[p] >= end for p, end in self._end.items())

    @property
    def full(self) -> bool:
        """Whether the batch has grown to its cap of rows or bytes."""
        return self.rows >= self._max_rows or self.nbytes >= self._max_bytes

    @property
    def free_rows(self) -> int:
        """Rows that the batch can still take."""
        return self._max_rows - self.rows

    def take(self, ends_checkpoint: bool) -> MessageBatch:
        """Return the gathered messages as one batch, and begin the next one. It may have no rows and no offsets."""
        offsets = [(p, self._first[p], end) for p, end in self.position.items() if end > self._first[p]]
        marks = {p: mark for p, mark in self.marks().items() if self._first[p] <= mark.offset < self.position[p]}
        parts, self._parts, self.rows, self.nbytes = self._parts, [], 0, 0
        schema_headers, self._schema_headers = self._schema_headers, {}
        self._first = dict(self.position)
        if not parts:
            return empty_batch(offsets, ends_checkpoint)
        rows = pa.concat_batches([rows for rows, _, _ in parts])
        partition = np.concatenate([partition for _, partition, _ in parts])
        offset = np.concatenate([offset for _, _, offset in parts])
        return MessageBatch(rows, partition, offset, offsets, ends_checkpoint, marks, schema_headers)


def _by_partition(values: Mapping[int, int], partition: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    table = np.zeros(max(values) + 1, np.int64)
    table[list(values)] = list(values.values())
    return table[partition]
