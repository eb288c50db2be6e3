"""A pipeline over real tables, with its committers: the flow without Kafka and without Bytewax."""

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile

from bench.lake import message_batches
from k2flow.exchange import Exchange
from k2flow.iceberg import ledger
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.dedup_key import check_key, key_properties
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import TableWriters
from k2flow.layers import GOLD_TABLE
from k2flow.sandbox.producer import ProduceOptions
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.pipeline import Pipeline
from k2flow.trades.registry import FixedSchemas, Schemas
from k2flow.trades.stored_schemas import stored_texts
from tests.oracle import Message

TOPIC_ID = "topic id"
SchemasOf = Callable[[Mapping[int, str]], Schemas]
"""Opens the schemas of a flow, from the texts that its tables keep."""


def fixed_schemas(stored: Mapping[int, str]) -> Schemas:
    return FixedSchemas((1,))


class PipelineRun:
    """One start of a flow: the pipeline, and a committer for each table, which continue where the tables end."""

    def __init__(
        self, catalog: Catalog, exchange: Exchange, owners: int = 1, schemas: SchemasOf = fixed_schemas
    ) -> None:
        wanted = definitions(exchange)
        create(catalog, wanted.values())
        tables = {name: load_table(catalog, name) for name in wanted}
        self._topic = exchange.settings.topic
        self.committed = {
            name: next_offsets(ledger.read(table.properties, exchange.name, self._topic))
            for name, table in tables.items()
        }
        self.pipeline = Pipeline(
            exchange,
            catalog=catalog,
            writers=TableWriters(tables, wanted),
            schemas=lambda: schemas(stored_texts(tables[exchange.bronze].properties, exchange.name)),
            committed=self.committed.__getitem__,
            owners=owners,
        )
        check_key(tables[GOLD_TABLE].properties, exchange)
        self._committers = {
            name: Committer(catalog, name, exchange.name, self._topic, own_properties=key_properties(exchange, name))
            for name in wanted
        }
        for committer in self._committers.values():
            committer.fence(TOPIC_ID)

    def commit(self, batch: MessageBatch, *, without: tuple[str, ...] = ()) -> None:
        """Process a batch and commit it, except in the tables `without`, as if the flow had died before."""
        files: dict[str, list[DataFile]] = defaultdict(list)
        ranges: dict[str, list[OffsetRange]] = defaultdict(list)
        properties: dict[str, dict[str, str]] = defaultdict(dict)
        for each in self.pipeline.process(batch):
            files[each.table] += each.files()
            ranges[each.table] += each.ranges
            properties[each.table] |= each.properties
        for table, offsets in ranges.items():
            if offsets and table not in without:
                self._committers[table].commit(files[table], offsets, properties[table])


def batches(
    pieces: int, count: int, seed: int, partitions: int = 3, handlers: int = 1, loss: float = 0.0
) -> list[MessageBatch]:
    """Return simulated messages of Binance, with bad ones and duplicates, in as many batches as `pieces`.

    Each of `handlers` has `count` messages, and loses a share of them.
    """
    options = ProduceOptions(count=count, bad=0.05, duplicates=0.05, seed=seed, handlers=handlers, loss=loss)
    (whole,) = message_batches(options, options.messages, partitions)
    key, value, microseconds = whole.rows.columns
    times = pc.floor_temporal(microseconds, unit="millisecond")  # as Kafka keeps them
    whole = replace(whole, rows=pa.RecordBatch.from_arrays([key, value, times], schema=MESSAGE_SCHEMA))
    return [_piece(whole, i, pieces) for i in range(pieces)]


def _piece(whole: MessageBatch, i: int, pieces: int) -> MessageBatch:
    """Return the i-th part of the offsets of every partition."""
    offsets = [(p, end * i // pieces, end * (i + 1) // pieces) for p, _, end in whole.offsets]
    keep = np.zeros(len(whole.offset), bool)
    for p, first, end in offsets:
        keep |= (whole.partition == p) & (first <= whole.offset) & (whole.offset < end)
    return whole.filter(keep, offsets)


def messages_of(batch: MessageBatch) -> list[Message]:
    """Return the messages of a batch as the oracle takes them."""
    columns = [batch.rows.column("key").to_pylist(), batch.rows.column("value").to_pylist()]
    times = [None if us is None else us // 1000 for us in batch.rows.column("timestamp").cast(pa.int64()).to_pylist()]
    rows = zip(batch.partition.tolist(), batch.offset.tolist(), *columns, times, strict=True)
    return [Message(*row) for row in rows]


def next_offsets(held: ledger.Ledger) -> Mapping[int, int]:
    return {p: extent.next for p, extent in held.partitions.items()}
