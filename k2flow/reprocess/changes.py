"""Some of the trades whose values change, value by value: for people, before anything is done."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import ROW_HASH, hashable
from k2flow.layers import SILVER
from k2flow.reprocess.difference import Difference
from k2flow.reprocess.scope import Advance, Scope
from k2flow.trades.decode import TradeDecoder

SAMPLES = 10
_COLUMNS = list(SILVER.columns)


@dataclass(frozen=True)
class Change:
    """One trade of which some columns change: `values` are (before, after) by column."""

    partition: int
    offset: int
    message_id: str
    values: dict[str, tuple[Any, Any]]


def changes(
    difference: Difference,
    scope: Scope,
    pinned: PinnedTables,
    definition: TableDefinition,
    decoder: TradeDecoder,
    advance: Advance,
) -> list[Change]:
    """At most SAMPLES of the messages that were valid trades and are others today, in the order of their offsets."""
    chosen = difference.store.run(
        'SELECT partition, "offset" FROM moved WHERE was IS NULL AND reason IS NULL '
        f"AND id IN (SELECT id FROM removal) ORDER BY ALL LIMIT {SAMPLES}"
    )
    if not chosen:
        return []
    places = ", ".join(f"({p}, {offset})" for p, offset in chosen)
    after: dict[tuple[int, int], dict[str, Any]] = {}
    for messages in difference.moving(scope, advance, f'(partition, "offset") IN ({places})'):
        trades = decoder.decode(messages).trades
        keys = zip(trades.partition.tolist(), trades.offset.tolist(), strict=True)
        after.update(zip(keys, trades.rows.to_pylist(), strict=True))
    before = _before(difference, pinned, definition, places)
    found = []
    for (partition, offset), new in sorted(after.items()):
        old = before.get(new["message_id"], new)
        values = {name: (old[name], new[name]) for name in _COLUMNS if old[name] != new[name]}
        found.append(Change(partition, offset, new["message_id"], values))
    return found


def _before(
    difference: Difference, pinned: PinnedTables, definition: TableDefinition, places: str
) -> dict[str, dict[str, Any]]:
    """Rows of Silver that go, by message id, for the messages at `places`."""
    store = difference.store
    store.run(
        "CREATE OR REPLACE TEMP TABLE shown AS SELECT DISTINCT row FROM removal WHERE id IN "
        f'(SELECT id FROM moved WHERE (partition, "offset") IN ({places}))'
    )
    wanted = store.arrays("SELECT row FROM shown")["row"]
    reader = FileReader.of_table(pinned.tables["silver"], definition)
    rows: dict[str, dict[str, Any]] = {}
    for (number,) in store.run("SELECT DISTINCT file FROM silver SEMI JOIN shown USING (row)"):
        for batch in reader.read(difference.plans["silver"].tasks[number].file):
            found = np.isin(store.hashes(hashable(batch), ROW_HASH), wanted)
            rows |= {row["message_id"]: row for row in batch.filter(pa.array(found)).to_pylist()}
    return rows
