"""The table macro `candles(interval)`: candles of longer intervals, exactly from those of a minute."""

from k2flow.iceberg.catalog import NAMESPACE
from k2flow.layers import CANDLES_TABLE

MACRO = "candles"
MINUTES = {"1m": 1, "5m": 5, "15m": 15, "30m": 30, "1h": 60, "4h": 240, "1d": 1440}
"""The intervals, by name, in minutes. Each divides a day, so open times are multiples of it in UTC."""
_ROWS = "<rows>"


def candles_macro(rows: str | None) -> str:
    """Return the SQL that creates the macro. Its columns are those of the candle table.

    `rows` is SQL for the text of what to read, which DuckDB computes for each use; None: there is no candle table.
    Another interval is an error, even if no row is read: DuckDB computes the arguments of a table function first.
    """
    if rows is None:
        text = f"there is no table {NAMESPACE}.{CANDLES_TABLE}: start the flow `k2flow run candles`, and connect again"
        # With the parameter in it, the error is not raised when the macro is created.
        return f'CREATE MACRO {MACRO}("interval") AS TABLE FROM query(error(concat(\'{text}\', left("interval", 0))))'
    queries = " ".join(f"WHEN '{name}' THEN $${_query(minutes)}$$" for name, minutes in MINUTES.items())
    given, known = '"interval"::VARCHAR', ", ".join(MINUTES)
    error = f"error('{MACRO}: unknown interval ' || coalesce({given}, 'NULL') || ': known are {known}')"
    query = f"replace(CASE {given} {queries} ELSE {error} END, '{_ROWS}', {rows})"
    return f'CREATE MACRO {MACRO}("interval") AS TABLE FROM query({query})'


def _query(minutes: int) -> str:
    """Return SQL for candles of some minutes.

    DuckDB skips data files by conditions on symbol, exchange and exchange_date, and of one minute by those on open_time
    too. It cannot see through the alignment of open_time.
    """
    if minutes == 1:
        return f"SELECT * FROM {_ROWS}"
    step, hours = minutes * 60_000_000, max(1, minutes // 60)
    return f"""
        SELECT exchange, symbol, make_timestamptz(minute - (minute % {step} + {step}) % {step}) AS open_time,
            arg_min(open, minute) AS open, max(high) AS high, min(low) AS low, arg_max(close, minute) AS close,
            {_sum("volume", 8)} AS volume, {_sum("quote_volume", 16)} AS quote_volume,
            {_sum("buy_volume", 8)} AS buy_volume, sum(trades)::BIGINT AS trades,
            arg_min(first_trade_id, minute) AS first_trade_id, arg_max(last_trade_id, minute) AS last_trade_id,
            arg_min(first_trade_time, minute) AS first_trade_time, arg_max(last_trade_time, minute) AS last_trade_time,
            exchange_date, exchange_hour // {hours} * {hours} AS exchange_hour
        FROM (SELECT *, epoch_us(open_time) AS minute FROM {_ROWS}) GROUP BY 1, 2, 3, 16, 17"""


def _sum(column: str, scale: int) -> str:
    """Return SQL for an exact sum of up to 1440 decimals that are not negative.

    It is null if it, or one of them, has more than 38 digits. Only large values are split into a whole part and the
    rest, which costs more than all else.
    """
    kind, limit = f"DECIMAL(38, {scale})", 10 ** (38 - scale)
    is_large = f"{column} >= {limit // 2_000}"
    small = f"coalesce(sum(CASE WHEN NOT {is_large} THEN {column} END), 0)"
    whole = f"coalesce(sum(CASE WHEN {is_large} THEN floor({column}) END), 0)"
    rest = f"({small} + coalesce(sum(CASE WHEN {is_large} THEN {column} - floor({column}) END), 0))"
    fits = f"count({column}) = count(*) AND {whole} + floor({rest}) < {limit}"
    return f"CASE WHEN {fits} THEN {whole}::{kind} + {rest}::{kind} END"
