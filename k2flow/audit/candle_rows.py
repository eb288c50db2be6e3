"""The candles of some hours, computed again from Gold's trades in SQL, and compared with the rows of the table.

It shares no code with the candles flow. Trades are ordered by time, the length of the trade id, the trade id, and the
message id. A product is split into its integer and its fraction, so that both sums are exact. A sum of products of more
than 38 digits is expected to be null.
"""

from collections.abc import Sequence
from datetime import UTC, date, datetime, timedelta
from typing import Any

import pyarrow as pa

from k2flow.audit.report import AuditReport, Severity
from k2flow.inspection.row_hashes import RowHashStore
from k2flow.layers import CANDLES, CANDLES_TABLE, HOUR_US, MIN_TIME_US

NAMED = 10_000  # candles that a finding names
KEY = ("exchange", "symbol", "open_time")
VALUES = tuple(name for name in CANDLES.columns if name not in KEY)
MINUTE_US = 60_000_000
DAY_US = 24 * HOUR_US
SCHEMA = """
CREATE OR REPLACE TABLE partial (  -- candles of some trades each; times are in us since the year 1, here and below
    exchange VARCHAR, symbol VARCHAR, open_time BIGINT, high DECIMAL(18, 8), low DECIMAL(18, 8),
    volume DECIMAL(38, 8), buy_volume DECIMAL(38, 8), trades BIGINT,
    whole DECIMAL(38, 0), fraction DECIMAL(38, 16),  -- of the sum of price x quantity
    first_time BIGINT, last_time BIGINT, first_place VARCHAR, last_place VARCHAR,
    open DECIMAL(18, 8), close DECIMAL(18, 8), first_id VARCHAR, last_id VARCHAR);
CREATE OR REPLACE TABLE found (
    exchange VARCHAR, symbol VARCHAR, open_time BIGINT,
    open DECIMAL(18, 8), high DECIMAL(18, 8), low DECIMAL(18, 8), close DECIMAL(18, 8),
    volume DECIMAL(38, 8), quote_volume DECIMAL(38, 16), buy_volume DECIMAL(38, 8), trades BIGINT,
    first_trade_id VARCHAR, last_trade_id VARCHAR, first_trade_time BIGINT, last_trade_time BIGINT,
    exchange_date BIGINT, exchange_hour BIGINT);
"""
_PLACE = "lpad(time::VARCHAR, 18, '0') || lpad(length(trade_id)::VARCHAR, 10, '0') || trade_id || chr(0) || message_id"
"""The SQL of a text that puts trades in order. DuckDB compares texts much faster than structs."""
_PARTIAL = f"""
INSERT INTO partial
WITH timed AS (
    SELECT *, epoch_us(timestamp) - {MIN_TIME_US} AS time, time // {MINUTE_US} * {MINUTE_US} AS open_time,
        price::DECIMAL(38, 8) * quantity AS amount
    FROM batch
), sums AS (
    SELECT exchange, symbol, open_time, max(price) AS high, min(price) AS low, sum(quantity) AS volume,
        coalesce(sum(quantity) FILTER (side = 'BUY'), 0) AS buy_volume, count(*) AS trades,
        sum(floor(amount)) AS whole, sum(amount - floor(amount)) AS fraction,
        min(time) AS first_time, max(time) AS last_time
    FROM timed GROUP BY ALL
), ends AS (
    SELECT exchange, symbol, open_time, price, trade_id, {_PLACE} AS place
    FROM timed JOIN sums USING (exchange, symbol, open_time) WHERE time = first_time OR time = last_time
)
SELECT * FROM sums JOIN (
    SELECT exchange, symbol, open_time, min(place), max(place), arg_min(price, place), arg_max(price, place),
        arg_min(trade_id, place), arg_max(trade_id, place)
    FROM ends GROUP BY ALL
) USING (exchange, symbol, open_time)
"""
PART_ROWS = 200_000  # of `partial`, whose candles are computed at once: DuckDB does not spill texts of groups
_EXPECTED = f"""
WITH candles AS (
    SELECT exchange, symbol, open_time, arg_min(open, first_place) AS open, max(high) AS high, min(low) AS low,
        arg_max(close, last_place) AS close, sum(volume) AS volume, sum(buy_volume) AS buy_volume,
        sum(trades) AS trades, sum(whole) AS whole, sum(fraction) AS fraction,
        arg_min(first_id, first_place) AS first_trade_id, arg_max(last_id, last_place) AS last_trade_id,
        min(first_time) AS first_trade_time, max(last_time) AS last_trade_time
    FROM partial WHERE hash(exchange, symbol, open_time) % ? = ? GROUP BY ALL
)
SELECT exchange, symbol, open_time, open, high, low, close, volume,
    TRY_CAST(whole + floor(fraction) AS DECIMAL(38, 16)) + (fraction - floor(fraction)) AS quote_volume,
    buy_volume, trades, first_trade_id, last_trade_id, first_trade_time, last_trade_time,
    open_time // {DAY_US} + {MIN_TIME_US // DAY_US} AS exchange_date, open_time // {HOUR_US} % 24 AS exchange_hour
FROM candles
"""
_CHECKS = {
    "candles_missing": (
        "minutes with trades have no candle",
        "SELECT {key} FROM expected ANTI JOIN found USING ({key})",
    ),
    "candles_unexpected": (
        "candles are of minutes without trades",
        "SELECT {key} FROM found ANTI JOIN expected USING ({key})",
    ),
    "candles_duplicated": ("minutes have several candles", "SELECT {key} FROM found GROUP BY ALL HAVING count(*) > 1"),
    "candles_differ": (
        "candles have other values than Gold's trades give",
        "SELECT {key}, {pairs} FROM expected e JOIN found f USING ({key}) WHERE {differs}",
    ),
}
"""The text and the statement of each check."""
_PARTS = {
    "key": ", ".join(KEY),
    "pairs": ", ".join(f"f.{name}, e.{name}" for name in VALUES),
    "differs": " OR ".join(f"f.{name} IS DISTINCT FROM e.{name}" for name in VALUES),
}


