"""Gathers the figures of a report, from one snapshot of each table, pinned at its start."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TypeVar

import duckdb
import numpy as np
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.config.settings import Settings, mask
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import configured, default_properties, find_table
from k2flow.layers import CANDLES, CANDLES_TABLE, Layer
from k2flow.maintain.actions import target_bytes
from k2flow.maintain.plans import is_small, live_files
from k2flow.query.connection import connect_tables
from k2flow.query.recent import recent_metadata
from k2flow.query.sql import limit_memory
from k2flow.report import queries
from k2flow.report.axes import DAY_US, utc
from k2flow.report.figures import Figures, FileStats, Unavailable, attempt
from k2flow.report.freshness import LAYERS, Commit, commits, freshness
from k2flow.report.gaps import exchange_gaps
from k2flow.report.queries import ReportSource
from k2flow.status.collector import StatusCollector
from k2flow.status.flows import history
from k2flow.status.tables import column_errors, totals

T = TypeVar("T")
MEMORY_MB = 512
SHOWN_PROPERTIES = ("type", "uri", "warehouse", "s3.endpoint", "s3.region")
"""Properties of a catalog that a report may show: people pass reports on."""


def gather(
    catalog: Catalog,
    settings: Settings,
    exchanges: Sequence[Exchange],
    symbols: Sequence[str],
    since_us: int | None = None,
) -> Figures:
    """Return all figures of these exchanges, with candles of `symbols`, or of the most traded ones if it is empty.

    `since_us` (us since 1970): only rows, commits and files from then on are read; None: all.

    The status is collected separately, a moment later. A figure that cannot be determined is `Unavailable`; nothing is
    raised for it.
    """
    created_us = time.time_ns() // 1000
    layers = {name: layer for exchange in exchanges for name, layer in exchange.layer_by_table.items()}
    layers[CANDLES_TABLE] = CANDLES
    loaded = {name: attempt(partial(find_table, catalog, name)) for name in layers}
    found = {name: table for name, table in loaded.items() if isinstance(table, Table)}
    status = attempt(lambda: StatusCollector(catalog, settings, exchanges, candles=True).collect())
    with _connection(found, since_us) as db:

        def figure(query: Callable[[ReportSource], T]) -> T | Unavailable:
            if isinstance(db, Unavailable):
                return db
            return attempt(lambda: query(ReportSource(db, exchanges, found.keys(), since_us)))

        return Figures(
            created_us=created_us,
            since_us=since_us,
            catalog=_catalog_properties(settings),
            exchanges=exchanges,
            symbols=symbols,
            status=status,
            rows=figure(queries.rows_by_layer),
            ingested=figure(queries.ingested),
            traded=figure(queries.traded),
            freshness=figure(lambda source: freshness(source, _commits(exchanges, found, since_us))),
            reasons=figure(queries.reasons),
            markets=figure(lambda source: queries.markets(source, symbols)),
            gaps=figure(exchange_gaps),
            files={name: _files(loaded[name], layer, since_us) for name, layer in layers.items()},
        )


@contextmanager
def _connection(tables: Mapping[str, Table], since_us: int | None) -> Iterator[duckdb.DuckDBPyConnection | Unavailable]:
    """Open DuckDB over these tables, or their days since a time, in bounded memory."""

    def connection() -> duckdb.DuckDBPyConnection:
        recent = {} if since_us is None else recent_metadata(tables, utc(since_us).date(), Path(folder))
        return connect_tables(tables, metadata=recent)

    with TemporaryDirectory(prefix="k2flow-report-") as folder:
        db = attempt(connection)
        if isinstance(db, Unavailable):
            yield db
            return
        with closing(db):
            limit_memory(db, MEMORY_MB, folder)
            yield db


def _commits(exchanges: Sequence[Exchange], tables: Mapping[str, Table], since_us: int | None) -> list[Commit]:
    """Return the commits of all exchanges since a time. Raises CommitError for an unreadable ledger."""
    found = []
    for exchange in exchanges:
        for layer in LAYERS:
            if table := tables.get(layer.table(exchange.name)):
                past = history(table.metadata, exchange.name, exchange.settings.topic)
                found += commits(exchange.name, layer.name, past)
    return [commit for commit in found if since_us is None or commit.committed_us >= since_us]


def _files(table: Table | Unavailable | None, layer: Layer, since_us: int | None) -> FileStats | Unavailable | None:
    return attempt(lambda: _file_stats(table, layer, since_us)) if isinstance(table, Table) else table


def _file_stats(table: Table, layer: Layer, since_us: int | None) -> FileStats:
    """Return the statistics of a table, and of its files since a day. Raises CatalogError, TableDiffersError."""
    with column_errors(table):
        files = live_files(table, layer.event_time, since=None if since_us is None else since_us // DAY_US)
    snapshot, target = table.current_snapshot(), target_bytes(table)
    whole = totals(snapshot)
    sizes = np.array([live.file.file_size_in_bytes for live in files], np.int64)
    powers, counts = np.unique(np.frexp(np.maximum(sizes, 1))[1] - 1, return_counts=True)
    return FileStats(
        snapshot_id=snapshot.snapshot_id if snapshot else None,
        committed_us=snapshot.timestamp_ms * 1000 if snapshot else None,
        rows=whole.rows,
        files=whole.files,
        small=sum(is_small(live, target) for live in files),
        bytes=whole.bytes,
        median_bytes=int(np.median(sizes)) if files else 0,
        target_bytes=target,
        snapshots=len(table.metadata.snapshots),
        histogram=dict(zip(powers.tolist(), counts.tolist(), strict=True)),
    )


def _catalog_properties(settings: Settings) -> list[tuple[str, str]]:
    """Return where the tables are. Other properties of a catalog may be secrets, so they are not shown."""
    properties = configured(settings) or default_properties(settings.home)
    return [(key, mask(key, properties[key])) for key in SHOWN_PROPERTIES if key in properties]
