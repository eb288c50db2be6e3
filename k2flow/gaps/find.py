"""Finds the holes in the trade ids of one exchange in Gold."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb

from k2flow.errors import QueryError, SettingsError
from k2flow.exchange import Exchange
from k2flow.gaps.runs import bits_of, chunk_of, holes, numbered, runs_between, runs_of, sums, text_of
from k2flow.layers import GOLD_TABLE, HOUR_US, MAX_TIME_US, MIN_TIME_US
from k2flow.query.sql import query_errors, string_literal

MARGIN_US = HOUR_US
"""A trade this far outside of a range still fills a hole in it: ids are not always in the order of time."""
FETCH_ROWS = 10_000
TIMED_HOLES = 1_000_000  # whose times are looked up at once, in memory
EXAMPLES = 3
_UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class TradeRange:
    """The trades of `symbols`, or of all if it is empty, from `since_us` on and before `until_us`.

    Times are us since 1970; None: no limit.
    """

    symbols: Sequence[str] = ()
    since_us: int | None = None
    until_us: int | None = None

    def inside(self) -> str:
        """Return an SQL condition on Gold's rows: the times of this range."""
        return _times(self.since_us, self.until_us)

    def nearby(self) -> str:
        """Return an SQL condition on Gold's rows: the symbols of this range, its times and MARGIN_US more."""
        since = None if self.since_us is None else max(MIN_TIME_US, self.since_us - MARGIN_US)
        until = None if self.until_us is None else min(MAX_TIME_US, self.until_us + MARGIN_US)
        days = [
            f"exchange_date {compared} DATE '{_utc(us).date()}'"
            for us, compared in ((since, ">="), (until, "<="))
            if us is not None
        ]
        listed = ", ".join(map(string_literal, self.symbols))
        return " AND ".join([_times(since, until), *days, *([f"symbol IN ({listed})"] if listed else [])])


@dataclass(frozen=True, kw_only=True)
class Gap:
    """A hole: the missing ids from `first` to `last`, and the times (us since 1970) of the trades on both sides."""

    symbol: str
    first: int
    last: int
    after_us: int | None
    before_us: int | None

    @property
    def missing(self) -> int:
        """The number of missing ids."""
        return self.last - self.first + 1


@dataclass(frozen=True)
class SymbolGaps:
    """The holes of a symbol, how many ids they miss, and the symbol's smallest and largest id."""

    holes: int
    missing: int
    first: int
    last: int

    @property
    def share(self) -> float:
        """The missing ids as a share of all from the smallest to the largest."""
        return self.missing / (self.last - self.first + 1)


@dataclass(frozen=True)
class FoundGaps:
    """The holes of each symbol, by name. `unparsed` trades have ids that are no <code>-<integer>, as in `examples`."""

    symbols: Mapping[str, SymbolGaps]
    unparsed: int
    examples: Sequence[str | None]
    _db: duckdb.DuckDBPyConnection

    @property
    def holes(self) -> int:
        """The number of holes of all symbols."""
        return sum(each.holes for each in self.symbols.values())

    def gaps(self, largest: int | None = None) -> Iterator[Gap]:
        """Yield each hole, by symbol and id, FETCH_ROWS at a time; or only the N `largest` ones, largest first.

        The connection must still be open, and its next `find_gaps` forgets them. Raises QueryError.
        """
        order = "symbol, after" if largest is None else f"before - after DESC, symbol, after LIMIT {largest}"
        sql = f"SELECT symbol, after + 1, before - 1, after_us, before_us FROM timed_holes ORDER BY {order}"
        with query_errors():
            rows = self._db.execute(sql)
            while some := rows.fetchmany(FETCH_ROWS):
                for symbol, first, last, after_us, before_us in some:
                    yield Gap(symbol=symbol, first=first, last=last, after_us=after_us, before_us=before_us)


def check_dense(exchange: Exchange) -> None:
    """Raise SettingsError unless the exchange numbers the trades of each symbol without holes."""
    if not exchange.dense_trade_ids:
        raise SettingsError(
            f"exchange {exchange.name} does not declare dense_trade_ids: if its ids are {exchange.code}-<integer>, and "
            f"consecutive for each symbol, set Exchange(dense_trade_ids=True) in flows/{exchange.name}.py"
        )


def find_gaps(db: duckdb.DuckDBPyConnection, exchange: Exchange, wanted: TradeRange) -> FoundGaps:
    """Find the holes of an exchange by a connection's view of Gold, with temporary tables of that connection.

    A hole lies between the smallest and the largest id of a symbol in the range. An id that a trade up to MARGIN_US
    outside of the range has is not missing. Gold is read once, and again if there are holes, for the times of the
    trades around them. Raises SettingsError if the exchange's ids are not dense. Raises QueryError, also if Gold has no
    trade of one of the wanted symbols.
    """
    check_dense(exchange)
    with query_errors():
        _make_chunks(db, exchange, wanted)
        seen = {symbol for (symbol,) in db.execute("SELECT DISTINCT symbol FROM chunks WHERE trades > 0").fetchall()}
        if absent := sorted(set(wanted.symbols) - seen):
            raise QueryError(
                f"{GOLD_TABLE} has no trade of {', '.join(absent)} of {exchange.name}, or none in this time: "
                "check the symbol and the time"
            )
        ((unparsed,),) = db.execute("SELECT coalesce(sum(trades), 0) FROM chunks WHERE chunk IS NULL").fetchall()
        _make_holes(db)
        _add_times(db, exchange, wanted)
        symbols = {name: SymbolGaps(*values) for name, *values in db.execute(sums("holes", "bounds")).fetchall()}
    return FoundGaps(symbols, unparsed, _examples(db, exchange, wanted) if unparsed else [], db)


