"""The rows that the moved messages remove from data files, and the trades that they add to Gold.

A row of Gold is removed if Silver keeps no row with its values, and one is added for each key that then has none.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.manifest import DataFile

from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.inspection.files import Advance, ReadPlan, plan
from k2flow.inspection.row_hashes import content_hash, hashable
from k2flow.layers import DLQ, GOLD, SILVER, Layer
from k2flow.reprocess.context import ReprocessContext
from k2flow.reprocess.revalidation import MovedMessages

SAMPLES = 10  # the most examples of trades whose values change


@dataclass(frozen=True)
class TradeChange:
    """One trade with changes in some columns: `values` are (before, after) by column."""

    partition: int
    offset: int
    message_id: str
    values: dict[str, tuple[Any, Any]]


@dataclass
class TableReplacement:
    """The changes of one table: files removed (by path) and added, and the numbers of rows."""

    removed: list[str] = field(default_factory=list)
    added: list[DataFile] = field(default_factory=list)
    rows_removed: int = 0
    rows_added: int = 0


class RowReplacements:
    """Reads tables `removed` and `gold_added` of the database."""

    def __init__(self, context: ReprocessContext) -> None:
        self._store = context.store

    def sizes(self) -> dict[Layer, TableReplacement]:
        """Return how many rows are removed and added in each layer."""
        removed = dict(self._store.run("SELECT layer, sum(n)::BIGINT FROM removed GROUP BY 1"))
        added = {
            DLQ: self._store.count("FROM moved WHERE reason IS NOT NULL"),
            SILVER: self._store.count("FROM moved WHERE reason IS NULL"),
            GOLD: self._store.count("FROM gold_added"),
        }
        return {
            layer: TableReplacement(rows_removed=removed.get(layer.name, 0), rows_added=n) for layer, n in added.items()
        }

    def files_of(self, layer: Layer) -> list[int]:
        """Return the numbers of the files of a table from which rows are removed."""
        sql = "SELECT DISTINCT file FROM removed WHERE layer = ? ORDER BY 1"
        return self._store.column(sql, [layer.name])

    def removed(self, layer: Layer, file: int) -> Mapping[str, npt.NDArray[np.uint64]]:
        """Return the rows removed from one file: `row` (hashes, ascending), how many of each (`n`), and `present`."""
        return self._store.arrays(
            "SELECT row, n, present FROM removed WHERE layer = ? AND file = ? ORDER BY row", [layer.name, file]
        )

    def added_to_gold(self) -> npt.NDArray[np.uint64]:
        """Return the hashes of the rows of Silver that are added to Gold, ascending."""
        return self._store.arrays("SELECT row FROM gold_added ORDER BY row")["row"]

    def silver_files_added_to_gold(self) -> list[int]:
        """Return the numbers of the files of Silver that have those rows."""
        return sorted(
            set(self._store.column("SELECT min(file) FROM silver SEMI JOIN gold_added USING (row) GROUP BY row"))
        )


def find_replacements(context: ReprocessContext, newest_hour: int | None, advance: Advance) -> RowReplacements:
    """Find the rows that the moved messages remove and add, after `revalidate`. Raises AuditError, CatalogError.

    `newest_hour` (since 1970) is the newest in which Gold has a row of the exchange: the hot window ends with it.
    """
    context.store.run(
        f"INSERT INTO removed SELECT '{DLQ.name}', file, l.row, count(*), count(*) FROM letter l JOIN moved "
        'USING (partition, "offset") WHERE was IS NOT NULL GROUP BY ALL'
    )
    context.store.run(
        f"INSERT INTO removed SELECT '{SILVER.name}', file, row, count(*) FILTER (k <= n), count(*) FROM ("
        "SELECT file, row, n, row_number() OVER (PARTITION BY row ORDER BY file) AS k "
        "FROM silver JOIN silver_removed USING (row)) GROUP BY file, row HAVING count(*) FILTER (k <= n) > 0"
    )
    _find_affected(context)
    _read_gold(context, newest_hour, advance)
    _find_in_gold(context)
    return RowReplacements(context)


def _find_affected(context: ReprocessContext) -> None:
    context.store.run(
        "CREATE OR REPLACE TEMP TABLE affected AS "
        "SELECT key FROM moved WHERE reason IS NULL UNION SELECT key FROM silver_removed"
    )
    context.store.run(
        'CREATE OR REPLACE TEMP TABLE silver_after AS SELECT key, row, min("offset") AS "offset" FROM ('
        'SELECT key, row, 1 AS n, NULL AS "offset" FROM silver SEMI JOIN affected USING (key) UNION ALL '
        'SELECT key, row, 1, "offset" FROM moved WHERE reason IS NULL UNION ALL '
        "SELECT key, row, -n, NULL FROM silver_removed) GROUP BY key, row HAVING sum(n) > 0"
    )


def _read_gold(context: ReprocessContext, newest_hour: int | None, advance: Advance) -> None:
    key, code = context.key, context.pinned.exchange.code
    for number, batch in context.files.read(_gold_plan(context, newest_hour), GOLD.columns, advance):
        own = batch.filter(pc.equal(batch.column("exchange"), code))
        if own.num_rows:
            columns = f"{key}, {content_hash(GOLD)}, {number}"
            context.store.insert("gold", hashable(own), columns, f"{key} IN (SELECT key FROM affected)")


def _gold_plan(context: ReprocessContext, newest_hour: int | None) -> ReadPlan:
    """Plan the files of Gold of the affected trades' days, and of the hot window."""
    sql = "SELECT day FROM moved WHERE reason IS NULL UNION SELECT day FROM silver SEMI JOIN affected USING (key)"
    days = set(context.store.column(sql))
    if days and newest_hour is not None:
        window = context.pinned.exchange.settings.dedup_window_hours
        days.update(range((newest_hour - window) // 24, newest_hour // 24 + 1))
    whole = plan(context.pinned, GOLD)
    return replace(whole, tasks=[task for task in whole.tasks if task.file.partition[0] in days])


def _find_in_gold(context: ReprocessContext) -> None:
    context.store.run(
        "CREATE OR REPLACE TEMP TABLE vanished AS SELECT DISTINCT row FROM silver_removed "
        "ANTI JOIN silver_after USING (row)"
    )
    context.store.run(
        f"INSERT INTO removed SELECT '{GOLD.name}', file, row, count(*), count(*) FROM gold "
        "SEMI JOIN vanished USING (row) GROUP BY ALL"
    )
    context.store.run(
        'INSERT INTO gold_added SELECT key, arg_min(row, coalesce("offset", -1)) FROM silver_after ANTI JOIN '
        "(SELECT DISTINCT key FROM gold ANTI JOIN vanished USING (row)) USING (key) GROUP BY key"
    )


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
        old = before.get(new["message_id"], new)
        values = {name: (old[name], new[name]) for name in SILVER.columns if old[name] != new[name]}
        found.append(TradeChange(partition, offset, new["message_id"], values))
    return found


def _before(context: ReprocessContext, definition: TableDefinition, places: str) -> dict[str, dict[str, Any]]:
    """Return the rows of Silver that are removed for the messages at `places`, by message id."""
    store = context.store
    store.run(
        "CREATE OR REPLACE TEMP TABLE shown AS SELECT DISTINCT row FROM silver_removed WHERE id IN "
        f'(SELECT id FROM moved WHERE (partition, "offset") IN ({places}))'
    )
    wanted = store.arrays("SELECT row FROM shown")["row"]
    reader = FileReader.of_table(context.pinned.tables[SILVER], definition)
    rows: dict[str, dict[str, Any]] = {}
    for number in store.column("SELECT DISTINCT file FROM silver SEMI JOIN shown USING (row)"):
        for batch in reader.read(context.files.file(SILVER, number)):
            found = np.isin(store.hashes(hashable(batch), content_hash(SILVER)), wanted)
            rows |= {row["message_id"]: row for row in batch.filter(pa.array(found)).to_pylist()}
    return rows
