"""Queries of the past: by time, by snapshot, and of expired snapshots."""

import time
from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import pytest
from pyiceberg.catalog import Catalog

from k2flow.errors import QueryError
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.tables import gold_definition
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.run import MaintenanceRun
from k2flow.query.connection import connect_to
from k2flow.query.sql import query_errors
from tests.gold import Gold

HOURS = np.array([490_000])


def rows(connection: duckdb.DuckDBPyConnection) -> int:
    with query_errors():
        (count,) = connection.sql(f"SELECT count(*) FROM {GOLD_TABLE}").fetchall()[0]
    return int(count)


def test_query_reads_the_past_by_time_and_by_snapshot(catalog: Catalog) -> None:
    gold = Gold(catalog)
    moments = [datetime.now(UTC)]
    for _ in range(3):
        time.sleep(0.01)
        gold.add("binance", HOURS)
        time.sleep(0.01)
        moments.append(datetime.now(UTC))
    assert [rows(connect_to(catalog, moment)) for moment in moments] == [0, 1, 2, 3]
    snapshots = [
        s for s in load_table(catalog, GOLD_TABLE).metadata.snapshots if s.summary and s.summary["total-records"] == "2"
    ]
    assert rows(connect_to(catalog, snapshots[0].snapshot_id)) == 2
    assert rows(connect_to(catalog, moments[0] - timedelta(days=1))) == 0
    assert rows(connect_to(catalog)) == 3
    with pytest.raises(QueryError, match="no table has a snapshot 12345"):
        connect_to(catalog, 12345)


def test_expired_past_is_an_error_only_for_the_tables_read(catalog: Catalog) -> None:
    gold = Gold(catalog)
    gold.add("binance", HOURS)
    early = datetime.now(UTC)
    for _ in range(115):
        gold.add("binance", HOURS)
    list(MaintenanceRun(catalog, gold_definition(), Timing(0, 0)).run())
    connection = connect_to(catalog, early)
    assert connection.sql("SELECT count(*) FROM silver_binance_trades").fetchall() == [(0,)]
    with pytest.raises(QueryError, match="have expired, the oldest is"):
        rows(connection)
