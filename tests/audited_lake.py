"""Tables of one exchange that a pipeline filled, with a broker in memory: an audit of all columns without Kafka."""

import sqlite3
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from pyiceberg.types import IntegerType

from k2flow.audit import AuditReport, audit, exchange_audit
from k2flow.config.settings import load_settings
from k2flow.exchange import Exchange, exchange_names
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.inspection.broker import MessagesRead
from k2flow.layers import BRONZE, DLQ, SILVER, Field, Layer
from k2flow.trades.messages import MessageBatch
from tests.pipeline import TOPIC_ID, PipelineRun, SchemasOf, batches, fixed_schemas

COPY = replace(
    SILVER,
    name="copy",
    table_pattern="copy_{exchange}_trades",
    fields=(
        *SILVER.fields[1:],
        Field("currency_length", IntegerType(), derive=lambda trades: _lengths(trades["currency"])),
    ),
)
"""A fifth layer, without the deduplication key, whose rows the audit compares."""
RAW = replace(BRONZE, name="raw", table_pattern="raw_{exchange}_trades")
"""A layer whose files alone the audit checks."""


def _lengths(texts: pa.StringArray) -> pa.Array:
    return pc.utf8_length(texts).cast(pa.int32())


def _concatenate(pieces: list[MessageBatch]) -> MessageBatch:
    """Return consecutive batches as one."""
    if len(pieces) == 1:
        return pieces[0]
    ends = zip(pieces[0].offsets, pieces[-1].offsets, strict=True)
    return MessageBatch(
        pa.Table.from_batches([piece.rows for piece in pieces]).combine_chunks().to_batches()[0],
        np.concatenate([piece.partition for piece in pieces]),
        np.concatenate([piece.offset for piece in pieces]),
        [(p, first, end) for (p, first, _), (_, _, end) in ends],
    )


@dataclass
class StoredMessages(MessagesRead):
    """Messages as rows, instead of librdkafka's objects."""

    stored: pa.RecordBatch | None = None
    headers: Mapping[int, tuple[str, bytes]] = field(default_factory=dict)

    def rows(self) -> pa.RecordBatch:
        assert self.stored is not None
        return self.stored

    def schema_headers(self) -> dict[int, tuple[str, bytes]]:
        return {offset: header for offset, header in self.headers.items() if offset in self.offset}


@dataclass(frozen=True)
class StoredTopic:
    """The topic's identity."""

    partitions: list[int]

    def same_as(self, topic_id: str) -> bool:
        return topic_id == TOPIC_ID


class StoredTopicReader:
    """Serves one batch as the whole topic, as `inspection.broker.TopicReader` serves Kafka's messages."""

    def __init__(self, messages: MessageBatch) -> None:
        self._messages = messages
        self.topic = StoredTopic([p for p, _, _ in messages.offsets])

    def watermarks(self, partitions: list[int]) -> dict[int, tuple[int, int]]:
        return {p: (first, end) for p, first, end in self._messages.offsets if p in partitions}

    def first_since(self, partition: int, ms: int) -> int | None:
        return 0

    def marks(self, places: Iterable[object]) -> dict[object, object]:
        return {}

    def read(self, partition: int, ranges: list[tuple[int, int]], low: int, high: int) -> MessagesRead:
        wanted = np.zeros(len(self._messages.offset), np.bool_)
        for first, end in ranges:
            wanted |= (self._messages.offset >= first) & (self._messages.offset < end)
        found = self._messages.filter(wanted & (self._messages.partition == partition))
        headers = {offset: header for (p, offset), header in found.schema_headers.items() if p == partition}
        return StoredMessages(offset=found.offset.tolist(), stored=found.rows, headers=headers)

    def close(self) -> None:
        pass


