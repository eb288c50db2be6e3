"""Aggregates for a report, in DuckDB: Python reads a few hundred rows of each answer, whatever the tables hold.

`tables` are the names of the existing tables. All functions raise QueryError.
"""

from bisect import bisect_right
from collections.abc import Collection, Mapping, Sequence
from itertools import accumulate
from types import MappingProxyType
from typing import Any

import duckdb

from k2flow.exchange import Exchange
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import query_errors
from k2flow.report.axes import SECOND_US, axis, without_outliers
from k2flow.report.figures import Candle, Delays, Freshness, Market, ReasonCount, RowCounts
from k2flow.report.freshness import Commit, commits_table

MEMORY_MB, THREADS = 512, 4
"""DuckDB's limits; it spills what exceeds its memory to disk."""
MAX_BARS, MAX_POINTS, MAX_CANDLES = 120, 120, 200
MARKETS = 3
"""Without requested symbols, this many of the most traded markets get candles."""
DETAIL_CHARACTERS = 300
OFFSET_CELLS = 10_000
"""The offsets of all commits are divided into about this many cells. The commit of a message is found by its cell: an
equality join, which needs little memory and time."""
DELAY_DIGITS = 3
"""Delays are rounded up to this many digits, so that any number of messages has few distinct delays."""
OUTLIER_SHARE = 0.02
"""The share of rows at each end of a time axis that may be left out because they are far from the others."""
ZOOM_STEPS = 1_000
"""Steps that a time is divided into to find where most rows are."""


def bound_memory(db: duckdb.DuckDBPyConnection, folder: str) -> None:
    """Bound the memory of a connection; `folder` takes what DuckDB spills."""
    with query_errors():
        db.execute(f"SET memory_limit = '{MEMORY_MB}MB'")
        db.execute(f"SET threads = {THREADS}")
        db.execute("SET preserve_insertion_order = false")
        db.execute(f"SET temp_directory = {_literal(folder)}")


def rows_by_layer(
    db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str]
) -> dict[str, dict[str, int | None]]:
    """Return the rows of each exchange and layer; None for a missing table."""
    in_gold = (
        dict(_fetch(db, f"SELECT exchange, count(*) FROM {GOLD_TABLE} GROUP BY ALL")) if GOLD_TABLE in tables else {}
    )
    found: dict[str, dict[str, int | None]] = {}
    for each in exchanges:
        own = {"bronze": each.bronze, "silver": each.silver, "dlq": each.dlq}
        rows = {
            layer: _fetch(db, f"SELECT count(*) FROM {name}")[0][0] if name in tables else None
            for layer, name in own.items()
        }
        found[each.name] = {**rows, "gold": in_gold.get(each.code, 0) if GOLD_TABLE in tables else None}
    return found


def ingested(db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str]) -> RowCounts | None:
    """Count Bronze's rows by the time of ingestion; None if there are none."""
    parts = [
        f"SELECT {_literal(each.name)} AS exchange, ingestion_timestamp AS moment FROM {each.bronze}"
        for each in exchanges
        if each.bronze in tables
    ]
    return _counts(db, " UNION ALL ".join(parts), exchanges) if parts else None


def traded(db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str]) -> RowCounts | None:
    """Count Gold's rows by the time of the trade; None if there are none."""
    if GOLD_TABLE not in tables:
        return None
    names = " ".join(f"WHEN {_literal(each.code)} THEN {_literal(each.name)}" for each in exchanges)
    columns = f'CASE exchange {names} END AS exchange, "timestamp" AS moment'
    sql = f"SELECT {columns} FROM {GOLD_TABLE} WHERE {_of_exchanges(exchanges)}"
    return _counts(db, sql, exchanges)


