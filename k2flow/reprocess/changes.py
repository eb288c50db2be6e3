"""Examples of trades whose values change, value by value: for people, before anything is replaced."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.inspection.files import Advance
from k2flow.inspection.row_hashes import content_hash, hashable
from k2flow.layers import SILVER
from k2flow.reprocess.context import ReprocessContext
from k2flow.reprocess.moved import MovedMessages

SAMPLES = 10


@dataclass(frozen=True)
class TradeChange:
    """One trade with changes in some columns: `values` are (before, after) by column."""

    partition: int
    offset: int
    message_id: str
    values: dict[str, tuple[Any, Any]]


def changes(
    context: ReprocessContext, moved: MovedMessages, definition: TableDefinition, advance: Advance
) -> list[TradeChange]:
    """Return at most SAMPLES messages that were valid trades and have other values today, by offset."""
    chosen = context.store.run(
        'SELECT partition, "offset" FROM moved WHERE was IS NULL AND reason IS NULL '
        f"AND id IN (SELECT id FROM silver_removed) ORDER BY ALL LIMIT {SAMPLES}"
    )
    if not chosen:
        return []
    places = ", ".join(f"({p}, {offset})" for p, offset in chosen)
    after: dict[tuple[int, int], dict[str, Any]] = {}
    for messages in moved.messages(advance, f'(partition, "offset") IN ({places})'):
        trades = context.decoder.decode(messages).trades
        positions = zip(trades.partition.tolist(), trades.offset.tolist(), strict=True)
        after.update(zip(positions, trades.rows.to_pylist(), strict=True))
    before = _before(context, definition, places)
    found = []
    for (partition, offset), new in sorted(after.items()):
        old = before.get(_key(context, new), new)
        values = {name: (old[name], new[name]) for name in SILVER.columns if old[name] != new[name]}
        found.append(TradeChange(partition, offset, new["message_id"], values))
    return found


def _before(
    context: ReprocessContext, definition: TableDefinition, places: str
) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Return the rows of Silver that are removed for the messages at `places`, by deduplication key."""
    store = context.store
    store.run(
        "CREATE OR REPLACE TEMP TABLE shown AS SELECT DISTINCT row FROM silver_removed WHERE id IN "
        f'(SELECT id FROM moved WHERE (partition, "offset") IN ({places}))'
    )
    wanted = store.arrays("SELECT row FROM shown")["row"]
    reader = FileReader.of_table(context.pinned.tables[SILVER], definition)
    rows: dict[tuple[Any, ...], dict[str, Any]] = {}
    for (number,) in store.run("SELECT DISTINCT file FROM silver SEMI JOIN shown USING (row)"):
        for batch in reader.read(context.files.file(SILVER, number)):
            found = np.isin(store.hashes(hashable(batch), content_hash(SILVER)), wanted)
            rows |= {_key(context, row): row for row in batch.filter(pa.array(found)).to_pylist()}
    return rows


def _key(context: ReprocessContext, row: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in context.pinned.exchange.dedup_key)