class CandleRows:
    """Compares the candles of some hours at a time. Memory: the database's, and the findings."""

    def __init__(self, store: RowHashStore) -> None:
        """Take a database that was opened with SCHEMA."""
        self._store = store
        self._counts = dict.fromkeys(_CHECKS, 0)
        self._samples: dict[str, list[dict[str, str]]] = {check: [] for check in _CHECKS}

    def add_trades(self, trades: pa.RecordBatch) -> None:
        """Add rows of Gold."""
        self._store.select(trades, _PARTIAL)

    def add_candles(self, candles: pa.RecordBatch) -> None:
        """Add rows of the candle table."""
        kinds = {field.name: field.type for field in candles.schema}
        columns = [
            _us(n) if pa.types.is_timestamp(k) else _days(n) if pa.types.is_date(k) else n for n, k in kinds.items()
        ]
        self._store.insert("found", candles, ", ".join(columns))

    def compare(self) -> bool:
        """Compare what was added, and forget it. Return whether all candles are right."""
        parts = self._store.count("FROM partial") // PART_ROWS + 1
        for part in range(parts):
            into = "INSERT INTO expected" if part else "CREATE OR REPLACE TABLE expected AS"
            self._store.run(f"{into} {_EXPECTED}", [parts, part])
        right = True
        for check, (_, statement) in _CHECKS.items():
            rows = statement.format(**_PARTS)
            if count := self._store.count(f"FROM ({rows})"):
                right = False
                self._counts[check] += count
                limit = NAMED - len(self._samples[check])
                self._samples[check] += map(_sample, self._store.run(f"{rows} ORDER BY ALL LIMIT {limit}"))
        self._store.run(SCHEMA)
        return right

    def report(self, report: AuditReport) -> None:
        """Report the candles that are wrong. Each is named, up to NAMED of them by check."""
        for check, (text, _) in _CHECKS.items():
            if count := self._counts[check]:
                samples = self._samples[check]
                report.add(check, Severity.BROKEN, f"{count:,} {text}", count, None, CANDLES_TABLE, samples, NAMED)


def _sample(row: Sequence[Any]) -> dict[str, str]:
    """Return the key of a row, and the values that differ: of the table, and of Gold's trades."""
    found = {name: _text(name, value) for name, value in zip(KEY, row, strict=False)}
    pairs = zip(VALUES, row[len(KEY) :: 2], row[len(KEY) + 1 :: 2], strict=False)
    differing = [
        f"{name} is {_text(name, its)}, not {_text(name, wanted)}" for name, its, wanted in pairs if its != wanted
    ]
    return found | ({"differs": "; ".join(differing)} if differing else {})


def _text(name: str, value: Any) -> str:
    if value is None:
        return "null"
    if name == "exchange_date":
        return str(date(1970, 1, 1) + timedelta(value))
    if pa.types.is_timestamp(CANDLES.arrow_schema.field(name).type):
        return (datetime(1, 1, 1, tzinfo=UTC) + timedelta(microseconds=value)).isoformat()
    return str(value)


def _us(column: str) -> str:
    return f"epoch_us({column}) - {MIN_TIME_US}"


def _days(column: str) -> str:
    return f"{column} - DATE '1970-01-01'"
