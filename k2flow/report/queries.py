"""Aggregates in DuckDB: Python reads a few hundred rows of each, whatever the tables hold. All raise QueryError."""

from bisect import bisect_right
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import duckdb

from k2flow.exchange import Exchange
from k2flow.layers import BRONZE, CANDLES, CANDLES_TABLE, DLQ, GOLD, GOLD_TABLE, SILVER, Layer
from k2flow.query.sql import query_errors, string_literal
from k2flow.report.axes import MILLISECOND_US, MINUTE_US, SECOND_US, Axis, axis, utc, without_outliers
from k2flow.report.figures import Candle, DeadLetterReason, MarketCandles, RowCounts

MAX_BARS, MAX_CANDLES = 120, 200
MARKETS = 3  # without requested symbols, this many of the most traded markets get candles
DETAIL_CHARACTERS = 300
OUTLIER_SHARE = 0.02
"""The share of rows at each end of a time axis that may be left out, if they are far from the others."""
ZOOM_STEPS = 1_000  # steps that a time is divided into to find where most rows are


@dataclass(frozen=True)
class ReportSource:
    """The tables of `exchanges` in DuckDB; `tables` are the names of those that exist.

    With `since_us` (us since 1970) only rows from then on are read, by the time that their table is partitioned by.
    """

    db: duckdb.DuckDBPyConnection
    exchanges: Sequence[Exchange]
    tables: Collection[str]
    since_us: int | None = None

    def fetch(self, sql: str, **values: object) -> list[tuple[Any, ...]]:
        """Return the rows of a query with these parameters."""
        with query_errors():
            return self.db.execute(sql, values).fetchall()

    def gold(self, columns: str) -> str:
        """Return SQL for columns of the exchanges' rows in Gold."""
        return f"SELECT {columns} FROM {GOLD_TABLE} WHERE {self.of_exchanges(GOLD)}"

    def of_exchanges(self, layer: Layer) -> str:
        """Return an SQL condition on the rows of a table of all exchanges: those of these, and recent."""
        codes = ", ".join(string_literal(each.code) for each in self.exchanges)
        return f"exchange IN ({codes}) AND {self.recent(layer)}"

    def recent(self, layer: Layer) -> str:
        """Return an SQL condition on the rows of a layer's table. DuckDB skips manifests and files by it."""
        if self.since_us is None:
            return "true"
        at = utc(self.since_us)
        return (
            f"{layer.date_column} >= DATE '{at:%Y-%m-%d}' AND \"{layer.event_time}\" >= TIMESTAMPTZ '{at.isoformat()}'"
        )


def rows_by_layer(source: ReportSource) -> dict[str, dict[str, int | None]]:
    """Return the rows of each exchange and layer; None for a missing table."""
    has_gold = GOLD_TABLE in source.tables
    in_gold = dict(source.fetch(f"{source.gold('exchange, count(*)')} GROUP BY ALL")) if has_gold else {}
    found: dict[str, dict[str, int | None]] = {}
    for each in source.exchanges:
        own = {BRONZE: each.bronze, SILVER: each.silver, DLQ: each.dlq}
        rows = {
            layer.name: source.fetch(f"SELECT count(*) FROM {name} WHERE {source.recent(layer)}")[0][0]
            if name in source.tables
            else None
            for layer, name in own.items()
        }
        found[each.name] = {**rows, "gold": in_gold.get(each.code, 0) if has_gold else None}
    return found


def ingested(source: ReportSource) -> RowCounts | None:
    """Count Bronze's rows by the time of ingestion; None if there are none."""
    parts = [
        f"SELECT {string_literal(each.name)} AS exchange, ingestion_timestamp AS moment FROM {each.bronze} "
        f"WHERE {source.recent(BRONZE)}"
        for each in source.exchanges
        if each.bronze in source.tables
    ]
    return _counts(source, " UNION ALL ".join(parts)) if parts else None


def traded(source: ReportSource) -> RowCounts | None:
    """Count Gold's rows by the time of the trade; None if there are none."""
    if GOLD_TABLE not in source.tables:
        return None
    names = (f"WHEN {string_literal(each.code)} THEN {string_literal(each.name)}" for each in source.exchanges)
    return _counts(source, source.gold(f'CASE exchange {" ".join(names)} END AS exchange, "timestamp" AS moment'))


def _counts(source: ReportSource, rows: str) -> RowCounts | None:
    """Count rows over time; `rows` is SQL for rows of (exchange, moment)."""
    bounds = _bounds(source, rows)
    if bounds is None:
        return None
    first, last, total = bounds
    time = axis(first, last, MAX_BARS, SECOND_US)
    counts = {each.name: [0] * time.steps for each in source.exchanges}
    sums = source.fetch(
        f"SELECT exchange, (epoch_us(moment) - $begin) // $step, count(*) FROM ({rows}) "
        "WHERE moment >= make_timestamptz($begin) AND moment < make_timestamptz($end) GROUP BY ALL",
        **_steps(time),
    )
    for name, step, count in sums:
        counts[name][step] = count
    return RowCounts(time, counts, total - sum(map(sum, counts.values())))


def _steps(time: Axis) -> dict[str, int]:
    return {"begin": time.begin_us, "step": time.step_us, "end": time.end_us}


