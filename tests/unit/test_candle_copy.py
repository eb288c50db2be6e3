"""A connection's local copy of the newest candles: the same rows as the table, in fewer files."""

import logging
import tempfile
from contextlib import closing
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.iceberg.catalog import load_table
from k2flow.layers import CANDLES, CANDLES_TABLE, HOUR_US
from k2flow.query import candle_copy
from k2flow.query.candles import MINUTES
from k2flow.query.connection import CANDLE_ROWS, connect_to
from tests.gold import Gold
from tests.property.test_candles import Flow

FIRST_DAY = 20_454  # 2026-01-01
DAYS = 5


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of temporary files."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    return tmp_path / "temporary"


@pytest.fixture
def gold(catalog: Catalog) -> Gold:
    """Return Gold whose candles are of some hours of DAYS days, but the last one but one."""
    gold = Gold(catalog)
    add(gold, [day for day in range(DAYS) if day != DAYS - 2])
    Flow(catalog).step()
    return gold


def add(gold: Gold, days: list[int]) -> None:
    """Commit trades of three symbols, in several hours of each day."""
    hours = np.array([day * 24 + hour for day in days for hour in (0, 7, 23) for _ in range(40)])
    us = (FIRST_DAY * 24 + hours) * HOUR_US + np.arange(len(hours)) % 40 * 80_000_000
    amounts = pa.array([Decimal(i + 1) for i in range(len(us))], pa.decimal128(18, 8))
    gold.add(
        "binance",
        us // HOUR_US,
        timestamp=pa.array(us).cast(pa.timestamp("us", "UTC")),
        symbol=pa.array([f"S{i % 3}" for i in range(len(us))]),
        trade_id=pa.array([f"B-{i}" for i in range(len(us))]),
        price=amounts,
        quantity=amounts,
        side=pa.array(["BUY", "SELL"] * (len(us) // 2)),
    )


def rows(db: duckdb.DuckDBPyConnection, interval: str) -> list[tuple[object, ...]]:
    return db.sql(f"FROM candles('{interval}') ORDER BY exchange, symbol, open_time").fetchall()


def source(db: duckdb.DuckDBPyConnection) -> str:
    """Return what the macro reads."""
    ((text,),) = db.sql(f"SELECT {CANDLE_ROWS}()").fetchall()
    return str(text)


def copied(catalog: Catalog) -> duckdb.DuckDBPyConnection:
    """Return a connection that has just made its copy."""
    db = connect_to(catalog)
    for _ in range(candle_copy.USES):
        source(db)
    return db


@pytest.mark.usefixtures("gold")
@pytest.mark.parametrize("most", [2, 31])
def test_copy_has_the_rows_of_the_table(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    """Even of days that are older than the copy. It is deleted with the connection."""
    monkeypatch.setattr(candle_copy, "MAX_DAYS", most)
    with closing(connect_to(catalog)) as table, closing(copied(catalog)) as db:
        assert ("UNION ALL" in source(db)) == (most < DAYS)
        assert len(list(folder.glob("k2flow-candles-*/*.parquet"))) == min(most, DAYS)
        for interval in MINUTES:
            assert rows(db, interval) == rows(table, interval)
        one, other = (each.sql("DESCRIBE FROM candles('1m')").fetchall() for each in (db, table))
        assert one == other
        assert [row[0] for row in one] == list(CANDLES.columns)
    del db
    assert list(folder.iterdir()) == []


@pytest.mark.usefixtures("gold")
def test_copy_ends_at_its_size(catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candle_copy, "MAX_BYTES", 1)
    with closing(connect_to(catalog)) as table, closing(copied(catalog)) as db:
        assert len(list(folder.glob("k2flow-candles-*/*.parquet"))) == 1
        assert rows(db, "1h") == rows(table, "1h")


@pytest.mark.usefixtures("gold")
def test_first_queries_read_the_table(catalog: Catalog, folder: Path) -> None:
    with closing(connect_to(catalog)) as db:
        rows(db, "1h")
        rows(db, "1h")
        assert source(db) == CANDLES_TABLE
    assert list(folder.iterdir()) == []


def test_copy_is_of_the_snapshot_that_the_connection_reads(catalog: Catalog, gold: Gold) -> None:
    now = datetime.now(UTC)
    with closing(connect_to(catalog)) as db, closing(connect_to(catalog, as_of=now)) as then:
        before = rows(db, "1m")
        assert before
        add(gold, [1, DAYS])
        Flow(catalog).step()
        for each in (db, then):
            for _ in range(candle_copy.USES):
                source(each)
            assert "read_parquet" in source(each)
            assert rows(each, "1m") == before
    with closing(copied(catalog)) as db:
        assert len(rows(db, "1m")) > len(before)


@pytest.mark.usefixtures("gold")
@pytest.mark.parametrize("lacking", ["memory", "folder"])
def test_without_room_for_a_copy_the_table_is_read(
    catalog: Catalog, folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, lacking: str
) -> None:
    """One warning says so."""
    monkeypatch.setattr(candle_copy, "USES", 1)
    with closing(connect_to(catalog)) as db, caplog.at_level(logging.WARNING):
        expected = db.sql(f"FROM {CANDLES_TABLE} ORDER BY exchange, symbol, open_time").fetchall()
        if lacking == "memory":
            monkeypatch.setattr(candle_copy, "MEMORY_MB", 1)
        else:
            monkeypatch.setattr(tempfile, "tempdir", str(folder / "lacking"))
        assert rows(db, "1m") == expected
        assert source(db) == CANDLES_TABLE
    assert list(folder.iterdir()) == []
    (record,) = caplog.records
    assert "the newest candles cannot be copied to temporary files" in record.getMessage()


@pytest.mark.usefixtures("gold")
def test_files_that_may_have_no_day_are_not_copied(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another program may have written them: SQL's conditions on the day would not find them."""
    manifests = with_null_days(load_table(catalog, CANDLES_TABLE))
    assert candle_copy.CandleRows(lambda: manifests, lambda: connect_to(catalog)).sql() == CANDLES_TABLE
    monkeypatch.setattr(candle_copy, "USES", 1)
    assert candle_copy.CandleRows(lambda: manifests, lambda: connect_to(catalog)).sql() == CANDLES_TABLE
    assert candle_copy.CandleRows(list, lambda: connect_to(catalog)).sql() == CANDLES_TABLE


def with_null_days(table: Table) -> list[candle_copy.ManifestFile]:
    snapshot = table.current_snapshot()
    assert snapshot
    manifests = snapshot.manifests(table.io)
    partitions = manifests[0].partitions
    assert partitions
    partitions[0]._data[0] = True
    assert partitions[0].contains_null
    return manifests
