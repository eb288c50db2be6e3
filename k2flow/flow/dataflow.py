"""The dataflow of an exchange:

    topic ─► source ─┬─────────────────────► Bronze's files ──────────────────────┐
                     └─► decode ─┬─► trades ─┬─► Silver's files ──────────────────┤
                                 │           └─► by owner ─► dedup, Gold's files ─┼─► one committer for each table
                                 └─► failures ──► dead-letter files ──────────────┘

Items are whole batches. Every step but the last is a pure function of its batch, of the tables as they were at the
start and, for Gold, of the ids seen since. Data files are written by whichever worker has the rows; only their names
reach the committers.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from functools import cached_property

import bytewax.operators as op
import pyarrow as pa
import pyarrow.compute as pc
from bytewax.dataflow import Dataflow
from pyiceberg.manifest import DataFile

from k2flow.exchange import GOLD, Exchange
from k2flow.flow.dedup import Deduplicator, OwnedTrades, candidates
from k2flow.flow.first_error import record_first_error
from k2flow.flow.runtime import adopt
from k2flow.flow.session import FlowSession
from k2flow.flow.sink import EMPTY_STATS, Committable, TableSink
from k2flow.flow.source import KafkaSource
from k2flow.iceberg.tables import BRONZE_FIELDS, arrow_schema
from k2flow.iceberg.writer import DataFileWriter
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import BatchStats
from k2flow.trades.decode import Decoded, TradeDecoder
from k2flow.trades.messages import MessageBatch
from k2flow.trades.registry import open_schemas

BRONZE_SCHEMA = arrow_schema(BRONZE_FIELDS)

Item = tuple[str, Committable]
Judged = tuple[Decoded, BatchStats]


def build(exchange: Exchange) -> Dataflow:
    """The dataflow of `exchange`, for `python -m bytewax.run flows.<exchange>`. Does no I/O until it runs."""
    context = FlowSession(exchange)
    steps = Steps(context)
    flow = Dataflow(f"k2flow_{exchange.name}")
    messages = op.input("kafka", flow, KafkaSource(context))
    bronze = op.map("bronze", messages, steps.bronze)
    decoded = op.map("decode", messages, steps.decode)
    files = op.flat_map("files", decoded, steps.files)
    routed = op.flat_map("route", decoded, steps.route)
    gold = op.stateful_batch("dedup", routed, lambda _: Deduplicator(context))
    named = op.map("gold", gold, steps.gold)
    op.output("tables", op.merge("written", bronze, files, named), TableSink(context))
    adopt(context)
    return flow


class Steps:
    """What the operators do with a batch, each a method. Nothing is kept from one batch to the next."""

    def __init__(self, context: FlowSession) -> None:
        self._context = context
        self._exchange = context.exchange

    @record_first_error
    def bronze(self, messages: MessageBatch) -> Item:
        """Every message as it came, in Bronze's files."""
        metrics.BATCH_MESSAGES.labels(self._exchange.name).observe(messages.rows.num_rows)
        told = BatchStats(_oldest_us(messages))
        return self._write(
            self._exchange.bronze, messages, told, lambda rows: bronze_rows(rows, self._exchange.settings.topic)
        )

    @record_first_error
    def decode(self, messages: MessageBatch) -> Judged:
        with tracing.span("decode", messages=messages.rows.num_rows):
            decoded = self._decoder.decode(messages)
        reasons = {
            each["values"]: each["counts"] for each in decoded.failures.rows["reason"].value_counts().to_pylist()
        }
        return decoded, BatchStats(_oldest_us(messages), reasons)

    @record_first_error
    def files(self, judged: Judged) -> list[Item]:
        """Silver's and the dead-letter table's files; of Gold only the offsets, whose rows take another way."""
        decoded, told = judged
        aged = replace(told, reasons={})
        gold = decoded.trades.beyond(self._context.committed(GOLD))
        return [
            self._write(self._exchange.silver, decoded.trades, aged),
            self._write(self._exchange.dlq, decoded.failures, told),
            (GOLD, _written(gold, aged)),
        ]

    @record_first_error
    def route(self, judged: Judged) -> list[tuple[str, OwnedTrades]]:
        """Gold's rows, to the workers that own their ids."""
        decoded, _ = judged
        return candidates(decoded.trades.beyond(self._context.committed(GOLD)), self._context.workers)

    def gold(self, written: tuple[str, Committable]) -> Item:
        """What the deduplication wrote, for Gold's committer."""
        return GOLD, written[1]

    def _write(
        self,
        table: str,
        rows: MessageBatch,
        told: BatchStats,
        shape: Callable[[MessageBatch], pa.RecordBatch] | None = None,
    ) -> Item:
        """The rows that `table` did not hold at the start, in its files."""
        new = rows.beyond(self._context.committed(table))
        if new.rows.num_rows == 0:
            return table, _written(new, told)
        with tracing.span("write", table=table, rows=new.rows.num_rows):
            files = self._context.write(self._writers[table], shape(new) if shape else new.rows)
        return table, _written(new, told, files)

    @cached_property
    def _decoder(self) -> TradeDecoder:
        return TradeDecoder(self._exchange, open_schemas(self._context.settings, self._context.stop))

    @cached_property
    def _writers(self) -> dict[str, DataFileWriter]:
        return {name: self._context.writer(name) for name in self._exchange.tables}


def bronze_rows(messages: MessageBatch, topic: str) -> pa.RecordBatch:
    """n messages (MESSAGE_SCHEMA) as n rows of Bronze."""
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
    return pa.RecordBatch.from_arrays(columns, schema=BRONZE_SCHEMA)


def _written(rows: MessageBatch, told: BatchStats, files: Callable[[], Sequence[DataFile]] = list) -> Committable:
    """What a table's committer is given of the rows that the table did not hold at the start, in `files`.

    Where it held them all nothing is told, since it was told then.
    """
    return Committable(files, rows.ranges(), told if rows.offsets else EMPTY_STATS, rows.commit)


def _oldest_us(messages: MessageBatch) -> int | None:
    """Kafka's time of the oldest of n messages; None if none has one."""
    oldest: int | None = pc.min(messages.rows.column("timestamp")).value
    return oldest


def key_text(keys: pa.BinaryArray) -> pa.StringArray:
    """Keys as text; bytes that are not UTF-8 as \\xNN. Null and empty stay apart."""
    try:
        return keys.cast(pa.string())
    except pa.ArrowInvalid:  # a batch with such a key: seldom enough for one row after another
        texts = [None if key is None else key.decode("utf-8", "backslashreplace") for key in keys.to_pylist()]
        return pa.array(texts, pa.string())
