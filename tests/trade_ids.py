"""Trades with ids in a table of DuckDB's memory, as Gold has them, and their holes by an oracle of sets and loops."""

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import NamedTuple

import duckdb
import pyarrow as pa

from k2flow.exchange import Exchange, find_exchange
from k2flow.layers import GOLD_TABLE

BINANCE = find_exchange("binance")
HOUR = 3_600_000_000
NOW = 1_764_000_000_000_000


class Trade(NamedTuple):
    symbol: str | None
    trade_id: str | None
    at: int | None = NOW
    exchange: str = "BINANCE"


def in_memory(trades: Sequence[Trade], db: duckdb.DuckDBPyConnection | None = None) -> duckdb.DuckDBPyConnection:
    """Return a connection, a new one or `db`, whose Gold has these trades, in this order."""
    if db is None:
        db = duckdb.connect()
        db.execute("SET TimeZone = 'UTC'; SET threads = 1")
    times = pa.array([trade.at for trade in trades], pa.int64()).cast(pa.timestamp("us", "UTC"))
    rows = pa.table(
        {
            "exchange": pa.array([trade.exchange for trade in trades], pa.string()),
            "symbol": pa.array([trade.symbol for trade in trades], pa.string()),
            "trade_id": pa.array([trade.trade_id for trade in trades], pa.string()),
            "timestamp": times,
            "exchange_date": times.cast(pa.date32()),
        }
    )
    db.register("rows", rows)
    db.execute(f"CREATE OR REPLACE TABLE {GOLD_TABLE} AS FROM rows")
    return db


class Hole(NamedTuple):
    symbol: str
    first: int
    last: int
    after: int | None
    before: int | None


class Expected(NamedTuple):
    holes: list[Hole]
    bounds: dict[str, tuple[int, int]]
    unparsed: int


def number(trade: Trade) -> int | None:
    """Return the integer of an id: decimal digits without a leading zero, of at most 63 bits."""
    found = re.fullmatch(rf"{trade.exchange}-(0|[1-9][0-9]*)", trade.trade_id or "")
    value = int(found[1]) if found and trade.symbol is not None else None
    return None if value is None or value >= 1 << 63 else value


def expect(
    trades: Sequence[Trade],
    since: int | None = None,
    until: int | None = None,
    margin: int = HOUR,
    symbols: Sequence[str] = (),
    exchange: Exchange = BINANCE,
) -> Expected:
    """Return the holes of an exchange in a range of times: walk from id to id, and look each missing one up."""

    def within(trade: Trade, more: int) -> bool:
        if since is None and until is None:
            return True
        at = trade.at
        return at is not None and (since is None or at >= since - more) and (until is None or at < until + more)

    own = [each for each in trades if each.exchange == exchange.code and (not symbols or each.symbol in symbols)]
    seen: dict[str, set[int]] = defaultdict(set)
    times: dict[tuple[str, int], list[int]] = defaultdict(list)
    known: dict[str, set[int]] = defaultdict(set)
    for trade in own:
        value = number(trade)
        if value is None or trade.symbol is None:
            continue
        if within(trade, margin):
            known[trade.symbol].add(value)
            if trade.at is not None:
                times[trade.symbol, value].append(trade.at)
        if within(trade, 0):
            seen[trade.symbol].add(value)
    bounds = {symbol: (min(ids), max(ids)) for symbol, ids in sorted(seen.items())}
    found = []
    for symbol, (low, high) in bounds.items():
        ids = sorted(each for each in known[symbol] if low <= each <= high)
        for a, b in pairwise(ids):
            if b > a + 1:
                edges = (min(times[symbol, each], default=None) for each in (a, b))
                found.append(Hole(symbol, a + 1, b - 1, *edges))
    unparsed = sum(number(each) is None and within(each, 0) for each in own)
    return Expected(found, bounds, unparsed)
