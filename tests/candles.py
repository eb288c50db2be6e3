"""Candles of trades by plain Python: the oracle of the candle table."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from datetime import datetime
from decimal import Context, Decimal
from typing import Any

import pyarrow as pa
from pyiceberg.table import Table

from k2flow.layers import CANDLES, HOUR_US

EXACT = Context(prec=200)
Key = tuple[str, str, datetime]
LIMIT = Decimal(10) ** 22


def candles_of_rows(trades: Iterable[Mapping[str, Any]]) -> dict[Key, dict[str, Any]]:
    """Return the candle of each exchange, symbol and minute, by the columns of the table."""
    minutes: dict[Key, list[Mapping[str, Any]]] = defaultdict(list)
    for row in trades:
        minute = row["timestamp"].replace(second=0, microsecond=0)
        minutes[row["exchange"], row["symbol"], minute].append(row)
    return {key: _candle(key, rows) for key, rows in minutes.items()}


def _candle(key: Key, rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    rows = sorted(rows, key=lambda row: (row["timestamp"], len(row["trade_id"]), row["trade_id"], row["message_id"]))
    first, last = rows[0], rows[-1]
    prices = [row["price"] for row in rows]
    exchange, symbol, minute = key
    quote = _sum(EXACT.multiply(row["price"], row["quantity"]) for row in rows)
    return {
        "exchange": exchange,
        "symbol": symbol,
        "open_time": minute,
        "open": first["price"],
        "high": max(prices),
        "low": min(prices),
        "close": last["price"],
        "volume": _sum(row["quantity"] for row in rows),
        "quote_volume": quote if quote < LIMIT else None,
        "buy_volume": _sum(row["quantity"] for row in rows if row["side"] == "BUY"),
        "trades": len(rows),
        "first_trade_id": first["trade_id"],
        "last_trade_id": last["trade_id"],
        "first_trade_time": first["timestamp"],
        "last_trade_time": last["timestamp"],
        "exchange_date": minute.date(),
        "exchange_hour": minute.hour,
    }


def _sum(values: Iterable[Decimal]) -> Decimal:
    total = Decimal(0)
    for value in values:
        total = EXACT.add(total, value)
    return total


def rows_by_key(rows: Iterable[Mapping[str, Any]]) -> dict[Key, Mapping[str, Any]]:
    """Return candles by their key. Raises AssertionError for two rows of one key."""
    found: dict[Key, Mapping[str, Any]] = {}
    for row in rows:
        key = row["exchange"], row["symbol"], row["open_time"]
        assert key not in found, f"two rows of {key}"
        found[key] = row
    return found


def assert_candles_of(candles: Table, gold: Table) -> None:
    """Assert that the candle table, read by PyIceberg, has exactly the candles of Gold's rows."""
    expected = candles_of_rows(gold.scan().to_arrow().to_pylist())
    assert rows_by_key(candles.scan().to_arrow().to_pylist()) == expected


def one_candle(hour: int, **columns: Any) -> pa.RecordBatch:
    """Return one candle of an hour (since 1970), whose values are null but for `columns`."""
    known = {
        "open_time": pa.array([hour * HOUR_US]).cast(pa.timestamp("us", "UTC")),
        "exchange_date": pa.array([hour // 24], pa.int32()).cast(pa.date32()),
        "exchange_hour": pa.array([hour % 24], pa.int32()),
    }
    known |= {name: pa.array([value], CANDLES.arrow_schema.field(name).type) for name, value in columns.items()}
    found = [known.get(field.name, pa.nulls(1, field.type)) for field in CANDLES.arrow_schema]
    return pa.RecordBatch.from_arrays(found, schema=CANDLES.arrow_schema)
