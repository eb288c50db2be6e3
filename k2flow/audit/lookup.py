"""Finds the rows of Silver or Gold that have given hashes: only once something is wrong, to name it."""

from collections.abc import Sequence
from datetime import date
from typing import Any

from k2flow.inspection.files import plan, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import Store, hashable
from k2flow.layers import SILVER

MAX_ROWS = 10_000
_COLUMNS = SILVER.columns
_ALWAYS = (date.min - date(1970, 1, 1)).days


def trades_with(
    store: Store, pinned: PinnedTables, layer: str, hash_sql: str, hashes: Sequence[int]
) -> list[dict[str, Any]]:
    """message_id, exchange and timestamp of the rows, MAX_ROWS at the most, whose `hash_sql` is one of `hashes`.

    Reads the whole table.
    """
    if not hashes:
        return []
    wanted = ", ".join(map(str, hashes))
    found: list[dict[str, Any]] = []
    for batch in map(hashable, read(plan(pinned, layer, _ALWAYS), _COLUMNS, None, lambda _: None)):
        rows = store.select(
            batch,
            f"SELECT message_id, exchange, timestamp FROM batch WHERE {hash_sql} IN ({wanted}) LIMIT {MAX_ROWS}",
        )
        found += [{"message_id": m, "exchange": x, "timestamp": t.isoformat() if t else None} for m, x, t in rows]
        if len(found) >= MAX_ROWS:
            break
    return found


def present(store: Store, pinned: PinnedTables, layer: str, hash_sql: str, hashes: Sequence[int]) -> set[int]:
    """Those of `hashes` that are the `hash_sql` of any row. Reads the whole table."""
    if not hashes:
        return set()
    wanted = ", ".join(map(str, hashes))
    sql = f"SELECT DISTINCT {hash_sql} FROM batch WHERE {hash_sql} IN ({wanted})"
    batches = map(hashable, read(plan(pinned, layer, _ALWAYS), _COLUMNS, None, lambda _: None))
    return {found for batch in batches for (found,) in store.select(batch, sql)}
