"""Rows of a topic in Arrow, with the offsets they came from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

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
"""Kafka messages: key and value unchanged (null and empty apart), CreateTime or LogAppendTime, null without one."""


@dataclass(frozen=True)
class MessageBatch:
    """n rows, the partition and offset of each, and all offsets that they stand for.

    Attributes:
        rows: The messages, or rows derived from them.
        partition: Kafka's partition of each row.
        offset: Kafka's offset of each row.
        offsets: Ranges (partition, first, next), at most one per partition. Every message of [first, next) is one of
            the rows, or has none: a transaction marker, or a dead letter in a batch of trades.
        ends_checkpoint: Whether the tables commit at the end of the batch's epoch, with everything since the last
            commit.
    """

    rows: pa.RecordBatch
    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    offsets: Sequence[tuple[int, int, int]]
    ends_checkpoint: bool = True

    def ranges(self) -> list[OffsetRange]:
        """Return `offsets`, each with the number of its rows."""
        counts = np.bincount(self.partition, minlength=1 + max((p for p, _, _ in self.offsets), default=0))
        return [OffsetRange(p, first, end, int(counts[p])) for p, first, end in self.offsets]

    def after(self, committed: Mapping[int, int]) -> Self:
        """Return the part that is not committed; `committed` has the next offset of each partition that has one."""
        if all(first >= committed.get(p, first) for p, first, _ in self.offsets):
            return self
        offsets = [(p, max(first, committed.get(p, first)), end) for p, first, end in self.offsets]
        offsets = [(p, first, end) for p, first, end in offsets if first < end]
        keep = np.zeros(len(self.offset), bool)
        for p, first, _ in offsets:
            keep |= (self.partition == p) & (self.offset >= first)
        return self.filter(keep, offsets)

    def filter(self, keep: npt.NDArray[np.bool_], offsets: Sequence[tuple[int, int, int]] | None = None) -> Self:
        """Return the rows for which `keep` is true, with the same offsets unless others are given."""
        kept = self.offsets if offsets is None else offsets
        if keep.all():
            return replace(self, offsets=kept)
        rows = self.rows.filter(pa.array(keep))
        return replace(self, rows=rows, partition=self.partition[keep], offset=self.offset[keep], offsets=kept)

    def with_rows(self, rows: pa.RecordBatch) -> Self:
        """Return the same offsets with other rows, one for each of the present rows."""
        return replace(self, rows=rows)


def empty_batch(offsets: Sequence[tuple[int, int, int]], ends_checkpoint: bool) -> MessageBatch:
    """Return a batch without messages that stands for `offsets`."""
    rows = pa.RecordBatch.from_arrays([pa.array([], f.type) for f in MESSAGE_SCHEMA], schema=MESSAGE_SCHEMA)
    return MessageBatch(rows, np.zeros(0, np.int32), np.zeros(0, np.int64), offsets, ends_checkpoint)


def timestamps(milliseconds: npt.NDArray[np.int64]) -> pa.TimestampArray:
    """Convert Kafka's times to microseconds; null for no time (-1) and for a time after 9999, which no table holds."""
    bad = (milliseconds < 0) | (milliseconds > MAX_TIME_US // 1000)
    microseconds = np.where(bad, 0, milliseconds) * 1000
    return pa.array(microseconds, mask=bad if bad.any() else None).cast(pa.timestamp("us", "UTC"))
