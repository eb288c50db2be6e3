"""Runs of consecutive trade ids and the holes between them, as SQL for DuckDB. Pure functions of their arguments.

A run (symbol, first, last) says that each id from `first` to `last` is there, both inclusive. Ids are integers of 63
bits. Dense ids are few runs, however many there are, and however often each is there.
"""

ALL_BITS = f"{2**64 - 1}::UBIGINT"


def numbered(code: str, rows: str) -> str:
    """Return SQL for the rows of a query with `number`, the integer of `trade_id`; null unless it is <code>-<integer>.

    An id parses only if the integer, written again, gives the same text. So signs, spaces, leading zeros and more than
    63 bits do not parse, and no two texts are one id. Nor does the id of a trade without a symbol. `code` is SQL.
    """
    return f"""
        SELECT * EXCLUDE (digits, parsed),
            CASE WHEN parsed >= 0 AND parsed::VARCHAR = digits AND symbol IS NOT NULL THEN parsed END AS number
        FROM (SELECT *, TRY_CAST(digits AS BIGINT) AS parsed FROM (
            SELECT *, CASE WHEN starts_with(trade_id, concat({code}, '-')) THEN substr(trade_id, length({code}) + 2) END
                AS digits FROM ({rows})))"""


def text_of(code: str, number: str) -> str:
    """Return SQL for the trade id of an integer."""
    return f"concat({code}, '-', {number})"


def chunk_of(number: str) -> str:
    """Return SQL for the chunk of an integer: 64 ids are one."""
    return f"{number} // 64"


def bits_of(number: str) -> str:
    """Return SQL for the aggregate that has a bit for each id of a chunk that is there."""
    return f"bit_or(1::UBIGINT << ({number} & 63)::UBIGINT)"


def runs_of(chunks: str) -> str:
    """Return SQL for runs from the rows (symbol, chunk, bits) of a table, one for each symbol and chunk.

    A run ends with its chunk at the latest.
    """
    return f"""
        SELECT symbol, 64 * chunk AS first, 64 * chunk + 63 AS last FROM {chunks} WHERE bits = {ALL_BITS}
        UNION ALL
        SELECT symbol, 64 * chunk + bit, 64 * chunk + bit FROM {chunks}, range(64) of_chunk(bit)
        WHERE bits <> {ALL_BITS} AND ((bits >> bit::UBIGINT) & 1) = 1"""


def joined(runs: str) -> str:
    """Return SQL for the fewest runs that hold the same ids as the query `runs`, whose runs may overlap."""
    return f"""
        SELECT symbol, min(first) AS first, max(last) AS last FROM (
            SELECT *, count(*) FILTER (begins) OVER (PARTITION BY symbol ORDER BY first, last ROWS UNBOUNDED PRECEDING)
                AS island
            FROM (
                SELECT *, coalesce(first - max(last) OVER earlier > 1, true) AS begins FROM ({runs})
                WINDOW earlier AS
                    (PARTITION BY symbol ORDER BY first, last ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING)))
        GROUP BY symbol, island"""


def holes(runs: str) -> str:
    """Return SQL for holes (symbol, after, before), the ids around each, from the query `runs`, which may overlap."""
    return f"""
        SELECT * FROM (
            SELECT symbol, max(last) OVER (own ROWS UNBOUNDED PRECEDING) AS after, lead(first) OVER own AS before
            FROM ({runs}) WINDOW own AS (PARTITION BY symbol ORDER BY first, last))
        WHERE before - after > 1"""


def runs_between(runs: str, bounds: str) -> str:
    """Return SQL for those runs of a table that have ids from `low` to `high` of their symbol in the table `bounds`."""
    return f"SELECT {runs}.* FROM {runs} JOIN {bounds} USING (symbol) WHERE last >= low AND first <= high"


def sums(holes: str, bounds: str) -> str:
    """Return SQL for (symbol, holes, missing ids, low, high) of each symbol in the table `bounds`, by symbol."""
    return f"""
        SELECT symbol, coalesce(holes, 0), coalesce(missing, 0), low, high FROM {bounds}
        LEFT JOIN (SELECT symbol, count(*) AS holes, sum(before - after - 1) AS missing FROM {holes} GROUP BY symbol)
            USING (symbol)
        ORDER BY symbol"""
