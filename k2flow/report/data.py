"""Gathers the figures of a report, from one snapshot of each table, pinned at its start."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from tempfile import TemporaryDirectory
from typing import TypeVar

import duckdb
import numpy as np
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.config.settings import Settings, mask
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import configured, default_properties, find_table
from k2flow.layers import Layer
from k2flow.maintain.actions import target_bytes
from k2flow.maintain.plans import is_small
from k2flow.query.connection import connect_tables, query_errors, string_literal
from k2flow.report import queries
from k2flow.report.figures import Figures, FileStats, Unavailable, attempt
from k2flow.report.freshness import LAYERS, Commit, commits, freshness
from k2flow.report.queries import ReportSource
from k2flow.status.collector import StatusCollector
from k2flow.status.flows import history
from k2flow.status.tables import files_of

T = TypeVar("T")
MEMORY_MB, THREADS = 512, 4  # DuckDB's limits; it spills what exceeds its memory to disk
SHOWN_PROPERTIES = ("type", "uri", "warehouse", "s3.endpoint", "s3.region")
"""Properties of a catalog that a report may show: people pass reports on."""


def gather(catalog: Catalog, settings: Settings, exchanges: Sequence[Exchange], symbols: Sequence[str]) -> Figures:
    """Return all figures of these exchanges, with candles of `symbols`, or of the most traded ones if it is empty.

    The status is collected separately, a moment later. A figure that cannot be determined is `Unavailable`; nothing is
    raised for it.
    """
    created_us = time.time_ns() // 1000
    layers = {name: layer for exchange in exchanges for name, layer in exchange.layer_by_table.items()}
    loaded = {name: attempt(partial(find_table, catalog, name)) for name in layers}
    found = {name: table for name, table in loaded.items() if isinstance(table, Table)}
    status = attempt(lambda: StatusCollector(catalog, settings, exchanges).collect())
    with _connection(found) as db:

        def figure(query: Callable[[ReportSource], T]) -> T | Unavailable:
            return (
                db if isinstance(db, Unavailable) else attempt(lambda: query(ReportSource(db, exchanges, found.keys())))
            )

        return Figures(
            created_us=created_us,
            catalog=_catalog_properties(settings),
            exchanges=exchanges,
            symbols=symbols,
            status=status,
            rows=figure(queries.rows_by_layer),
            ingested=figure(queries.ingested),
            traded=figure(queries.traded),
            freshness=figure(lambda source: freshness(source, _commits(exchanges, found))),
            reasons=figure(queries.reasons),
            markets=figure(lambda source: queries.markets(source, symbols)),
            files={name: _files(loaded[name], layer) for name, layer in layers.items()},
        )


@contextmanager
def _connection(tables: Mapping[str, Table]) -> Iterator[duckdb.DuckDBPyConnection | Unavailable]:
    """Open DuckDB over these tables, in bounded memory."""
    db = attempt(lambda: connect_tables(tables))
    if isinstance(db, Unavailable):
        yield db
        return
    with TemporaryDirectory(prefix="k2flow-report-") as folder, closing(db):
        with query_errors():
            db.execute(f"SET memory_limit = '{MEMORY_MB}MB'; SET threads = {THREADS}")
            db.execute(f"SET preserve_insertion_order = false; SET temp_directory = {string_literal(folder)}")
        yield db


def _commits(exchanges: Sequence[Exchange], tables: Mapping[str, Table]) -> list[Commit]:
    """Return the commits of all exchanges. Raises CommitError for an unreadable ledger."""
    found = []
    for exchange in exchanges:
        for layer in LAYERS:
            if table := tables.get(layer.table(exchange.name)):
                past = history(table.metadata, exchange.name, exchange.settings.topic)
                found += commits(exchange.name, layer.name, past)
    return found


def _files(table: Table | Unavailable | None, layer: Layer) -> FileStats | Unavailable | None:
    return attempt(lambda: _file_stats(table, layer)) if isinstance(table, Table) else table


def _file_stats(table: Table, layer: Layer) -> FileStats:
    """Return the statistics of a table's files. Raises CatalogError, TableDiffersError."""
    files = files_of(table, layer.event_time)
    snapshot, target = table.current_snapshot(), target_bytes(table)
    sizes = np.array([live.file.file_size_in_bytes for live in files], np.int64)
    powers, counts = np.unique(np.frexp(np.maximum(sizes, 1))[1] - 1, return_counts=True)
    return FileStats(
        snapshot_id=snapshot.snapshot_id if snapshot else None,
        committed_us=snapshot.timestamp_ms * 1000 if snapshot else None,
        rows=sum(live.file.record_count for live in files),
        files=len(files),
        small=sum(is_small(live, target) for live in files),
        bytes=int(sizes.sum()),
        median_bytes=int(np.median(sizes)) if files else 0,
        target_bytes=target,
        snapshots=len(table.metadata.snapshots),
        histogram=dict(zip(powers.tolist(), counts.tolist(), strict=True)),
    )


def _catalog_properties(settings: Settings) -> list[tuple[str, str]]:
    """Return where the tables are. Other properties of a catalog may be secrets, so they are not shown."""
    properties = configured(settings) or default_properties(settings.home)
    return [(key, mask(key, properties[key])) for key in SHOWN_PROPERTIES if key in properties]
