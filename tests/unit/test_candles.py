"""The candles flow on Gold that is hard to take: extreme values, damaged rows, other programs."""

import logging
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog

from k2flow.audit import AuditReport
from k2flow.audit.candles import audit_candles
from k2flow.errors import DataFileError, HeadMovedError
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.changes import files_of
from k2flow.iceberg.manifests import data_manifests
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import CANDLES_TABLE, GOLD, GOLD_TABLE, MAX_TIME_US, MIN_TIME_US
from k2flow.maintain.storage import path_of
from k2flow.query.connection import connect_to
from tests.candles import EXACT, assert_candles_of
from tests.deletes import delete_equal
from tests.gold import Gold
from tests.property.test_candles import Flow

NOON = int(datetime(2026, 1, 1, 12, tzinfo=UTC).timestamp()) * 1_000_000
MOST = Decimal(10**18 - 1).scaleb(-8)
ONE = Decimal(1)


def add(gold: Gold, *trades: dict[str, Any]) -> None:
    """Commit trades of Binance, which have a price and quantity of 1 at noon if nothing else is given."""
    rows = [
        {"us": NOON, "trade_id": "1", "symbol": "BTC", "price": ONE, "quantity": ONE, "side": "BUY", **trade}
        for trade in trades
    ]
    columns = {
        name: pa.array([row[name] for row in rows], GOLD.arrow_schema.field(name).type)
        for name in rows[0].keys() - {"us"}
    }
    us = np.array([row["us"] for row in rows])
    gold.add("binance", us // 3_600_000_000, timestamp=pa.array(us).cast(pa.timestamp("us", "UTC")), **columns)


@pytest.fixture
def gold(catalog: Catalog) -> Gold:
    return Gold(catalog)


def assert_exact(catalog: Catalog) -> None:
    """Assert that the candles are those of Gold, by the oracle and by the audit."""
    assert_candles_of(load_table(catalog, CANDLES_TABLE), load_table(catalog, GOLD_TABLE))
    report = AuditReport("now")
    audit_candles(catalog, report, lambda *_: None)
    assert report.findings == []


def candle_rows(catalog: Catalog) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load_table(catalog, CANDLES_TABLE).scan().to_arrow().to_pylist()
    return found


def test_order_of_ids_that_are_no_numbers(catalog: Catalog, gold: Gold) -> None:
    """By length, then by text; equal ids by message id. A symbol with one trade has a candle."""
    ids = ["B-9", "B-10", "", "ä", "zz", "B-10", "\U0001f4b6"]
    add(gold, *({"trade_id": each, "price": Decimal(i + 1)} for i, each in enumerate(ids)), {"symbol": "ALONE"})
    Flow(catalog).step()
    assert_exact(catalog)
    (row,) = (row for row in candle_rows(catalog) if row["symbol"] == "BTC")
    assert (row["first_trade_id"], row["open"], row["last_trade_id"], row["close"]) == ("", 3, "B-10", 6)


def test_first_and_last_minute_that_gold_can_hold(catalog: Catalog, gold: Gold) -> None:
    times = [MIN_TIME_US, MIN_TIME_US + 59_999_999, -60_000_001, -1, 0, MAX_TIME_US - 59_999_999, MAX_TIME_US]
    add(gold, *({"us": us, "price": Decimal(i + 1)} for i, us in enumerate(times)))
    flow = Flow(catalog)
    flow.step()
    assert [row["trades"] for row in sorted(candle_rows(catalog), key=lambda row: row["open_time"])] == [2, 1, 1, 1, 2]
    assert_exact(catalog)
    add(gold, {"us": MIN_TIME_US + 30_000_000}, {"us": MAX_TIME_US - 30_000_000})
    flow.step()
    assert_exact(catalog)


def test_sum_beyond_its_type_is_null_and_stops_nothing(
    catalog: Catalog, gold: Gold, caplog: pytest.LogCaptureFixture
) -> None:
    """A hundred trades of the greatest price and quantity fit. The next one does not, in the same commit or later."""
    most = {"price": MOST, "quantity": MOST}
    add(
        gold,
        *({"symbol": symbol, **most} for symbol in ("FITS", "LATER") for _ in range(100)),
        *([most] * 101),
        {"symbol": "ETH"},
    )
    flow = Flow(catalog)
    flow.step()
    full = EXACT.multiply(100, EXACT.multiply(MOST, MOST))
    assert {r["symbol"]: r["quote_volume"] for r in candle_rows(catalog)} == {
        "FITS": full,
        "LATER": full,
        "BTC": None,
        "ETH": 1,
    }
    assert_exact(catalog)
    for _ in range(2):
        caplog.clear()
        add(gold, {"symbol": "LATER", **most}, {"symbol": "ETH"})
        with caplog.at_level(logging.ERROR):
            flow.step()
        assert "BINANCE LATER, minute 2026-01-01T12:00:00+00:00: the sum of price x quantity has more" in caplog.text
    assert {r["symbol"]: r["trades"] for r in candle_rows(catalog)} == {"FITS": 100, "LATER": 102, "BTC": 101, "ETH": 3}
    assert_exact(catalog)
    hours = dict(connect_to(catalog).sql("SELECT symbol, quote_volume FROM candles('1h')").fetchall())
    assert hours == {"FITS": full, "LATER": None, "BTC": None, "ETH": 3}


def test_damaged_gold_stops_the_flow_with_the_file(catalog: Catalog, gold: Gold) -> None:
    """No candle is made of a trade without a value, and none changes."""
    add(gold, {})
    flow = Flow(catalog)
    flow.step()
    before = candle_rows(catalog)
    add(gold, {"price": None})
    with pytest.raises(DataFileError, match=r"\.parquet has a trade without price: run k2flow audit"):
        flow.step()
    assert candle_rows(catalog) == before


def test_delete_files_of_another_engine_stop_the_flow(catalog: Catalog, gold: Gold) -> None:
    """The error says what to do. After that engine has rewritten the file, the candles follow."""
    add(gold, {}, {"symbol": "ETH"})
    flow = Flow(catalog)
    flow.step()
    table = load_table(catalog, GOLD_TABLE)
    delete_equal(table, "symbol", ["BTC"], next(iter(table.scan().plan_files())).file)
    with pytest.raises(DataFileError, match=r"CALL system\.rewrite_data_files"):
        flow.step()
    replace_file(catalog, gold, "ETH")
    flow.step()
    assert [row["symbol"] for row in candle_rows(catalog)] == ["ETH"]


def replace_file(catalog: Catalog, gold: Gold, kept: str) -> None:
    """Replace Gold's one data file by one with some of its rows, as an engine does that applies its deletes."""
    table = load_table(catalog, GOLD_TABLE)
    ((file,),) = files_of(table).values()
    rows = (
        pq.read_table(path_of(file.file_path), partitioning=None)
        .filter(pc.field("symbol") == kept)
        .cast(GOLD.arrow_schema)
    )
    (new,) = DataFileWriter(table, gold.definition).write(rows.combine_chunks().to_batches()[0])
    with table.transaction() as transaction, transaction.update_snapshot().overwrite() as snapshot:
        snapshot.delete_data_file(file)
        snapshot.append_data_file(new)


def test_hours_in_several_groups(catalog: Catalog, gold: Gold, monkeypatch: pytest.MonkeyPatch) -> None:
    """Late trades of many hours; in one of them the order is unclear until the trades are read again."""
    monkeypatch.setattr("k2flow.candles.updating.GROUP_HOURS", 2)
    monkeypatch.setattr("k2flow.candles.gold.JOINED_ROWS", 3)
    hours = [NOON + hour * 3_600_000_000 for hour in range(5)]
    add(gold, *({"us": us, "symbol": symbol, "message_id": "b"} for us in hours for symbol in ("BTC", "ETH")))
    flow = Flow(catalog)
    flow.step()
    flow = Flow(catalog)  # the message ids are forgotten
    add(
        gold,
        *({"us": us, "price": Decimal(2), "message_id": "a"} for us in hours[:3]),
        {"us": hours[4] + 1, "message_id": "c"},
    )
    flow.step()
    assert_exact(catalog)


def test_a_commit_to_a_long_table_writes_few_entries_again(
    catalog: Catalog, gold: Gold, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = 6
    monkeypatch.setattr("k2flow.iceberg.commit.COMMIT_ENTRIES", most)
    hours = [NOON + hour * 3_600_000_000 for hour in range(4 * most)]
    add(gold, *({"us": us} for us in hours))
    flow = Flow(catalog)
    flow.step()
    add(gold, {"us": hours[-1]})
    flow.step()
    before = {manifest.manifest_path for manifest in data_manifests(load_table(catalog, CANDLES_TABLE))}
    for late in range(3):
        add(gold, {"us": hours[-1]}, {"us": hours[late]})
        flow.step()
    found = data_manifests(load_table(catalog, CANDLES_TABLE))
    assert sum(manifest.existing_files_count or 0 for manifest in found) == len(hours) - 2
    assert max(manifest.existing_files_count or 0 for manifest in found) <= most
    unchanged = [manifest for manifest in found if manifest.manifest_path in before]
    assert sum(manifest.existing_files_count or 0 for manifest in unchanged) >= 2 * most
    assert_exact(catalog)


def test_manifests_have_statistics_of_the_columns_that_queries_prune_by(catalog: Catalog, gold: Gold) -> None:
    add(gold, {}, {"symbol": "ETH", "us": NOON + 60_000_000})
    Flow(catalog).step()
    table = load_table(catalog, CANDLES_TABLE)
    (manifest,) = data_manifests(table)
    (entry,) = manifest.fetch_manifest_entry(table.io)
    file = entry.data_file
    for statistics in (file.lower_bounds, file.upper_bounds, file.value_counts, file.column_sizes):
        assert [table.schema().find_column_name(column) for column in statistics] == ["exchange", "symbol", "open_time"]
    (low, high) = (int.from_bytes(bounds[3], "little") for bounds in (file.lower_bounds, file.upper_bounds))
    assert (low, high) == (NOON, NOON + 60_000_000)


def test_candles_that_another_program_changed_are_computed_again(catalog: Catalog, gold: Gold) -> None:
    """A running flow ends at its next commit. A start repairs the table, even if Gold has nothing new."""
    add(gold, {}, {"symbol": "ETH"}, {"us": NOON + 3_600_000_000})
    flow = Flow(catalog)
    flow.step()
    load_table(catalog, CANDLES_TABLE).delete("symbol = 'ETH'")
    add(gold, {"symbol": "ETH"})
    with pytest.raises(HeadMovedError, match="another program has changed its rows: start again, to compute all"):
        flow.step()
    Flow(catalog).step()
    assert_exact(catalog)
    table = load_table(catalog, CANDLES_TABLE)
    table.append(table.scan(row_filter="symbol = 'ETH'").to_arrow())
    Flow(catalog).step()
    assert_exact(catalog)