def _counts(db: duckdb.DuckDBPyConnection, rows: str, exchanges: Sequence[Exchange]) -> RowCounts | None:
    """Count rows over time; `rows` is SQL for rows of (exchange, moment)."""
    bounds = _bounds(db, rows)
    if bounds is None:
        return None
    first, last, total = bounds
    time = axis(first, last, MAX_BARS, SECOND_US)
    counts = {each.name: [0] * time.steps for each in exchanges}
    sums = _fetch(
        db,
        f"SELECT exchange, (epoch_us(moment) - $begin) // $step, count(*) FROM ({rows}) "
        "WHERE moment >= make_timestamptz($begin) AND moment < make_timestamptz($end) GROUP BY ALL",
        {"begin": time.begin_us, "step": time.step_us, "end": time.end_us},
    )
    for name, step, count in sums:
        counts[name][step] = count
    return RowCounts(time, counts, total - sum(map(sum, counts.values())))


def _bounds(
    db: duckdb.DuckDBPyConnection, rows: str, values: Mapping[str, Any] = MappingProxyType({})
) -> tuple[int, int, int] | None:
    """Return the bounds of an axis of rows of (moment), and the number of all rows; None if there are none.

    The axis covers all rows, or most if the rest would stretch it. The search narrows in rounds; each round
    scans the column once.
    """
    sql = f"SELECT epoch_us(min(moment)), epoch_us(max(moment)), count(*) FROM ({rows})"
    first, last, total = _fetch(db, sql, values)[0]
    if not total:
        return None
    spared, before, after = int(total * OUTLIER_SHARE), 0, 0
    while True:
        time = axis(first, last, ZOOM_STEPS)
        steps, counts = zip(
            *_fetch(
                db,
                f"SELECT (epoch_us(moment) - $begin) // $step AS step, count(*) FROM ({rows}) "
                "WHERE moment >= make_timestamptz($first) AND moment <= make_timestamptz($last) "
                "GROUP BY step ORDER BY step",
                {**values, "begin": time.begin_us, "step": time.step_us, "first": first, "last": last},
            ),
            strict=True,
        )
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


def freshness(
    db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str], commits: Sequence[Commit]
) -> Freshness | None:
    """Return the delays of messages until `commits`; None without a known commit of a message that has a time.

    The longest delay is exact; median and p99 are rounded up to DELAY_DIGITS digits.
    """
    present = [each for each in exchanges if each.bronze in tables and any(c.exchange == each.name for c in commits)]
    if not present:
        return None
    oldest = {each.name: min(c.first for c in commits if c.exchange == each.name) for each in present}
    messages = " UNION ALL ".join(
        f'SELECT {_literal(each.name)} AS exchange, "partition", "offset", epoch_ms(kafka_timestamp) AS sent_ms, '
        f"epoch_us(ingestion_timestamp) AS taken_us FROM {each.bronze} "
        f'WHERE "offset" >= {oldest[each.name]} AND kafka_timestamp IS NOT NULL'
        for each in present
    )
    held = sum(each.next - each.first for each in commits)
    times = [each.committed_us for each in commits]
    time = axis(min(times), max(times), MAX_POINTS, SECOND_US)
    with query_errors():
        db.register("commits", commits_table(commits))
    sums = _fetch(
        db,
        f"""
        WITH messages AS ({messages}),
        cells AS (SELECT *, unnest(range(first // $cell, (next - 1) // $cell + 1)) AS cell FROM commits),
        delays AS (
            SELECT c.exchange, c.layer, (c.committed_us - $begin) // $step AS step,
                   greatest(0, c.committed_us // 1000 - m.sent_ms) AS ms
            FROM messages m JOIN cells c
            ON m.exchange = c.exchange AND m."partition" = c."partition" AND m."offset" // $cell = c.cell
            WHERE m."offset" >= c.first AND m."offset" < c.next AND m.taken_us >= c.since_us),
        digits AS (
            SELECT *, pow(10, greatest(0, floor(log10(greatest(ms, 1))) + 1 - {DELAY_DIGITS})) AS unit FROM delays),
        spread AS (
            SELECT exchange, layer, step, (ceil(ms / unit) * unit)::BIGINT AS delay, count(*) AS n, max(ms) AS most
            FROM digits GROUP BY GROUPING SETS ((exchange, layer, step, delay), (exchange, layer, delay))),
        ranked AS (
            SELECT *, sum(n) OVER (PARTITION BY exchange, layer, step ORDER BY delay) AS so_far,
                   sum(n) OVER (PARTITION BY exchange, layer, step) AS whole
            FROM spread)
        SELECT exchange, layer, step, sum(n)::BIGINT, min(delay) FILTER (so_far * 2 >= whole),
               min(delay) FILTER (so_far * 100 >= whole * 99), max(most)
        FROM ranked GROUP BY exchange, layer, step""",
        {"cell": 1 + held // OFFSET_CELLS, "begin": time.begin_us, "step": time.step_us},
    )
    total: dict[tuple[str, str], Delays] = {}
    steps: dict[tuple[str, str], dict[int, Delays]] = {}
    for exchange, layer, step, *delays in sums:
        if step is None:
            total[exchange, layer] = Delays(*delays)
        else:
            steps.setdefault((exchange, layer), {})[step] = Delays(*delays)
    return Freshness(time, total, steps) if total else None


def reasons(db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str]) -> list[ReasonCount]:
    """Return the dead letters of each exchange by reason, most frequent first."""
    found = []
    for each in exchanges:
        if each.dlq in tables:
            sums = _fetch(
                db,
                "SELECT coalesce(reason, ''), count(*), coalesce(epoch_us(max(failed_at)), 0), "
                f'coalesce(left(arg_max(detail, (failed_at, "partition", "offset")), {DETAIL_CHARACTERS}), \'\') '
                f"FROM {each.dlq} GROUP BY reason",
            )
            found += [ReasonCount(each.name, *values) for values in sums]
    return sorted(found, key=lambda each: (-each.rows, each.exchange, each.reason))


