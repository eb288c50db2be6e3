"""Writes tables as a flow does, by the flow's own steps, without Kafka or Bytewax."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
from pyiceberg.manifest import DataFile

from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import TableWriters
from k2flow.observability import tracing
from k2flow.sandbox.producer import ProduceOptions
from k2flow.sandbox.producer.stream import Messages, MessageStream
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, timestamps
from k2flow.trades.pipeline import Pipeline
from k2flow.trades.registry import FixedSchemas


class LakeWriter:
    """Writes the tables of one exchange under `home`. `write` takes batches in the order of their offsets."""

    def __init__(self, home: Path, exchange: str = "binance") -> None:
        install_metadata_cache()
        self.exchange = find_exchange(exchange)
        self.catalog = open_catalog(load_settings(exchange_names()).model_copy(update={"home": home}))
        wanted = definitions(self.exchange)
        create(self.catalog, wanted.values())
        topic = self.exchange.settings.topic
        self.committers = {name: Committer(self.catalog, name, self.exchange.name, topic) for name in wanted}
        for committer in self.committers.values():
            committer.fence("id")
        tables = {name: load_table(self.catalog, name) for name in wanted}
        self._writers = TableWriters(tables, wanted, wait=True)
        self._pipeline = Pipeline(self.exchange, catalog=self.catalog, writers=self._writers, schemas=_schemas)
        self._files: dict[str, list[DataFile]] = {name: [] for name in wanted}  # and ranges: since the last commit
        self._ranges: dict[str, list[OffsetRange]] = {name: [] for name in wanted}

    def write(self, messages: MessageBatch) -> None:
        """Write one batch of messages into all four tables, and commit if the batch ends a checkpoint."""
        for committable in self._pipeline.process(messages):
            self._files[committable.table] += committable.files()
            self._ranges[committable.table] += committable.ranges
        if messages.ends_checkpoint:
            for name, committer in self.committers.items():
                with tracing.span("commit", table=name):
                    committer.commit(self._files[name], self._ranges[name])
                self._files[name], self._ranges[name] = [], []

    def write_files(self, table: str, rows: pa.RecordBatch) -> list[DataFile]:
        """Write rows into data files of a table, without a commit."""
        return self._writers.write(table, rows)()

    def trades(self, batches: Iterator[MessageBatch]) -> Iterator[pa.RecordBatch]:
        """Decode batches of messages, and yield their valid trades as rows of Silver."""
        decoder = TradeDecoder(self.exchange, _schemas())
        for batch in batches:
            yield decoder.decode(batch).trades.rows


def _schemas() -> FixedSchemas:
    return FixedSchemas((1,))


def message_batches(
    options: ProduceOptions, batch: int, partitions: int = 6, exchange: str = "BINANCE"
) -> Iterator[MessageBatch]:
    """Yield the producer's messages as the source emits them, about `batch` at a time."""
    reached = np.zeros(partitions, np.int64)
    gathered: list[Messages] = []
    for chunk in MessageStream(exchange, options, options.start_us()).chunks():
        gathered.append(chunk)
        if sum(len(each.values) for each in gathered) >= batch:
            yield _message_batch(gathered, reached)
            gathered = []
    if gathered:
        yield _message_batch(gathered, reached)


def _message_batch(gathered: list[Messages], reached: np.ndarray) -> MessageBatch:
    """Return the messages as a consumer delivers them; advance `reached`, the next offset of each partition."""
    values = [value for chunk in gathered for value in chunk.values]
    keys = [key for chunk in gathered for key in chunk.keys]
    times = np.concatenate([chunk.time_us for chunk in gathered])
    partition = np.concatenate([chunk.route for chunk in gathered]) % len(reached)
    order = np.argsort(partition, kind="stable")
    counts = np.bincount(partition, minlength=len(reached))
    starts = np.cumsum(counts) - counts
    offset = np.arange(len(partition)) - np.repeat(starts, counts) + np.repeat(reached, counts)
    rows = pa.RecordBatch.from_arrays(
        [pa.array(keys, pa.binary()), pa.array(values, pa.binary()), timestamps(times // 1000)], schema=MESSAGE_SCHEMA
    )
    ranges = [(p, int(reached[p]), int(reached[p] + n)) for p, n in enumerate(counts) if n]
    reached += counts
    return MessageBatch(rows.take(pa.array(order)), partition[order].astype(np.int32), offset, ranges)