class AuditedLake:
    """The tables of one exchange in a SQLite catalog in `folder`, and the messages that they hold."""

    def __init__(
        self,
        folder: Path,
        exchange: Exchange,
        count: int = 400,
        schemas: SchemasOf = fixed_schemas,
        change: Callable[[MessageBatch], MessageBatch] = lambda messages: messages,
        pieces: int = 1,
        seed: int = 11,
        handlers: int = 1,
        loss: float = 0.0,
    ) -> None:
        """Fill the tables with the first of `pieces` of simulated messages, which `change` may change first."""
        self.folder = folder
        self.exchange = exchange
        whole = batches(pieces, count=count, seed=seed, partitions=2, handlers=handlers, loss=loss)
        self._waiting = [change(piece) for piece in whole]
        self.messages = _concatenate(self._waiting)
        self._schemas = schemas
        with self.environment():
            self.catalog: Catalog = open_catalog(load_settings(exchange_names()))
        self.add()

    def add(self, *, without: tuple[str, ...] = ()) -> bool:
        """Start a flow that commits the next piece, except in the tables `without`: as if it had died before."""
        if not self._waiting:
            return False
        with self.environment():
            PipelineRun(self.catalog, self.exchange, schemas=self._schemas).commit(self._waiting[0], without=without)
        if not without:
            self._waiting.pop(0)
        return True

    def table(self, layer: Layer) -> Table:
        return load_table(self.catalog, layer.table(self.exchange.name))

    def audit(self, full: bool = True, **options: Any) -> AuditReport:
        with self.environment() as patch:
            patch.setattr(exchange_audit, "TopicReader", lambda *_: StoredTopicReader(self.messages))
            return audit(self.catalog, load_settings(exchange_names()), [replace(self.exchange)], full=full, **options)

    def damage(self, layer: Layer, column: str, wrong: Callable[[Any], Any]) -> None:
        """Give one row of a table another value in one column."""
        self.damage_each(layer, {column: wrong})

    def damage_each(self, layer: Layer, wrong: Mapping[str, Callable[[Any], Any]]) -> None:
        """Give one row of a table another value in one column, another row in the next column, and so on.

        The detail of a dead letter of an unknown schema is not compared, so these stay as they are.
        """
        table = self.table(layer)
        rows = table.scan().to_arrow().cast(layer.arrow_schema)
        places: list[int] = list(range(rows.num_rows // 2, rows.num_rows)) + list(range(rows.num_rows // 2))
        if layer is DLQ:
            reasons = rows.column("reason").to_pylist()
            places = [at for at in places if reasons[at] != "unknown_schema"]
        for at, (column, change) in zip(places, wrong.items(), strict=False):
            values = rows.column(column).to_pylist()
            values[at] = change(values[at])
            field = layer.arrow_schema.field(column)
            rows = rows.set_column(layer.columns.index(column), field, pa.array(values, field.type))
        table.overwrite(
            rows.sort_by([(column, "ascending") for column in layer.sorted_by]) if layer.sorted_by else rows
        )

    @contextmanager
    def restored(self) -> Iterator["AuditedLake"]:
        """Restore every table at the end: the metadata files that the catalog pointed to still exist."""
        with sqlite3.connect(self.folder / "catalog.db", timeout=60) as catalog:
            before = catalog.execute("SELECT metadata_location, table_name FROM iceberg_tables").fetchall()
            catalog.commit()
            yield self
            catalog.executemany("UPDATE iceberg_tables SET metadata_location = ? WHERE table_name = ?", before)

    @contextmanager
    def environment(self) -> Iterator[pytest.MonkeyPatch]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("K2FLOW_HOME", str(self.folder))
            yield patch


def other_value(value: Any, kind: pa.DataType) -> Any:
    """Return a value of the same type that differs as little as possible from one in a table."""
    if pa.types.is_map(kind):
        return [*(value or []), ("forged", "1")]
    if pa.types.is_list(kind):
        return [*(value or []), "forged"]
    if pa.types.is_string(kind):
        return f"{value or ''}x"
    if pa.types.is_binary(kind):
        return (value or b"")[:-1] + b"?"
    scalar = pa.scalar(0 if value is None else value, kind)
    if pa.types.is_timestamp(kind):
        return pa.scalar(scalar.value + 1, pa.int64()).cast(kind).as_py()
    if pa.types.is_date(kind):
        return pa.scalar(scalar.value + 1, pa.int32()).cast(kind).as_py()
    return pc.add(scalar, pa.scalar(1, kind if pa.types.is_integer(kind) else pa.int8()).cast(kind)).as_py()


def add_field(patch: pytest.MonkeyPatch, layer: Layer, field: Field) -> None:
    """Add a field to a layer, as one line in k2flow/layers.py does."""
    cached = {name: getattr(layer, name) for name in ("columns", "row_hash", "derived", "arrow_schema")}
    patch.setitem(layer.__dict__, "fields", (*layer.fields, field))
    for name in cached:  # all are there now, so that `patch` puts them back
        patch.delitem(layer.__dict__, name)
