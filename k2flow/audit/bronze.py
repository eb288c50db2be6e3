"""Bronze's rows: read, decoded again, and the newest ones compared with Kafka's messages."""

from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.audit.context import AuditContext
from k2flow.audit.file_checks import FileChecks
from k2flow.audit.messages import MessageHasher
from k2flow.audit.report import SAMPLES, Severity
from k2flow.inspection.broker import TopicReader
from k2flow.inspection.content import content_hash
from k2flow.inspection.files import ReadPlan, prefetch, read
from k2flow.inspection.partitions import OUTSIDE, TopicPartition, TopicPartitions
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import hashable
from k2flow.layers import BRONZE
from k2flow.trades.decode import DecodedBatch
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, bronze_rows

COMPARED_MESSAGES = 20_000
"""The newest rows of an exchange's Bronze that are compared with Kafka, over all its partitions."""

Ints = npt.NDArray[np.int64]


def newest_offsets(partitions: TopicPartitions) -> dict[TopicPartition, tuple[int, int]]:
    """Return the offsets [first, next) of each partition that are compared with Kafka."""
    extents = {partition: partition.extent(BRONZE) for partition in partitions if partition.current}
    each = COMPARED_MESSAGES // max(1, len(extents))
    return {partition: (max(held.first, held.next - each), held.next) for partition, held in extents.items()}


class BronzeReader:
    """Fills `runs`, `newest`, `valid` and `bad` of the database from Bronze's rows of one exchange.

    Check `bronze_outside_ledger` proves that no row that was read has a topic, partition or offset that Bronze's ledger
    does not hold.
    """

    def __init__(
        self, context: AuditContext, pinned: PinnedTables, partitions: TopicPartitions, hasher: MessageHasher
    ) -> None:
        self._context = context
        self._pinned = pinned
        self._partitions = partitions
        self._hasher = hasher
        self._newest = {each.number: first for each, (first, _) in newest_offsets(partitions).items()}
        self._outside = 0
        self._samples: list[dict[str, object]] = []

    def read(self, plan: ReadPlan) -> None:
        """Read, decode and store, each in a thread of its own, and report the rows outside the ledger."""
        store, checks = self._context.store, FileChecks(plan)
        batches = read(plan, BRONZE.columns, checks, self._context.advance(plan))
        for decoded, found, newest, day in prefetch(self._decoded(prefetch(batches))):
            store.insert("runs", found)
            if newest.num_rows:
                store.insert("newest", hashable(newest), f'number, "offset", {content_hash(BRONZE)}')
            self._hasher.store(decoded, day)
        checks.report(self._context.report)
        if self._outside:
            text = f"{self._outside:,} rows have a topic or offset that the table's ledger does not hold"
            self._context.broken("bronze_outside_ledger", text, self._outside, self._pinned, BRONZE, self._samples)

    def _decoded(
        self, batches: Iterable[pa.RecordBatch]
    ) -> Iterator[tuple[DecodedBatch, pa.RecordBatch, pa.RecordBatch, int]]:
        since = self._context.since
        for batch in batches:
            if since is not None:
                batch = batch.filter(pc.greater_equal(batch.column("ingestion_timestamp"), pa.scalar(since)))
            batch, number = self._inside(batch)
            if batch.num_rows == 0:
                continue
            offset = batch.column("offset").to_numpy()
            columns = [pa.nulls(batch.num_rows, pa.binary()), batch["avro_payload"], batch["kafka_timestamp"]]
            messages = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
            decoded = self._hasher.decode(number, offset, messages)
            day = batch.column("ingestion_date").cast(pa.int32())[0].as_py() or 0
            yield decoded, runs(number, offset), self._newest_of(batch, number, offset), day

    def _newest_of(self, batch: pa.RecordBatch, number: Ints, offset: Ints) -> pa.RecordBatch:
        newest = np.zeros(len(number), np.bool_)
        for each, first in self._newest.items():
            newest |= (number == each) & (offset >= first)
        return batch.append_column("number", pa.array(number.astype(np.int32))).filter(pa.array(newest))

    def _inside(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Ints]:
        """Return the rows that the ledger holds, and the numbers of their partitions."""
        number = self._partitions.numbers(BRONZE, batch)
        inside = number != OUTSIDE
        if inside.all():
            return batch, number
        outside = batch.filter(pa.array(~inside))
        self._outside += outside.num_rows
        self._samples += outside.select(["topic", "partition", "offset"]).slice(0, SAMPLES).to_pylist()
        return batch.filter(pa.array(inside)), number[inside]


class BronzeContentCheck:
    """Check `bronze_changed`: the newest rows are what Kafka's messages give.

    It proves, for COMPARED_MESSAGES rows that Kafka still has the messages of, that the columns that a message decides
    (key, payload, Kafka timestamp) are the message's. Older rows are not compared with Kafka.
    """

    def __init__(self, context: AuditContext, pinned: PinnedTables, partitions: TopicPartitions) -> None:
        self._context = context
        self._pinned = pinned
        self._newest = newest_offsets(partitions)

    def check(self, reader: TopicReader, kafka: Mapping[TopicPartition, tuple[int, int]]) -> None:
        """Compare the partitions that Kafka has, from its first offset to its end."""
        store = self._context.store
        store.run("CREATE OR REPLACE TEMP TABLE kafka AS SELECT * FROM newest LIMIT 0")
        for partition, (low, high) in kafka.items():
            first, end = self._newest[partition]
            self._store(partition, reader, max(first, low), end, (low, high))
        changed = 'FROM newest n JOIN kafka k USING (number, "offset") WHERE n.content <> k.content'
        for partition in kafka:
            of_partition = f"{changed} AND number = {partition.number}"
            if count := store.count(of_partition):
                rows = store.run(f'SELECT "offset" {of_partition} ORDER BY ALL LIMIT {SAMPLES}')
                text = f"{partition}: {count:,} rows differ from Kafka's messages: key, payload or Kafka timestamp"
                samples = [partition.at(offset) for (offset,) in rows]
                self._context.broken("bronze_changed", text, count, self._pinned, BRONZE, samples)

    def _store(
        self, partition: TopicPartition, reader: TopicReader, first: int, end: int, watermarks: tuple[int, int]
    ) -> None:
        if first >= end:
            return
        found = reader.read(partition.partition, [(first, end)], *watermarks)
        if found.unread:
            text = (
                f"{partition}: Kafka did not return all messages from {first} to {end - 1}: their rows are not compared"
            )
            self._context.add("bronze_not_compared", Severity.NOTE, text, end - first, self._pinned, BRONZE)
        n = len(found.offset)
        if n:
            numbers = np.full(n, partition.number, np.int32)
            messages = MessageBatch(found.rows(), numbers, np.array(found.offset, np.int64), [])
            rows = BRONZE.rows(bronze_rows(messages, partition.topic))
            columns = f'partition, "offset", {content_hash(BRONZE)}'
            self._context.store.insert("kafka", hashable(rows), columns)


def runs(number: Ints, offset: Ints) -> pa.RecordBatch:
    """Return the offsets of n rows as runs (number, first, next) without a gap. A duplicated offset is in two runs."""
    order = np.lexsort((offset, number))
    number, offset = number[order], offset[order]
    starts = np.flatnonzero(np.append(True, (number[1:] != number[:-1]) | (offset[1:] != offset[:-1] + 1)))
    ends = np.append(starts[1:], len(number)) - 1
    return pa.RecordBatch.from_pydict(
        {"number": pa.array(number[starts].astype(np.int32)), "first": offset[starts], "next": offset[ends] + 1}
    )
