"""Gathers what a report tells, of one snapshot of each table, taken when it begins."""

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
from k2flow.errors import TableDiffersError
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, configured, default_properties, find_table
from k2flow.layers import Layer
from k2flow.maintain.entries import live_files
from k2flow.maintain.plans import is_small
from k2flow.maintain.run import target_bytes
from k2flow.query.connection import connect_tables
from k2flow.report import freshness, queries
from k2flow.report.figures import Figures, Problem, TableFiles, attempt
from k2flow.report.freshness import Commit
from k2flow.status.collector import StatusCollector
from k2flow.status.flows import history

T = TypeVar("T")
DESCRIBED = ("type", "uri", "warehouse", "s3.endpoint", "s3.region")
"""The properties of a catalog that a report, which is made to be passed on, may show."""


def gather(catalog: Catalog, settings: Settings, exchanges: Sequence[Exchange], symbols: Sequence[str]) -> Figures:
    """All figures of these exchanges, with candles of `symbols`, or of the most traded ones if there are none.

    The status is a look of its own, a moment later. Nothing is raised for what cannot be told: that is a Problem.
    """
    made_us = time.time_ns() // 1000
    layers = {name: layer for exchange in exchanges for name, layer in exchange.layer_by_table.items()}
    looked = {name: attempt(partial(find_table, catalog, name)) for name in layers}
    found = {name: table for name, table in looked.items() if isinstance(table, Table)}
    status = attempt(lambda: StatusCollector(catalog, settings, exchanges).collect())
    with _connection(found) as db:

        def told(query: Callable[..., T], *more: object) -> T | Problem:
            return db if isinstance(db, Problem) else attempt(lambda: query(db, exchanges, found.keys(), *more))

        commits = attempt(lambda: _commits(exchanges, found))
        return Figures(
            made_us,
            _described(settings),
            exchanges,
            symbols,
            status,
            told(queries.layer_rows),
            told(queries.taken_in),
            told(queries.traded),
            commits if isinstance(commits, Problem) else told(queries.freshness, commits),
            told(queries.reasons),
            told(queries.markets, symbols),
            {name: _files(looked[name], layer) for name, layer in layers.items()},
        )


@contextmanager
def _connection(tables: Mapping[str, Table]) -> Iterator[duckdb.DuckDBPyConnection | Problem]:
    """DuckDB over these tables, in bounded memory."""
    opened = attempt(lambda: connect_tables(tables))
    if isinstance(opened, Problem):
        yield opened
        return
    with TemporaryDirectory(prefix="k2flow-report-") as folder, closing(opened):
        queries.limit(opened, folder)
        yield opened


def _commits(exchanges: Sequence[Exchange], tables: Mapping[str, Table]) -> list[Commit]:
    """Raises CommitError for an unreadable ledger."""
    found = []
    for exchange in exchanges:
        for layer in freshness.LAYERS:
            if table := tables.get(layer.table(exchange.name)):
                past = history(table.metadata, exchange.name, exchange.settings.topic)
                found += freshness.commits(exchange.name, layer.name, past)
    return found


def _files(table: Table | Problem | None, layer: Layer) -> TableFiles | Problem | None:
    return attempt(lambda: _measured(table, layer)) if isinstance(table, Table) else table


def _measured(table: Table, layer: Layer) -> TableFiles:
    """Raises CatalogError, TableDiffersError."""
    with catalog_errors():
        try:
            files = live_files(table, layer.event_time)
        except ValueError as error:  # PyIceberg's word for a column that is not there
            raise TableDiffersError(
                f"{NAMESPACE}.{table.name()[-1]} is not as k2flow makes it ({error}): `k2flow tables create` says how"
            ) from error
    snapshot, target = table.current_snapshot(), target_bytes(table)
    sizes = np.array([live.file.file_size_in_bytes for live in files], np.int64)
    powers, counts = np.unique(np.frexp(np.maximum(sizes, 1))[1] - 1, return_counts=True)
    return TableFiles(
        snapshot.snapshot_id if snapshot else None,
        snapshot.timestamp_ms * 1000 if snapshot else None,
        sum(live.file.record_count for live in files),
        len(files),
        sum(is_small(live, target) for live in files),
        int(sizes.sum()),
        int(np.median(sizes)) if files else 0,
        target,
        len(table.metadata.snapshots),
        dict(zip(powers.tolist(), counts.tolist(), strict=True)),
    )


def _described(settings: Settings) -> list[tuple[str, str]]:
    """Where the tables are. Of all else that a catalog may be told nobody knows what is a secret."""
    properties = configured(settings) or default_properties(settings.home)
    return [(key, mask(key, properties[key])) for key in DESCRIBED if key in properties]
