"""Finds the trades that have given hashes: only to name them, after a check found something."""

from collections.abc import Sequence
from datetime import datetime
from typing import Any

from k2flow.audit.context import AuditContext
from k2flow.inspection.files import plan, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import hashable
from k2flow.layers import Layer

MAX_ROWS = 10_000


def trades_with(
    context: AuditContext, pinned: PinnedTables, layer: Layer, hash_sql: str, hashes: Sequence[int]
) -> list[dict[str, Any]]:
    """Return key, exchange and time of the rows, at most MAX_ROWS, whose `hash_sql` is one of `hashes`.

    Reads the whole table.
    """
    if not hashes:
        return []
    candidates = dict.fromkeys((*pinned.exchange.dedup_key, "exchange", layer.event_time))
    names = [name for name in candidates if name in layer.columns]
    columns, wanted = ", ".join(f'"{name}"' for name in names), ", ".join(map(str, hashes))
    sql = f"SELECT {columns} FROM batch WHERE {hash_sql} IN ({wanted}) LIMIT {MAX_ROWS}"
    found: list[dict[str, Any]] = []
    for batch in map(hashable, read(plan(pinned, layer), layer.columns, None, lambda _: None)):
        for row in context.store.select(batch, sql):
            values = (value.isoformat() if isinstance(value, datetime) else value for value in row)
            found.append(dict(zip(names, values, strict=True)))
        if len(found) >= MAX_ROWS:
            break
    return found


def present(
    context: AuditContext, pinned: PinnedTables, layer: Layer, hash_sql: str, hashes: Sequence[int]
) -> set[int]:
    """Return those of `hashes` that are the `hash_sql` of any row. Reads the whole table."""
    if not hashes:
        return set()
    wanted = ", ".join(map(str, hashes))
    sql = f"SELECT DISTINCT {hash_sql} FROM batch WHERE {hash_sql} IN ({wanted})"
    batches = map(hashable, read(plan(pinned, layer), layer.columns, None, lambda _: None))
    return {found for batch in batches for (found,) in context.store.select(batch, sql)}
