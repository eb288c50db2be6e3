"""Bronze's rows: read, decoded again, and the newest ones compared with Kafka's messages."""

from collections.abc import Iterable, Iterator, Mapping
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.audit.context import AuditContext
from k2flow.audit.file_checks import read_checked
from k2flow.audit.ledgers import LedgerFilter
from k2flow.audit.offsets import report_damage
from k2flow.audit.report import SAMPLES, Severity
from k2flow.audit.schemas import CheckedBatch, NoSchemas, SchemaCheck
from k2flow.audit.scope import compared_from, proven_before
from k2flow.audit.sums import add_sums
from k2flow.exchange import Exchange
from k2flow.inspection.broker import TopicReader
from k2flow.inspection.files import ReadPlan, prefetch
from k2flow.inspection.partitions import OUTSIDE, TopicPartition, TopicPartitions
from k2flow.inspection.row_hashes import HOUR, content_hash, hashable, id_hash
from k2flow.layers import BRONZE, DLQ, SILVER
from k2flow.trades.messages import HEADER_BYTES, MESSAGE_SCHEMA, MessageBatch, bronze_rows
from k2flow.trades.schema_headers import put_ids_in_front, schema_key

COMPARED_MESSAGES = 20_000
"""The newest rows of an exchange's Bronze that are compared with Kafka, over all its partitions."""
_BARE = content_hash(BRONZE).replace('"avro_payload"', '"bare_payload"')
_KAFKA = """
CREATE OR REPLACE TEMP TABLE kafka (
    number INTEGER, "offset" BIGINT, content UBIGINT, bare BOOLEAN)  -- whether it is to be a row's `bare`
"""
_CHANGED = """
FROM newest n WHERE EXISTS (SELECT 1 FROM kafka k WHERE k.number = n.number AND k."offset" = n."offset")
AND NOT EXISTS (
    SELECT 1 FROM kafka k WHERE k.number = n.number AND k."offset" = n."offset"
    AND k.content = CASE WHEN k.bare THEN n.bare ELSE n.content END)
"""
Ints = npt.NDArray[np.int64]
SummedRows = tuple[pa.RecordBatch, Ints, npt.NDArray[np.bool_]]
"""Rows, their partition numbers, and whether an earlier audit has proven them."""


def newest_offsets(partitions: TopicPartitions) -> dict[TopicPartition, tuple[int, int]]:
    """Return the offsets [first, next) of each partition that are compared with Kafka."""
    extents = {partition: partition.extent(BRONZE) for partition in partitions if partition.current}
    each = COMPARED_MESSAGES // max(1, len(extents))
    return {partition: (max(held.first, held.next - each), held.next) for partition, held in extents.items()}


class MessageHasher:
    """Decodes messages of one exchange and stores their hashes as `valid` or `bad`, or that they are `unresolved`.

    Today's rules decide whether a message is valid. Today's setting decides which fields that TradeV2 does not know are
    kept. After a change of these, earlier rows differ.
    """

    def __init__(self, context: AuditContext, exchange: Exchange, schemas: SchemaCheck) -> None:
        self._context = context
        self._exchange = exchange
        self._schemas = schemas

    def decode(self, messages: MessageBatch) -> list[CheckedBatch]:
        """Decode n messages (MESSAGE_SCHEMA), whose `partition` is the number of the TopicPartition."""
        return self._schemas.decode(messages)

    def store(self, decoded: Iterable[CheckedBatch], day: int) -> None:
        """Store the results of messages that were ingested on `day` (since 1970)."""
        for batch in decoded:
            self._store(batch, day)

    def _store(self, decoded: CheckedBatch, day: int) -> None:
        store, trades, bad = self._context.store, decoded.trades, decoded.dead_letters
        if trades.rows.num_rows:
            batch = hashable(trades.rows)
            batch = batch.append_column("number", pa.array(trades.partition))
            batch = batch.append_column("kafka_offset", pa.array(trades.offset))
            traded = f"{SILVER.date_column} - DATE '1970-01-01'"
            hashes = self._context.hashes.expressions(SILVER)
            store.insert("valid", batch, f"number, kafka_offset, {traded}, {HOUR}, {id_hash(self._exchange)}, {hashes}")
        if bad.num_rows:
            columns = f'partition, "offset", {day}, reason, {content_hash(DLQ)}, hash(detail)'
            store.insert("bad", hashable(bad), columns)
        if decoded.unresolved.num_rows:
            store.insert("unresolved", decoded.unresolved, f'partition, "offset", {day}, schema_id')


