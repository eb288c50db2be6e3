"""Rows of a topic in Arrow, with the offsets they came from."""

import copyreg
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import MAX_TIME_US

MESSAGE_SCHEMA = pa.schema(
    [
        ("key", pa.binary()),
        ("value", pa.binary()),
        ("timestamp", pa.timestamp("us", "UTC")),
    ]
)
"""Kafka messages: key and value as they came (null and empty apart), CreateTime or LogAppendTime, null without one."""


@dataclass(frozen=True)
class MessageBatch:
    """n rows, the partition and offset that each came from, and all offsets that they stand for.

    `offsets` are (partition, first, next): every message of [first, next) either is one of the rows or gave none (a
    transaction marker, a bad record in a slice of good ones). A partition may stand there once. `ends_checkpoint` says
    whether the tables commit at the end of the batch's epoch, all that they have been given since they last did.
    """

    rows: pa.RecordBatch
    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    offsets: Sequence[tuple[int, int, int]]
    ends_checkpoint: bool = True

    def ranges(self) -> list[OffsetRange]:
        """`offsets` with the number of rows that came out of each."""
        counts = np.bincount(self.partition, minlength=1 + max((p for p, _, _ in self.offsets), default=0))
        return [OffsetRange(p, first, end, int(counts[p])) for p, first, end in self.offsets]

    def after(self, committed: Mapping[int, int]) -> "MessageBatch":
        """Without what is committed already: `committed` gives the next offset of each partition that has one."""
        if all(first >= committed.get(p, first) for p, first, _ in self.offsets):
            return self
        offsets = [(p, max(first, committed.get(p, first)), end) for p, first, end in self.offsets]
        offsets = [(p, first, end) for p, first, end in offsets if first < end]
        keep = np.zeros(len(self.offset), bool)
        for p, first, _ in offsets:
            keep |= (self.partition == p) & (self.offset >= first)
        return self.filter(keep, offsets)

    def filter(
        self, keep: npt.NDArray[np.bool_], offsets: Sequence[tuple[int, int, int]] | None = None
    ) -> "MessageBatch":
        """The rows where `keep` is true, standing for the same offsets unless others are given."""
        left = self.offsets if offsets is None else offsets
        if keep.all():
            return replace(self, offsets=left)
        rows = self.rows.filter(pa.array(keep))
        return replace(self, rows=rows, partition=self.partition[keep], offset=self.offset[keep], offsets=left)

    def with_rows(self, rows: pa.RecordBatch) -> "MessageBatch":
        """The same offsets with other rows, one for each of today's."""
        return replace(self, rows=rows)


def _reduce_batch(batch: pa.RecordBatch) -> tuple[Callable[[bytes], pa.RecordBatch], tuple[bytes]]:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    return _restore_batch, (sink.getvalue().to_pybytes(),)


def _restore_batch(data: bytes) -> pa.RecordBatch:
    return pa.ipc.open_stream(data).read_next_batch()


def pickle_batches_as_ipc() -> None:
    """Makes `pickle` send a RecordBatch as an IPC stream: by itself it sends the whole parent of a small slice."""
    copyreg.pickle(pa.RecordBatch, _reduce_batch)


def timestamps(milliseconds: npt.NDArray[np.int64]) -> pa.TimestampArray:
    """Microseconds; null where a message has none (librdkafka's -1), or one after 9999, which no table could hold."""
    bad = (milliseconds < 0) | (milliseconds > MAX_TIME_US // 1000)
    microseconds = np.where(bad, 0, milliseconds) * 1000
    return pa.array(microseconds, mask=bad if bad.any() else None).cast(pa.timestamp("us", "UTC"))
