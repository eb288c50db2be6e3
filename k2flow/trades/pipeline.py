"""The steps of a batch: messages in, committables of every layer out. Independent of Bytewax.

    messages ─┬─► Bronze
              └─► decode ─┬─► trades ─┬─► Silver
                          │           └─► by owner ─► deduplicate ─► Gold
                          └─► dead letters ─► DLQ

Every step but the deduplication is a pure function of its batch and of the offsets that the tables held at the start.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog

from k2flow.dedup.index import SeenIds
from k2flow.exchange import Exchange
from k2flow.iceberg.committable import Committable
from k2flow.iceberg.writer import TableWriters
from k2flow.layers import DLQ, GOLD_TABLE, Layer, Stream
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import EMPTY_STATS, BatchStats
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.deduplicate import Deduplicator, OwnedTrades, split_by_owner
from k2flow.trades.gold_ids import GoldIds
from k2flow.trades.messages import MessageBatch, bronze_rows
from k2flow.trades.registry import Schemas


class Pipeline:
    """The steps of one exchange, from messages to data files that no reader sees before they are committed."""

    def __init__(
        self,
        exchange: Exchange,
        *,
        catalog: Catalog,
        writers: TableWriters,
        schemas: Callable[[], Schemas],
        committed: Callable[[str], Mapping[int, int]] = lambda table: {},
        owners: int = 1,
    ) -> None:
        """Open nothing yet.

        Args:
            exchange: The exchange whose messages are processed.
            catalog: Where Gold's keys are read from.
            writers: The writers of the exchange's tables.
            schemas: Opens the schemas by id, when the first batch is decoded.
            committed: Returns the next offset of each partition that a table held at the start. Rows before it are
                not written to that table again.
            owners: The workers that share the deduplication keys.
        """
        self._exchange = exchange
        self._catalog = catalog
        self._writers = writers
        self._schemas = schemas
        self._committed = committed
        self._owners = owners

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
        metrics.BATCH_MESSAGES.labels(self._exchange.name).observe(batch.rows.num_rows)
        stats = BatchStats(_oldest_us(batch))
        committables = self._write_layers(Stream.MESSAGES, batch, stats)  # files are written while the batch is decoded
        with tracing.span("decode", messages=batch.rows.num_rows):
            decoded = self._decoder.decode(batch)
        committables += self._write_layers(Stream.TRADES, decoded.trades, stats)
        committables += self._write_layers(Stream.DEAD_LETTERS, decoded.dead_letters, stats)
        new = decoded.trades.after(self._committed(GOLD_TABLE))
        return committables, split_by_owner(new, self._exchange.dedup_key, self._owners)

    def deduplicator(self, owner: int) -> Deduplicator:
        """Open the deduplication of one owner's keys. Raises CatalogError."""
        ids = GoldIds(self._catalog, self._exchange.code, self._exchange.dedup_key)
        window = self._exchange.settings.dedup_window_hours
        seen = SeenIds(ids.load, ids.newest_hour(), window, owner, self._owners)
        return Deduplicator(self._exchange, seen, self._writers.write)

    def _write_layers(self, stream: Stream, rows: MessageBatch, stats: BatchStats) -> list[Committable]:
        layers = self._exchange.layer_by_table.items()
        return [self._write(table, layer, rows, stats) for table, layer in layers if layer.stream is stream]

    def _write(self, table: str, layer: Layer, rows: MessageBatch, stats: BatchStats) -> Committable:
        """Write the rows that `table` did not hold at the start. If it held them all, their stats were published."""
        new = rows.after(self._committed(table))
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
            return replace(committable, files=self._writers.write(table, layer.rows(self._stream_rows(layer, new))))

    def _stream_rows(self, layer: Layer, new: MessageBatch) -> pa.RecordBatch:
        return bronze_rows(new, self._exchange.settings.topic) if layer.stream is Stream.MESSAGES else new.rows

    @cached_property
    def _decoder(self) -> TradeDecoder:
        return TradeDecoder(self._exchange, self._schemas())

    @cached_property
    def _only_deduplicator(self) -> Deduplicator:
        if self._owners != 1:
            raise ValueError(f"{self._owners} owners share the keys: use `write`, and `deduplicator` for each owner")
        return self.deduplicator(0)


def _count_reasons(dead_letters: pa.RecordBatch) -> dict[str, int]:
    return {each["values"]: each["counts"] for each in dead_letters["reason"].value_counts().to_pylist()}


def _oldest_us(messages: MessageBatch) -> int | None:
    """Return Kafka's time of the oldest message, or None if no message has a time."""
    oldest: int | None = pc.min(messages.rows.column("timestamp")).value
    return oldest