def markets(
    db: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange], tables: Collection[str], symbols: Sequence[str]
) -> list[Market]:
    """Return candles of `symbols` at each exchange, or of the most traded markets; most traded first."""
    if GOLD_TABLE not in tables:
        return []
    names = {each.code: each.name for each in exchanges}
    which, most = (" AND list_contains($symbols, symbol)", "") if symbols else ("", f" LIMIT {MARKETS}")
    chosen = _fetch(
        db,
        f"SELECT exchange, symbol FROM {GOLD_TABLE} WHERE {_of_exchanges(exchanges)}{which} "
        f"GROUP BY ALL ORDER BY count(*) DESC, exchange, symbol{most}",
        {"symbols": list(symbols)} if symbols else {},
    )
    found = [_market(db, names[code], code, symbol) for code, symbol in chosen]
    return [each for each in found if each]


def _market(db: duckdb.DuckDBPyConnection, exchange: str, code: str, symbol: str) -> Market | None:
    rows = f"FROM {GOLD_TABLE} WHERE exchange = $code AND symbol = $symbol"
    which = {"code": code, "symbol": symbol}
    bounds = _bounds(db, f'SELECT "timestamp" AS moment {rows}', which)
    if bounds is None:
        return None
    first, last, total = bounds
    time = axis(first, last, MAX_CANDLES)
    sums = _fetch(
        db,
        f'SELECT (epoch_us("timestamp") - $begin) // $step, arg_min(price, ("timestamp", trade_id)), max(price), '
        f'min(price), arg_max(price, ("timestamp", trade_id)), sum(quantity), count(*) {rows} '
        'AND "timestamp" >= make_timestamptz($begin) AND "timestamp" < make_timestamptz($end) GROUP BY 1 ORDER BY 1',
        {"begin": time.begin_us, "step": time.step_us, "end": time.end_us, **which},
    )
    candles = {step: Candle(*values) for step, *values in sums}
    return Market(exchange, symbol, total, time, candles, total - sum(each.trades for each in candles.values()))


def _fetch(
    db: duckdb.DuckDBPyConnection, sql: str, values: Mapping[str, Any] = MappingProxyType({})
) -> list[tuple[Any, ...]]:
    with query_errors():
        return db.execute(sql, dict(values)).fetchall()


def _of_exchanges(exchanges: Sequence[Exchange]) -> str:
    return f"exchange IN ({', '.join(_literal(each.code) for each in exchanges)})"


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"
