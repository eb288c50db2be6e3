"""What a connection reads, the S3 access that it gives DuckDB, and its macro for candles of any interval."""

import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, localcontext
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog

from k2flow.cli import query
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.manifests import data_manifests
from k2flow.layers import CANDLES, CANDLES_TABLE, GOLD_TABLE
from k2flow.query.candles import MINUTES, candles_macro
from k2flow.query.connection import connect_to, s3_secret
from tests.gold import Gold

KEYS = {"s3.access-key-id": "me", "s3.secret-access-key": "it's"}


@pytest.fixture(autouse=True)
def no_aws(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("ACCESS_KEY_ID", "SECRET_ACCESS_KEY", "SESSION_TOKEN", "REGION", "DEFAULT_REGION"):
        monkeypatch.delenv(f"AWS_{name}", raising=False)


@pytest.mark.parametrize(
    ("properties", "options"),
    [
        ({}, ""),
        (KEYS, ", KEY_ID 'me', SECRET 'it''s'"),
        (
            {**KEYS, "s3.session-token": "t", "s3.region": "r"},
            ", KEY_ID 'me', SECRET 'it''s', SESSION_TOKEN 't', REGION 'r'",
        ),
        ({"client.access-key-id": "c", "client.region": "r"}, ", KEY_ID 'c', REGION 'r'"),
        ({"s3.endpoint": "http://h:9/"}, ", ENDPOINT 'h:9', USE_SSL 'false', URL_STYLE 'path'"),
        ({"s3.endpoint": "https://h"}, ", ENDPOINT 'h', USE_SSL 'true', URL_STYLE 'path'"),
        (
            {"s3.endpoint": "h:9", "s3.force-virtual-addressing": "True"},
            ", ENDPOINT 'h:9', USE_SSL 'true', URL_STYLE 'vhost'",
        ),
    ],
)
def test_secret(properties: Mapping[str, str], options: str) -> None:
    assert s3_secret("t", "s3://b/t", properties) == f"CREATE SECRET \"t\" (TYPE 's3', SCOPE 's3://b/t'{options})"


def test_keys_that_the_catalog_lacks_come_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys of two sources are never mixed."""
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "env")
    monkeypatch.setenv("AWS_SESSION_TOKEN", "token")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "there")
    assert "KEY_ID 'env', SESSION_TOKEN 'token', REGION 'there'" in s3_secret("t", "s3://b", {})
    assert s3_secret("t", "s3://b", KEYS).endswith("KEY_ID 'me', SECRET 'it''s', REGION 'there')")


SUMS = {"volume": Decimal(10) ** 30, "quote_volume": Decimal(10) ** 22, "buy_volume": Decimal(10) ** 30}
"""The columns that are sums, and what is too large for each."""
DAYS = (datetime(1, 1, 1, tzinfo=UTC), datetime(1969, 12, 31, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC))
Row = dict[str, Any]


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    """Compute with more digits than the 28 of Python's default."""
    with localcontext(prec=60):
        yield


def minutes(chosen: random.Random, day: datetime, exchange: str, count: int) -> list[Row]:
    """Return candles of `count` random minutes of a day, some with sums near the limits of their types."""
    rows = []
    for minute in sorted(chosen.sample(range(1440), count)):
        at = day + timedelta(minutes=minute)
        prices = sorted(Decimal(chosen.randrange(1, 10**18)).scaleb(-8) for _ in range(4))
        sums: Row = {name: Decimal(chosen.randrange(1, 10**20)).scaleb(-8) for name in SUMS}
        if chosen.random() < 0.02:
            sums["quote_volume"] = chosen.choice([None, SUMS["quote_volume"] - Decimal("1E-16")])
        rows.append(
            {
                "exchange": exchange, "symbol": chosen.choice(["A", "B"]), "open_time": at,
                "open": chosen.choice(prices), "high": prices[3], "low": prices[0], "close": chosen.choice(prices),
                **sums, "trades": chosen.randrange(1, 2**40),
                "first_trade_id": f"X-{minute}", "last_trade_id": f"X-{minute + 1}",
                "first_trade_time": at + timedelta(seconds=1), "last_trade_time": at + timedelta(seconds=59),
                "exchange_date": day.date(), "exchange_hour": at.hour,
            }
        )  # fmt: skip
    return rows


def longer(rows: Sequence[Row], minutes: int) -> list[Row]:
    """Return the candles of some minutes from those of one, in exact arithmetic."""
    groups: dict[tuple[str, str, datetime], list[Row]] = defaultdict(list)
    for row in rows:
        at = row["open_time"]
        begin = datetime.combine(at.date(), at.time().min, UTC)
        step = (at.hour * 60 + at.minute) // minutes * minutes
        groups[row["exchange"], row["symbol"], begin + timedelta(minutes=step)].append(row)
    found = []
    for (exchange, symbol, open_time), some in groups.items():
        some.sort(key=lambda row: row["open_time"])
        sums: Row = {}
        for name, limit in SUMS.items():
            values = [row[name] for row in some]
            total = None if None in values else sum(values)
            sums[name] = None if total is None or total >= limit else total
        found.append(
            {
                "exchange": exchange, "symbol": symbol, "open_time": open_time,
                **{name: some[0][name] for name in ("open", "first_trade_id", "first_trade_time")},
                **{name: some[-1][name] for name in ("close", "last_trade_id", "last_trade_time")},
                "high": max(row["high"] for row in some), "low": min(row["low"] for row in some), **sums,
                "trades": sum(row["trades"] for row in some),
                "exchange_date": open_time.date(), "exchange_hour": open_time.hour,
            }
        )  # fmt: skip
    return found


def by_key(rows: Sequence[Row]) -> list[tuple[Any, ...]]:
    return sorted((tuple(row[name] for name in CANDLES.columns) for row in rows), key=lambda values: values[:3])


def with_candles(rows: Sequence[Row]) -> duckdb.DuckDBPyConnection:
    """Return a connection with these candles and the macro."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'Asia/Kolkata'")  # half an hour off: candles are aligned to UTC anyway
    table = pa.Table.from_pylist(list(rows), schema=CANDLES.arrow_schema)
    db.register("given", table)
    db.execute(f"CREATE TABLE {CANDLES_TABLE} AS FROM given")
    db.execute(candles_macro(f"'{CANDLES_TABLE}'"))
    return db


@pytest.mark.parametrize("interval", MINUTES)
def test_longer_candles_equal_exact_arithmetic(interval: str) -> None:
    chosen = random.Random(interval)
    rows = [row for day in DAYS for name in ("X", "Y") for row in minutes(chosen, day, name, 100)]
    found = with_candles(rows).sql(f"FROM candles('{interval}')").to_arrow_table()
    assert found.schema.names == list(CANDLES.columns)
    assert [str(t) for t in found.schema.types] == [
        str(pa.timestamp("us", "Asia/Kolkata")) if pa.types.is_timestamp(t) else str(t)
        for t in CANDLES.arrow_schema.types
    ]
    expected = longer(rows, MINUTES[interval]) if interval != "1m" else rows
    assert by_key(found.cast(CANDLES.arrow_schema).to_pylist()) == by_key(expected)
    assert any(row["quote_volume"] is None for row in expected)


def test_sum_that_is_too_large_is_null_and_the_largest_is_not() -> None:
    chosen = random.Random(1)
    one, two, three = minutes(chosen, DAYS[1], "X", 3)
    most, least = SUMS["quote_volume"], Decimal("1E-16")
    for values, total in (
        ((most - 2 * least, least, None), most - least),
        ((most - least, least, None), None),
        ((most - least, most - least, most - least), None),  # more than DuckDB's integers of 128 bits hold
    ):
        same = {"symbol": "A", "open_time": DAYS[1]}
        rows = [
            {**row, **same, "open_time": DAYS[1] + timedelta(minutes=i), "exchange_hour": 0, "quote_volume": value}
            for i, (row, value) in enumerate(zip((one, two, three), values, strict=True))
            if value is not None
        ]
        found = with_candles(rows).sql("SELECT quote_volume FROM candles('1d')").fetchall()
        assert found == [(total,)]


@pytest.mark.parametrize("interval", ["'2h'", "'1H'", "''", "NULL", "60"])
def test_unknown_interval_is_an_error_with_the_known_ones(interval: str) -> None:
    db = with_candles([])
    with pytest.raises(duckdb.Error, match=r"candles: unknown interval .*: known are 1m, 5m, 15m, 30m, 1h, 4h, 1d$"):
        db.sql(f"SELECT count(*) FROM candles({interval})").fetchall()


def test_without_the_table_the_macro_says_so() -> None:
    db = duckdb.connect()
    db.execute(candles_macro(None))
    with pytest.raises(duckdb.Error, match=f"there is no table market_data.{CANDLES_TABLE}: start the flow"):
        db.sql("SELECT count(*) FROM candles('1h')").fetchall()


def test_conditions_reach_the_scan() -> None:
    """DuckDB skips data files by them."""
    chosen = random.Random(2)
    db = with_candles([row for day in DAYS for name in ("X", "Y") for row in minutes(chosen, day, name, 9)])
    for interval, condition in (
        ("1h", "symbol = 'A'"),
        ("1d", "exchange = 'X'"),
        ("4h", "exchange_date >= DATE '1969-12-31'"),
        ("1m", "open_time >= TIMESTAMPTZ '1969-12-31 12:00:00Z'"),
    ):
        plan = db.sql(f"EXPLAIN FROM candles('{interval}') WHERE {condition}").fetchall()[0][1]
        scan = plan[plan.index("SEQ_SCAN") :]
        assert condition.split()[0] in scan[scan.index("Filters") :], plan
        assert "FILTER" not in plan, plan


def test_connection_opens_without_the_manifests(catalog: Catalog) -> None:
    """DuckDB 1.5 ends the process if it reads a manifest that is missing."""
    gold = Gold(catalog)
    gold.add("binance", np.array([490_000, 490_001]))
    (manifest,) = data_manifests(load_table(catalog, GOLD_TABLE))
    path = Path(manifest.manifest_path.removeprefix("file://"))
    away = path.rename(path.with_suffix(".away"))
    connection, rows = connect_to(catalog), f"SELECT count(*) FROM {GOLD_TABLE}"
    away.rename(path)
    gold.add("binance", np.array([490_000]))
    assert connection.execute(rows).fetchall() == [(2,)]
    assert connect_to(catalog).execute(rows).fetchall() == [(3,)]


def test_shown_query_reads_each_manifest_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    Gold(catalog).add("binance", np.array([490_000]))
    (manifest,) = data_manifests(load_table(catalog, GOLD_TABLE))
    connection = connect_to(catalog)
    monkeypatch.setattr(query, "connect", lambda as_of: connection)
    connection.execute("SET enable_external_file_cache = false; CALL enable_logging('FileSystem', level = 'TRACE')")
    query.run_query(f"FROM {GOLD_TABLE}", "table", None)
    connection.execute("CALL disable_logging()")
    opened = f"""SELECT count(*) FROM duckdb_logs()
        WHERE contains(message, '{Path(manifest.manifest_path).name}') AND contains(message, 'OPEN')"""
    assert connection.execute(opened).fetchall() == [(1,)]
