"""Recorded trades of real exchanges through the flows: Gold's candles equal those of the recording, to the digit."""

import csv
from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import duckdb

from k2flow.exchange import exchange_names, find_exchange
from k2flow.query.connection import connect_to
from k2flow.sandbox.producer.replay import Target, replay
from tests.integration.harness import Lake

MINUTE_MS = 60_000
WINDOW_HOURS = 24 * 7  # longer than any market's trades in the file

Market = tuple[str, str, str]
"""Exchange code, symbol, kind of trade: a replay shifts the times of one market together."""


@dataclass(frozen=True)
class Candle:
    """One minute of one market. `minute` counts from the market's first. The trade id orders equal times."""

    minute: int
    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    count: int


CANDLES = """
SELECT exchange, symbol, vendor_data['kind'] AS kind, epoch_ms(timestamp) // 60000 AS minute,
    first(price ORDER BY timestamp, trade_id), max(price), min(price), last(price ORDER BY timestamp, trade_id),
    sum(quantity), count(*)
FROM gold_crypto_trades GROUP BY ALL ORDER BY ALL
"""


def test_candles_of_gold_are_those_of_the_recording(new_lake: Callable[..., Lake], real_trades: Path) -> None:
    """Open, high, low, close, volume and count of every minute of every market. Sent again, nothing changes."""
    markets = recorded(real_trades)
    codes = {code for code, _, _ in markets}
    lakes = {n: new_lake(n) for n in exchange_names() if find_exchange(n).code in codes}
    targets = {name: Target(find_exchange(name).code, lake.topic) for name, lake in lakes.items()}
    trades = {code: sum(c.count for m, own in markets.items() if m[0] == code for c in own) for code in codes}
    one, *_ = lakes.values()
    now = datetime.now(UTC)
    for times, end in enumerate((now - timedelta(minutes=1), now), 1):
        manifests = replay(real_trades, targets, {"bootstrap.servers": one.bootstrap}, end=end)
        assert {m.exchange: m.gold for m in manifests.values()} == trades
        for name, lake in lakes.items():
            prefix = f"K2FLOW_{name.upper()}_"
            lake.catch_up(**{f"{prefix}BATCH_ROWS": "2000", f"{prefix}DEDUP_WINDOW_HOURS": str(WINDOW_HOURS)})
        connection = connect_to(one.catalog())
        assert in_gold(connection) == markets
        for name, lake in lakes.items():
            rows = {
                layer: count(connection, f"{layer}_{lake.exchange}_trades") for layer in ("bronze", "silver", "dlq")
            }
            assert rows == {"bronze": times * manifests[name].sent, "silver": times * manifests[name].sent, "dlq": 0}


def recorded(path: Path) -> dict[Market, list[Candle]]:
    """Return the candles of each market, from the file alone, of the exchanges that have a flow."""
    trades: dict[Market, dict[str, tuple[int, str, Decimal, Decimal]]] = defaultdict(dict)
    names = exchange_names()
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["exchange"] in names:
                code = find_exchange(row["exchange"]).code
                trade = (int(row["time_ms"]), row["trade_id"], Decimal(row["price"]), Decimal(row["quantity"]))
                trades[code, row["symbol"], row["kind"]][row["trade_id"]] = trade
    return {market: candles(own) for market, own in trades.items()}


def candles(trades: Mapping[str, tuple[int, str, Decimal, Decimal]]) -> list[Candle]:
    minutes: dict[int, list[tuple[int, str, Decimal, Decimal]]] = defaultdict(list)
    for trade in sorted(trades.values()):
        minutes[trade[0] // MINUTE_MS].append(trade)
    first = min(minutes)
    made = []
    for minute, own in sorted(minutes.items()):
        prices = [price for _, _, price, _ in own]
        volume = sum((quantity for *_, quantity in own), Decimal(0))
        made.append(Candle(minute - first, prices[0], max(prices), min(prices), prices[-1], volume, len(own)))
    return made


def in_gold(connection: duckdb.DuckDBPyConnection) -> dict[Market, list[Candle]]:
    """Return the same from Gold, by SQL."""
    found: dict[Market, list[Candle]] = defaultdict(list)
    first: dict[Market, int] = {}
    for exchange, symbol, kind, minute, *values in connection.sql(CANDLES).fetchall():
        market = (exchange, symbol, kind)
        start = first.setdefault(market, minute)
        found[market].append(Candle(minute - start, *values))
    return dict(found)


def count(connection: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(connection.sql(f"SELECT count(*) FROM {table}").fetchall()[0][0])