def iso(us: int | None) -> str | None:
    """Return us since 1970 as ISO 8601 in UTC; None for an unknown time, and outside of the years 1 to 9999."""
    return _utc(us).isoformat() if us is not None and MIN_TIME_US <= us <= MAX_TIME_US else None


def _utc(us: int) -> datetime:
    return _UNIX_EPOCH + timedelta(microseconds=us)


def _times(since_us: int | None, until_us: int | None) -> str:
    limits = ((since_us, ">="), (until_us, "<"))
    return " AND ".join(
        ["true", *(f"\"timestamp\" {compared} TIMESTAMPTZ '{iso(us)}'" for us, compared in limits if us is not None)]
    )


def _trades(exchange: Exchange, wanted: TradeRange) -> str:
    """Return SQL for the trades nearby, with their number and whether they are inside of the range."""
    code = string_literal(exchange.code)
    rows = f"FROM {GOLD_TABLE} WHERE exchange = {code} AND {wanted.nearby()}"
    return numbered(code, f"SELECT symbol, trade_id, {wanted.inside()} AS inside {rows}")


def _make_chunks(db: duckdb.DuckDBPyConnection, exchange: Exchange, wanted: TradeRange) -> None:
    """Make the table `chunks` of the ids nearby. The chunk null has those that do not parse."""
    db.execute(
        f"""
        CREATE OR REPLACE TEMP TABLE chunks AS
        SELECT symbol, {chunk_of("number")} AS chunk, {bits_of("number")} AS bits,
            min(number) FILTER (inside) AS low, max(number) FILTER (inside) AS high, count(*) FILTER (inside) AS trades
        FROM ({_trades(exchange, wanted)}) GROUP BY symbol, chunk"""
    )


def _make_holes(db: duckdb.DuckDBPyConnection) -> None:
    """Replace the table `chunks` by `bounds`, the smallest and largest ids in the range, and the `holes` between them.

    One table at a time, so that what exceeds the memory is spilled.
    """
    db.execute(
        "CREATE OR REPLACE TEMP TABLE bounds AS "
        "SELECT symbol, min(low) AS low, max(high) AS high FROM chunks GROUP BY symbol HAVING min(low) IS NOT NULL"
    )
    db.execute(f"CREATE OR REPLACE TEMP TABLE runs AS {runs_of('chunks')}")
    db.execute("DROP TABLE chunks")
    db.execute(f"CREATE OR REPLACE TEMP TABLE holes AS {holes(runs_between('runs', 'bounds'))}")
    db.execute("DROP TABLE runs")


def _add_times(db: duckdb.DuckDBPyConnection, exchange: Exchange, wanted: TradeRange) -> None:
    """Make the table `timed_holes` from `holes`: with the times on both sides, of copies of a trade the earliest.

    Gold is read once for each TIMED_HOLES holes.
    """
    code = string_literal(exchange.code)
    sides = " UNION ".join(f"SELECT symbol, {side} AS number FROM part" for side in ("after", "before"))
    db.execute(
        "CREATE OR REPLACE TEMP TABLE timed_holes"
        "(symbol VARCHAR, after BIGINT, before BIGINT, after_us BIGINT, before_us BIGINT)"
    )
    ((count,),) = db.execute("SELECT count(*) FROM holes").fetchall()
    for first in range(0, count, TIMED_HOLES):
        db.execute(
            f"""
            INSERT INTO timed_holes
            WITH part AS MATERIALIZED (FROM holes WHERE rowid >= {first} AND rowid < {first + TIMED_HOLES}),
            times AS MATERIALIZED (
                SELECT symbol, number, epoch_us(min("timestamp")) AS us FROM {GOLD_TABLE}
                JOIN (SELECT *, {text_of(code, "number")} AS trade_id FROM ({sides})) USING (symbol, trade_id)
                WHERE exchange = {code} AND {wanted.nearby()} GROUP BY symbol, number)
            SELECT part.*, a.us, b.us FROM part
            LEFT JOIN times a ON a.symbol = part.symbol AND a.number = after
            LEFT JOIN times b ON b.symbol = part.symbol AND b.number = before"""
        )


def _examples(db: duckdb.DuckDBPyConnection, exchange: Exchange, wanted: TradeRange) -> list[str | None]:
    sql = f"SELECT trade_id FROM ({_trades(exchange, wanted)}) WHERE inside AND number IS NULL LIMIT {EXAMPLES}"
    with query_errors():
        return [trade_id for (trade_id,) in db.execute(sql).fetchall()]