def _bounds(source: ReportSource, rows: str, **values: object) -> tuple[int, int, int] | None:
    """Return the bounds of an axis of rows of (moment), and the number of all rows; None if there are none.

    The axis covers all rows, or most if the rest would stretch it. The search narrows in rounds; each round scans the
    column once.
    """
    sql = f"SELECT epoch_us(min(moment)), epoch_us(max(moment)), count(*) FROM ({rows})"
    first, last, total = source.fetch(sql, **values)[0]
    if not total:
        return None
    sql = (
        f"SELECT (epoch_us(moment) - $begin) // $step AS step, count(*) FROM ({rows}) "
        "WHERE moment >= make_timestamptz($first) AND moment <= make_timestamptz($last) GROUP BY step ORDER BY step"
    )
    spared, before, after = int(total * OUTLIER_SHARE), 0, 0
    while True:
        time = axis(first, last, ZOOM_STEPS)
        found = source.fetch(sql, begin=time.begin_us, step=time.step_us, first=first, last=last, **values)
        steps, counts = zip(*found, strict=True)
        low, more_before = _leading(counts, spared - before)
        high, more_after = _leading(counts[::-1], spared - after)
        early = max(first, time.begin_us + steps[low] * time.step_us)
        late = min(last, time.begin_us + (steps[-1 - high] + 1) * time.step_us - 1)
        begin, end = without_outliers(first, early, late, last)
        if (begin, end) == (first, last):
            return first, last, total
        first, last, before, after = begin, end, before + more_before, after + more_after


def _leading(counts: Sequence[int], most: int) -> tuple[int, int]:
    """Return how many of the first counts sum to at most `most`, and their sum; never all of them."""
    sums = list(accumulate(counts[:-1]))
    passed = bisect_right(sums, most)
    return passed, sums[passed - 1] if passed else 0


def reasons(source: ReportSource) -> list[DeadLetterReason]:
    """Return the dead letters of each exchange by reason, most frequent first."""
    columns = (
        "coalesce(reason, ''), count(*), coalesce(epoch_us(max(failed_at)), 0), "
        f'coalesce(left(arg_max(detail, (failed_at, "partition", "offset")), {DETAIL_CHARACTERS}), \'\')'
    )
    found = [
        DeadLetterReason(each.name, *values)
        for each in source.exchanges
        if each.dlq in source.tables
        for values in source.fetch(f"SELECT {columns} FROM {each.dlq} WHERE {source.recent(DLQ)} GROUP BY reason")
    ]
    return sorted(found, key=lambda each: (-each.rows, each.exchange, each.reason))


def markets(source: ReportSource, symbols: Sequence[str]) -> list[MarketCandles]:
    """Return candles of `symbols` at each exchange, or of the most traded markets; most traded first.

    They come from the table of one-minute candles, or from Gold while that table is missing or empty.
    """
    for layer, rows, shortest_us in ((CANDLES, _MINUTES, MINUTE_US), (GOLD, _TRADES, MILLISECOND_US)):
        if layer.table_pattern in source.tables:
            found = _markets(source, f"SELECT * FROM ({rows}) WHERE {source.of_exchanges(layer)}", symbols, shortest_us)
            if found:
                return found
    return []


_TRADES = f"""SELECT *, "timestamp" AS moment, price AS open, price AS high, price AS low, price AS close,
    quantity AS volume, 1 AS trades, ("timestamp", length(trade_id), trade_id, message_id) AS place FROM {GOLD_TABLE}"""
_MINUTES = f"SELECT *, open_time AS moment, open_time AS place FROM {CANDLES_TABLE}"
_KNOWN = " AND ".join(f"{column} IS NOT NULL" for column in ("open", "high", "low", "close", "volume", "trades"))
"""Another engine may have left values out."""


def _markets(source: ReportSource, rows: str, symbols: Sequence[str], shortest_us: int) -> list[MarketCandles]:
    """Return candles of rows that are candles themselves: of a trade, or of a minute."""
    wanted, most = (" WHERE list_contains($symbols, symbol)", "") if symbols else ("", f" LIMIT {MARKETS}")
    chosen = source.fetch(
        f"SELECT exchange, symbol FROM ({rows}){wanted} GROUP BY ALL ORDER BY sum(trades) DESC, exchange, symbol{most}",
        **({"symbols": list(symbols)} if symbols else {}),
    )
    names = {each.code: each.name for each in source.exchanges}
    found = [_market(source, rows, names[code], code, symbol, shortest_us) for code, symbol in chosen]
    return [each for each in found if each]


def _market(
    source: ReportSource, rows: str, exchange: str, code: str, symbol: str, shortest_us: int
) -> MarketCandles | None:
    own = f"SELECT * FROM ({rows}) WHERE exchange = $code AND symbol = $symbol AND {_KNOWN}"
    bounds = _bounds(source, own, code=code, symbol=symbol)
    if bounds is None:
        return None
    first, last, _ = bounds
    time = axis(first, last, MAX_CANDLES, shortest_us)
    sums = source.fetch(
        "SELECT (epoch_us(moment) - $begin) // $step, arg_min(open, place), max(high), min(low), "
        f"arg_max(close, place), sum(volume), sum(trades)::BIGINT FROM ({own}) "
        "WHERE moment >= make_timestamptz($begin) AND moment < make_timestamptz($end) GROUP BY 1 ORDER BY 1",
        **_steps(time),
        code=code,
        symbol=symbol,
    )
    total = source.fetch(f"SELECT sum(trades)::BIGINT FROM ({own})", code=code, symbol=symbol)[0][0]
    candles = {step: Candle(*values) for step, *values in sums}
    return MarketCandles(exchange, symbol, total, time, candles, total - sum(each.trades for each in candles.values()))
