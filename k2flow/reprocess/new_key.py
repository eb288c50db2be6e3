"""Gold under another deduplication key: the rows of one exchange, deduplicated again.

Of the rows of Gold with one key, the first by hour stays, and each later one that is a deduplication window or more
after the last that stays. For each key of Silver that Gold does not have, one row of Silver is added. What the former
key dropped from Gold, and Silver no longer keeps, does not come back.

Delivery guarantee: exactly once, as reprocessing. The commit that publishes the rows sets the key too.
"""

from dataclasses import dataclass

import pyarrow.compute as pc
from pyiceberg.catalog import Catalog

from k2flow.config.settings import Settings
from k2flow.errors import FencedError
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.dedup_key import key_problem, key_properties, recorded_key
from k2flow.iceberg.staging import Staging, publish
from k2flow.iceberg.tables import definitions
from k2flow.inspection.files import Advance, Progress, plan
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import HOUR, content_hash, hashable, open_row_hashes
from k2flow.layers import BRONZE, GOLD, GOLD_TABLE, SILVER
from k2flow.reprocess.context import ReprocessContext, pin_tables
from k2flow.reprocess.replacements import RowReplacements, TableReplacement
from k2flow.reprocess.rewriting import Rewriter
from k2flow.trades.stored_schemas import StoredSchemas

SCHEMA = """
CREATE TABLE silver (key UBIGINT, row UBIGINT, hour INTEGER, file INTEGER);
CREATE TABLE gold (key UBIGINT, row UBIGINT, hour INTEGER, file INTEGER);
CREATE TABLE removed (layer VARCHAR, file INTEGER, row UBIGINT, n BIGINT, present BIGINT);  -- n of those in a file
CREATE TABLE gold_added (key UBIGINT, row UBIGINT);  -- rows of Silver that are added to Gold
"""


@dataclass(frozen=True)
class NewKey:
    """The change of one exchange's rows in Gold. `published`: whether it is in the table."""

    exchange: str
    before: tuple[str, ...]
    after: tuple[str, ...]
    rows_removed: int
    rows_added: int
    published: bool


def set_new_key(
    catalog: Catalog,
    settings: Settings,
    exchange: Exchange,
    dry_run: bool = False,
    progress: Progress = lambda name, more, total: None,
) -> NewKey:
    """Replace the rows of `exchange` in Gold by those of the key that it declares; nothing if they have this key.

    The flow must be stopped, unless it is a dry run. Raises what `reprocess` raises: after CommitError, the next call
    or start of the flow publishes a committed replacement.
    """
    if not dry_run:
        publish(catalog, exchange)
    gold = load_table(catalog, GOLD_TABLE).properties
    before = recorded_key(gold, exchange.name) or exchange.dedup_key
    if key_problem(gold, exchange) is None:
        return NewKey(exchange.name, before, exchange.dedup_key, 0, 0, published=False)
    change = _NewKey(catalog, settings, exchange, progress)
    found = change.planned() if dry_run else change.published(f"deduplication key {' and '.join(exchange.dedup_key)}")
    return NewKey(exchange.name, before, exchange.dedup_key, found.rows_removed, found.rows_added, not dry_run)


class _NewKey:
    def __init__(self, catalog: Catalog, settings: Settings, exchange: Exchange, progress: Progress) -> None:
        self._catalog = catalog
        self._settings = settings
        self._exchange = exchange
        self._progress = progress

    def planned(self) -> TableReplacement:
        """Return how many rows would be removed and added."""
        return self._replacement(pin_tables(self._catalog, self._exchange, same_offsets=False), write=False)

    def published(self, what: str) -> TableReplacement:
        """Replace the rows, described by `what`."""
        staging = Staging(self._catalog, self._exchange, [GOLD_TABLE], new_key=True)
        try:
            staging.begin()
            found = self._replacement(pin_tables(self._catalog, self._exchange, same_offsets=True), write=True)
            reach(Point.REWRITTEN)
            staging.stage(GOLD_TABLE, found.removed, found.added)
        except BaseException:  # a signal, too: while there are branches, no maintenance runs
            staging.abort()
            raise
        try:
            key = key_properties(self._exchange, GOLD_TABLE)
            staging.commit_replacement({}, what, published={GOLD_TABLE: key})
        except FencedError:  # after any other error it may have been committed
            staging.abort()
            raise
        publish(self._catalog, self._exchange)
        return found

    def _replacement(self, pinned: PinnedTables, write: bool) -> TableReplacement:
        with open_row_hashes(SCHEMA) as store:
            schemas = StoredSchemas(self._settings, pinned.tables[BRONZE].properties, self._exchange.name)
            context = ReprocessContext(store=store, pinned=pinned, schemas=schemas)
            _read(context, self._progress)
            _find_removed(context)
            absent = "silver ANTI JOIN gold USING (key)"
            store.run(f"INSERT INTO gold_added SELECT key, arg_min(row, hour) FROM {absent} GROUP BY key")
            (removed,) = store.one("SELECT coalesce(sum(n), 0)::BIGINT FROM removed")
            found = TableReplacement(rows_removed=removed, rows_added=store.count("FROM gold_added"))
            if write:
                rewriter = Rewriter(context, RowReplacements(context), definitions(self._exchange), lambda _: None)
                found.added += rewriter.write_gold()
                rewriter.rewrite(GOLD, written := TableReplacement())
                found.removed, found.added = written.removed, [*found.added, *written.added]
            return found


def _read(context: ReprocessContext, progress: Progress) -> None:
    """Fill `silver` and `gold` with the rows of the exchange."""
    code = context.pinned.exchange.code
    for layer in (SILVER, GOLD):
        whole = plan(context.pinned, layer)
        progress(layer.name, 0, whole.rows)
        for number, batch in context.files.read(whole, layer.columns, _advance(progress, layer.name, whole.rows)):
            own = batch.filter(pc.equal(batch.column("exchange"), code))
            if own.num_rows:
                columns = f"{context.key}, {content_hash(layer)}, {HOUR}, {number}"
                context.store.insert(layer.name, hashable(own), columns)


def _advance(progress: Progress, name: str, total: int) -> Advance:
    return lambda rows: progress(name, rows, total)


def _find_removed(context: ReprocessContext) -> None:
    """Find the rows of Gold that are removed. Each round settles the first row of each key, and those in its window."""
    store, window = context.store, context.pinned.exchange.settings.dedup_window_hours
    store.run("CREATE OR REPLACE TEMP TABLE rest AS SELECT rowid AS number, key, hour FROM gold")
    store.run("CREATE OR REPLACE TEMP TABLE kept (number BIGINT)")
    while store.count("FROM rest"):
        store.run(
            "CREATE OR REPLACE TEMP TABLE firsts AS SELECT key, min(hour) AS hour, "
            "arg_min(number, (hour, number)) AS number FROM rest GROUP BY key"
        )
        store.run("INSERT INTO kept SELECT number FROM firsts")
        store.run(
            "CREATE OR REPLACE TEMP TABLE rest AS SELECT r.number, r.key, r.hour FROM rest r JOIN firsts f USING (key) "
            f"WHERE r.hour >= f.hour + {window}"
        )
    store.run(
        f"INSERT INTO removed SELECT '{GOLD.name}', file, row, count(*) FILTER (k.number IS NULL) AS n, count(*) "
        "FROM gold g LEFT JOIN kept k ON k.number = g.rowid GROUP BY ALL HAVING n > 0"
    )
