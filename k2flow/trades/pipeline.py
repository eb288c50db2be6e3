"""The steps of a batch: messages in, committables of every layer out. Independent of Bytewax.

    messages ─┬─► Bronze
              └─► decode ─┬─► trades ─┬─► Silver
                          │           └─► by owner ─► deduplicate ─► Gold
                          └─► dead letters ─► DLQ

Before, schema ids in record headers are put in front of the values. Every step but the deduplication is a pure function
of its batch and of the offsets that the tables held at the start.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, replace
from functools import cached_property, partial
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog

from k2flow.config.settings import WINDOW_MEMORY_IDS
from k2flow.dedup.cache import CacheFolder, Origin
from k2flow.dedup.index import SeenIds
from k2flow.dedup.window import DiskWindow
from k2flow.exchange import Exchange
from k2flow.iceberg.committable import Committable
from k2flow.iceberg.writer import TableWriters
from k2flow.layers import DLQ, GOLD_TABLE, Layer, Stream
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import EMPTY_STATS, BatchStats
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.deduplicate import Deduplicator, OwnedTrades, kafka_hours, split_by_owner
from k2flow.trades.gold_ids import GoldIds, file_prefix
from k2flow.trades.messages import MessageBatch, bronze_rows
from k2flow.trades.registry import Schemas
from k2flow.trades.schema_headers import put_ids_in_front
from k2flow.trades.stored_schemas import schema_properties


@dataclass(eq=False)
class Pipeline:
    """The steps of one exchange, from messages to data files that no reader sees before they are committed."""

    exchange: Exchange
    _: KW_ONLY
    catalog: Catalog  # where Gold's keys are read from
    writers: TableWriters
    schemas: Callable[[], Schemas]  # opens the schemas by id, when the first batch is decoded
    committed: Callable[[str], Mapping[int, int]] = lambda table: {}
    """Returns the next offset of each partition that a table held at the start. Earlier rows are not written again."""
    owners: int = 1  # the workers that share the deduplication keys
    cache: Path | None = None  # folder for ids of the window; without it they stay in memory
    memory_ids: int = WINDOW_MEMORY_IDS  # of each worker; more go to the cache

    def process(self, batch: MessageBatch) -> list[Committable]:
        """Return what every table commits of a batch, and end its epoch. For the one owner of all keys."""
        committables, owned = self.write(batch)
        committables += [self._only_deduplicator.process([trades]) for trades in owned]
        self._only_deduplicator.on_epoch_end()
        return committables

    def write(self, batch: MessageBatch) -> tuple[list[Committable], list[OwnedTrades]]:
        """Write a batch into the files of all tables that keep duplicates.

        Of Gold only the offsets are among the committables. Its rows are returned by owner, for `deduplicator`.
        Raises RegistryError if the flow stops while the registry is out of reach, CatalogError if the storage fails.
        """
        metrics.BATCH_MESSAGES.labels(self.exchange.name).observe(batch.rows.num_rows)
        stats = BatchStats(oldest_us=pc.min(batch.rows.column("timestamp")).value)
        if batch.schema_headers:
            batch = put_ids_in_front(batch, self._schemas, self.exchange.settings.topic)
        committables = self._write_layers(Stream.MESSAGES, batch, stats)  # files are written while the batch is decoded
        with tracing.span("decode", messages=batch.rows.num_rows):
            decoded = self._decoder.decode(batch)
        committables = [self._with_schemas(each) for each in committables]
        committables += self._write_layers(Stream.TRADES, decoded.trades, stats)
        committables += self._write_layers(Stream.DEAD_LETTERS, decoded.dead_letters, stats)
        new = decoded.trades.after(self.committed(GOLD_TABLE))
        hours = kafka_hours(batch.rows.column("timestamp"), new.rows)
        return committables, split_by_owner(new, hours, self.exchange.dedup_key, self.owners)

    def deduplicator(self, owner: int) -> Deduplicator:
        """Open the deduplication of one owner's keys. Raises CatalogError."""
        key, window = self.exchange.dedup_key, self.exchange.settings.dedup_window_hours
        ids = GoldIds(self.catalog, self.exchange.code, key, owner, self.owners)
        disk = None
        if self.cache:
            folder = CacheFolder(self.cache, Origin(self.exchange.code, key), owner, self.owners)
            disk = DiskWindow(folder, ids, self.memory_ids)
        seen = SeenIds(disk.load if disk else ids.load, ids.newest_hours, window, owner, self.owners, disk)
        write = partial(self.writers.write, prefix=file_prefix(owner, self.owners, key))
        return Deduplicator(self.exchange, seen, write, disk)

    def _write_layers(self, stream: Stream, rows: MessageBatch, stats: BatchStats) -> list[Committable]:
        layers = self.exchange.layer_by_table.items()
        return [self._write(table, layer, rows, stats) for table, layer in layers if layer.stream is stream]

    def _write(self, table: str, layer: Layer, rows: MessageBatch, stats: BatchStats) -> Committable:
        """Write the rows that `table` did not hold at the start. If it held them all, their stats were published."""
        new = rows.after(self.committed(table))
        if layer.name == DLQ.name:
            stats = replace(stats, reasons=_count_reasons(new.rows))
        committable = Committable(
            table=table,
            ranges=new.ranges(),
            stats=stats if new.offsets else EMPTY_STATS,
            ends_checkpoint=rows.ends_checkpoint,
        )
        if layer.deduplicated or new.rows.num_rows == 0:
            return committable
        with tracing.span("write", table=table, rows=new.rows.num_rows):
            messages = layer.stream is Stream.MESSAGES
            stream = bronze_rows(new, self.exchange.settings.topic) if messages else new.rows
            return replace(committable, files=self.writers.write(table, layer.rows(stream)))

    def _with_schemas(self, committable: Committable) -> Committable:
        """Add the texts of the schemas that Bronze lacks: they come with the first rows that need them."""
        texts = self._schemas.new_texts() if committable.table == self.exchange.bronze else {}
        return replace(committable, properties=schema_properties(self.exchange.name, texts)) if texts else committable

    @cached_property
    def _schemas(self) -> Schemas:
        return self.schemas()

    @cached_property
    def _decoder(self) -> TradeDecoder:
        return TradeDecoder(self.exchange, self._schemas)

    @cached_property
    def _only_deduplicator(self) -> Deduplicator:
        if self.owners != 1:
            raise ValueError(f"{self.owners} owners share the keys: use `write`, and `deduplicator` for each owner")
        return self.deduplicator(0)


def _count_reasons(dead_letters: pa.RecordBatch) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in dead_letters["reason"].value_counts().to_pylist()}