class BronzeReader:
    """Fills `runs`, `newest`, `valid`, `bad` and `unresolved` of the database from Bronze's rows of one exchange."""

    def __init__(self, context: AuditContext, partitions: TopicPartitions, hasher: MessageHasher) -> None:
        self._context = context
        self._ledger = LedgerFilter(partitions, BRONZE)
        self._hasher = hasher
        self._newest = {each.number: first for each, (first, _) in newest_offsets(partitions).items()}
        self._proven_before = proven_before(partitions, BRONZE)
        self._compared_from = compared_from(partitions)

    def read(self, plan: ReadPlan) -> None:
        """Read, decode and store, each in a thread of its own, and report the rows outside the ledger."""
        store = self._context.store
        for rows, decoded, found, newest, day in prefetch(self._decoded(prefetch(read_checked(self._context, plan)))):
            add_sums(self._context, BRONZE, *rows)
            store.insert("runs", found)
            if newest.num_rows:
                store.insert("newest", hashable(newest), f'number, "offset", {content_hash(BRONZE)}, {_BARE}')
            self._hasher.store(decoded, day)
        self._ledger.report(self._context)

    def _decoded(
        self, batches: Iterable[pa.RecordBatch]
    ) -> Iterator[tuple[SummedRows, list[CheckedBatch], pa.RecordBatch, pa.RecordBatch, int]]:
        since = self._context.since
        for batch in batches:
            if since is not None:
                batch = batch.filter(pc.greater_equal(batch.column("ingestion_timestamp"), pa.scalar(since)))
            number = self._ledger.numbers(batch)
            inside = number != OUTSIDE
            batch, number = batch.filter(pa.array(inside)), number[inside]
            if batch.num_rows == 0:
                continue
            offset = batch.column("offset").to_numpy()
            proven = offset < self._proven_before[number]
            summed = (batch, number, proven)
            due = offset >= self._compared_from[number]
            if not due.all():
                batch, number, offset, proven = batch.filter(pa.array(due)), number[due], offset[due], proven[due]
            columns = [pa.nulls(batch.num_rows, pa.binary()), batch["avro_payload"], batch["kafka_timestamp"]]
            messages = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
            decoded = self._hasher.decode(MessageBatch(messages, number.astype(np.int32), offset, []))
            day = summed[0].column("ingestion_date").cast(pa.int32())[0].as_py() or 0
            yield summed, decoded, runs(number[~proven], offset[~proven]), self._newest_of(batch, number, offset), day

    def _newest_of(self, batch: pa.RecordBatch, number: Ints, offset: Ints) -> pa.RecordBatch:
        newest = np.zeros(len(number), np.bool_)
        for each, first in self._newest.items():
            newest |= (number == each) & (offset >= first)
        rows = batch.append_column("number", pa.array(number.astype(np.int32))).filter(pa.array(newest))
        return _with_bare(rows)


def compare_with_kafka(
    context: AuditContext,
    partitions: TopicPartitions,
    reader: TopicReader,
    kafka: Mapping[TopicPartition, tuple[int, int]],
) -> None:
    """Check `bronze_changed`: the newest rows are what Kafka's messages give, from its first offset to its end.

    It proves, for COMPARED_MESSAGES rows that Kafka still has the messages of, that the columns that a message decides
    (key, payload, Kafka timestamp) are the message's. Older rows are not compared with Kafka. A payload may have in
    front what the message has in a record header: this schema id, or for a GUID any schema id.
    """
    store, newest = context.store, newest_offsets(partitions)
    store.run(_KAFKA)
    for partition, watermarks in kafka.items():
        first, end = newest[partition]
        _store_messages(context, partition, reader, max(first, watermarks[0]), end, watermarks)
    for partition in kafka:
        of_partition = f"{_CHANGED} AND number = {partition.number}"
        if count := store.count(of_partition):
            offsets = store.column(f'SELECT "offset" {of_partition} ORDER BY ALL LIMIT {SAMPLES}')
            text = f"{partition}: {count:,} rows differ from Kafka's messages: key, payload or Kafka timestamp"
            samples = [partition.at(offset) for offset in offsets]
            context.broken("bronze_changed", text, count, partitions.pinned, BRONZE, samples)


def _store_messages(
    context: AuditContext,
    partition: TopicPartition,
    reader: TopicReader,
    first: int,
    end: int,
    watermarks: tuple[int, int],
) -> None:
    if first >= end:
        return
    found = reader.read(partition.partition, [(first, end)], *watermarks)
    report_damage(context, partition, found)
    if found.unread and not found.damage:
        text = f"{partition}: Kafka did not return all messages from {first} to {end - 1}: their rows are not compared"
        context.add("bronze_not_compared", Severity.NOTE, text, end - first, partition.pinned, BRONZE)
    messages = found.batch(partition.number)
    _insert(context, messages, partition.topic, bare=False)
    if headers := messages.schema_headers:
        at = {offset: isinstance(schema_key(header), UUID) for (_, offset), header in headers.items()}
        with_guid = messages.filter(np.isin(messages.offset, [offset for offset, guid in at.items() if guid]))
        with_id = messages.filter(np.isin(messages.offset, [offset for offset, guid in at.items() if not guid]))
        framed = put_ids_in_front(with_id, NoSchemas(), partition.topic)
        _insert(context, framed, partition.topic, bare=False)
        _insert(context, with_guid, partition.topic, bare=True)


def _insert(context: AuditContext, messages: MessageBatch, topic: str, bare: bool) -> None:
    rows = BRONZE.rows(bronze_rows(messages, topic))
    context.store.insert("kafka", hashable(rows), f'partition, "offset", {content_hash(BRONZE)}, {bare}')


def _with_bare(rows: pa.RecordBatch) -> pa.RecordBatch:
    """Add the payloads without their 5-byte header to rows of Bronze."""
    return rows.append_column(
        "bare_payload", pc.binary_replace_slice(rows.column("avro_payload"), 0, HEADER_BYTES, b"")
    )


def runs(number: Ints, offset: Ints) -> pa.RecordBatch:
    """Return the offsets of n rows as runs (number, first, next) without a gap. A duplicated offset is in two runs."""
    order = np.lexsort((offset, number))
    number, offset = number[order], offset[order]
    first = np.append(True, (number[1:] != number[:-1]) | (offset[1:] != offset[:-1] + 1))
    starts = np.flatnonzero(first[: len(number)])
    ends = np.append(starts, len(number))[1:] - 1
    return pa.RecordBatch.from_pydict(
        {"number": pa.array(number[starts].astype(np.int32)), "first": offset[starts], "next": offset[ends] + 1}
    )
