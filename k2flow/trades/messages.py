"""Kafka messages in Arrow: their offsets, the header of each payload, and their rows in Bronze."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.iceberg.ledger import Mark, OffsetRange
from k2flow.layers import BRONZE, FIRST_TRADE_US, MAX_TIME_US
from k2flow.trades.reasons import Reason

MESSAGE_SCHEMA = pa.schema([("key", pa.binary()), ("value", pa.binary()), ("timestamp", pa.timestamp("us", "UTC"))])
"""Kafka messages: key and value unchanged (null and empty apart), and Kafka's time, null without a usable one."""
HEADER_BYTES = 5
_HEADER = np.dtype([("magic", "u1"), ("schema_id", ">u4")])


@dataclass(frozen=True)
class MessageBatch:
    """n rows, Kafka's `partition` and `offset` of each, and all `offsets` that they stand for.

    `rows` are the messages, or rows derived from them. `offsets` are ranges (partition, first, next), at most one per
    partition. Every message of [first, next) is one of the rows, or has none: a transaction marker, or a dead letter in
    a batch of trades. `ends_checkpoint`: the tables commit at the end of the batch's epoch, with everything since the
    last commit. `marks` has the last message of each of the ranges that has one.
    """

    rows: pa.RecordBatch
    partition: npt.NDArray[np.int32]
    offset: npt.NDArray[np.int64]
    offsets: Sequence[tuple[int, int, int]]
    ends_checkpoint: bool = True
    marks: Mapping[int, Mark] = field(default_factory=dict)
    schema_headers: Mapping[tuple[int, int], tuple[str, bytes]] = field(default_factory=dict)
    """By partition and offset: name and bytes of the record header with a schema id."""
    header_details: Mapping[tuple[int, int], str] = field(default_factory=dict)
    """By partition and offset: why such a header gives no schema id."""

    def ranges(self) -> list[OffsetRange]:
        """Return `offsets`, each with the number of its rows."""
        counts = np.bincount(self.partition, minlength=1 + max((p for p, _, _ in self.offsets), default=0))
        return [OffsetRange(p, first, end, int(counts[p]), self.marks.get(p)) for p, first, end in self.offsets]

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


def empty_batch(offsets: Sequence[tuple[int, int, int]], ends_checkpoint: bool) -> MessageBatch:
    """Return a batch without messages that stands for `offsets`."""
    rows = pa.RecordBatch.from_pylist([], MESSAGE_SCHEMA)
    return MessageBatch(rows, np.zeros(0, np.int32), np.zeros(0, np.int64), offsets, ends_checkpoint)


def timestamps(milliseconds: npt.NDArray[np.int64]) -> pa.TimestampArray:
    """Convert Kafka's times to microseconds; null for a message without a time (-1) or with an unusable one.

    A time before FIRST_TRADE_US is unusable (a producer that gives seconds), and one after 9999 (microseconds).
    """
    bad = (milliseconds < FIRST_TRADE_US // 1000) | (milliseconds > MAX_TIME_US // 1000)
    microseconds = np.where(bad, 0, milliseconds) * 1000
    return pa.array(microseconds, mask=bad if bad.any() else None).cast(pa.timestamp("us", "UTC"))


def read_headers(payloads: pa.BinaryArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return what is wrong with the header of each of n payloads (NULL_PAYLOAD, BAD_MAGIC or 0), and its schema id."""
    n = len(payloads)
    reasons, ids = np.full(n, Reason.BAD_MAGIC, np.uint8), np.zeros(n, np.int64)
    edges = np.frombuffer(payloads.buffers()[1], np.int32, n + 1 + payloads.offset)[payloads.offset :]
    data = payloads.buffers()[2] or b""
    long = np.flatnonzero(np.diff(edges) >= HEADER_BYTES)
    if len(long):
        # An item at every byte, so that one look-up copies all headers.
        every = np.ndarray((len(data) - HEADER_BYTES + 1,), f"V{HEADER_BYTES}", buffer=data, strides=(1,))
        header = every[edges[long]].view(_HEADER)
        readable = header["magic"] == 0
        reasons[long[readable]] = Reason.VALID
        ids[long] = np.where(readable, header["schema_id"], 0)
    if payloads.null_count:
        null = payloads.is_null().to_numpy(zero_copy_only=False)
        reasons[null], ids[null] = Reason.NULL_PAYLOAD, 0
    return reasons, ids


def header_detail(payload: pa.BinaryScalar, record_header: str | None = None) -> str:
    """Return why the header of a payload cannot be read; `record_header` says why a record header does not help."""
    if not payload.is_valid:
        return "the message has no value"
    value = payload.as_py()
    if len(value) < HEADER_BYTES:
        detail = f"{len(value)} bytes, fewer than the {HEADER_BYTES} of the header"
    else:
        detail = f"first byte 0x{value[0]:02x}, not 0x00"
    return detail + (f"; {record_header}" if record_header else "")


def bronze_rows(messages: MessageBatch, topic: str) -> pa.RecordBatch:
    """Return n messages (MESSAGE_SCHEMA) as n rows of Bronze."""
    n, now = messages.rows.num_rows, datetime.now(UTC)
    columns = [
        key_text(messages.rows.column("key")),
        messages.rows.column("value"),
        pa.repeat(topic, n),
        pa.array(messages.partition),
        pa.array(messages.offset),
        messages.rows.column("timestamp"),
        pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), n),
        pa.repeat(pa.scalar(now.date(), pa.date32()), n),
    ]
    return pa.RecordBatch.from_arrays(columns, schema=BRONZE.arrow_schema)


def key_text(keys: pa.BinaryArray) -> pa.StringArray:
    r"""Return keys as text, bytes that are not UTF-8 as \xNN. Null and empty stay apart."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:  # rare enough to go through the batch key by key
        texts = [None if key is None else key.decode("utf-8", "backslashreplace") for key in keys.to_pylist()]
        return pa.array(texts, pa.string())
