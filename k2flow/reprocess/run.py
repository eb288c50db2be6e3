"""Reprocessing from start to end: find what would change, write it, and publish it in one commit per table.

Delivery guarantee: exactly once, whichever process crashes when (k2flow.iceberg.staging). Memory: the hashes and the
rows read and written at once are bounded; each moved message takes about 25 bytes more. The hashes take about 50 bytes
of disk for each message, each row of Silver and each affected one of Gold.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta

from pyiceberg.catalog import Catalog

from k2flow.config.settings import Settings
from k2flow.errors import FencedError, ReprocessError
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import find_table
from k2flow.iceberg.dedup_key import check_key
from k2flow.iceberg.staging import Staging, publish
from k2flow.iceberg.tables import create, definitions
from k2flow.inspection.files import Advance, Progress
from k2flow.inspection.pinned import LAST_DAY, UNIX_EPOCH, PinnedTables
from k2flow.inspection.row_hashes import open_row_hashes
from k2flow.layers import BRONZE, GOLD_TABLE, SILVER, Layer
from k2flow.reprocess.context import (
    REPLACED_LAYERS,
    SCHEMA,
    ReplaceableMessages,
    ReprocessContext,
    Scope,
    day_scope,
    dead_letter_scope,
    pin_tables,
)
from k2flow.reprocess.replacements import TableReplacement, TradeChange, changes, find_replacements
from k2flow.reprocess.revalidation import revalidate
from k2flow.reprocess.rewriting import Rewriter
from k2flow.trades.gold_ids import GoldIds
from k2flow.trades.stored_schemas import StoredSchemas, schema_properties

ScopeOf = Callable[[PinnedTables, ReplaceableMessages], Scope]


@dataclass
class Outcome:
    """The rows replaced, or those that would be.

    Attributes:
        what: The command.
        messages: How many messages were decoded.
        moved: The number of messages with another result, by what they were and are: a reason code or VALID. (VALID,
            VALID) are trades whose values change.
        changes: Some of those trades.
        tables: The changes by layer's name.
        skipped: Messages of a deleted topic, or not in all tables yet.
        ambiguous: Message ids that stay as they are, because it is unknown which rows of Silver their messages gave.
        since: The day on which Bronze ingested the first message, or the first dead letter failed.
        finished: An earlier replacement that was committed, and has been published first.
        published: Whether the replacement is in all tables.
    """

    what: str
    messages: int = 0
    moved: Mapping[tuple[str, str], int] = field(default_factory=dict)
    changes: Sequence[TradeChange] = ()
    tables: Mapping[str, TableReplacement] = field(default_factory=dict)
    skipped: int = 0
    ambiguous: int = 0
    since: date | None = None
    finished: str | None = None
    published: bool = False


def reprocess(
    catalog: Catalog,
    settings: Settings,
    exchange: Exchange,
    first: date,
    last: date,
    dry_run: bool = False,
    progress: Progress = lambda name, more, total: None,
) -> Outcome:
    """Decode the messages that Bronze ingested on [first, last] again, by the tables' schemas and today's rules.

    Schemas that the tables do not have come from the registry. Messages whose schema is not known stay as they are.

    The flow must be stopped, unless it is a dry run: AlreadyRunningError if it runs on this host, FencedError if it has
    started meanwhile. After CommitError, the next call or start of the flow publishes a committed replacement. After
    every other error (ReprocessError, AuditError, CatalogError, RegistryError, too), nothing was replaced.
    """
    what = f"reprocess {first} to {last}"
    run = _Reprocessing(catalog, settings, exchange, dry_run, progress)
    return run.run(what, lambda pinned, replaceable: day_scope(pinned, replaceable, first, last))


def replay(
    catalog: Catalog,
    settings: Settings,
    exchange: Exchange,
    reasons: Sequence[str] = (),
    first: date | None = None,
    last: date | None = None,
    dry_run: bool = False,
    progress: Progress = lambda name, more, total: None,
) -> Outcome:
    """Decode dead letters again, and move those that are valid trades today into Silver and Gold. As `reprocess`."""
    what = f"dlq replay{''.join(f' {reason}' for reason in reasons)}"
    run = _Reprocessing(catalog, settings, exchange, dry_run, progress)
    return run.run(what, lambda pinned, replaceable: dead_letter_scope(pinned, replaceable, reasons, first, last))


class _Reprocessing:
    def __init__(
        self, catalog: Catalog, settings: Settings, exchange: Exchange, dry_run: bool, progress: Progress
    ) -> None:
        self._catalog = catalog
        self._exchange = exchange
        self._dry_run = dry_run
        self._progress = progress
        self._settings = settings
        self._definitions = definitions(exchange)

    def run(self, what: str, scope_of: ScopeOf) -> Outcome:
        _check_layers(self._exchange)
        if self._dry_run:
            self._check_key()
            return self._compare(Outcome(what), scope_of, None)[0]
        exchange = self._exchange
        outcome = Outcome(what, finished=publish(self._catalog, exchange))
        self._check_key()
        create(self._catalog, self._definitions.values())  # an earlier k2flow may have created them
        names = [layer.table(exchange.name) for layer in REPLACED_LAYERS]
        staging = Staging(self._catalog, exchange, names)
        try:
            staging.begin()
            outcome, rows, properties = self._compare(outcome, scope_of, staging)
        except BaseException:  # a signal, too: while there are branches, no maintenance runs
            staging.abort()
            raise
        if not outcome.moved:
            staging.abort()
            return outcome
        fewer = {partition: -n for partition, n in rows.items()}
        try:
            changed = {name: fewer if name == exchange.dlq else rows for name in names}
            staging.commit_replacement(changed, what, properties)
        except FencedError:  # after any other error it may have been committed
            staging.abort()
            raise
        publish(self._catalog, exchange)
        outcome.published = True
        return outcome

    def _compare(
        self, outcome: Outcome, scope_of: ScopeOf, staging: Staging | None
    ) -> tuple[Outcome, dict[int, int], dict[str, str]]:
        """Find the changes, and stage them if there is a `staging`.

        Return also by how many more rows are valid, and the properties that keep the schemas used. Raises
        RegistryError if the registry does not answer, and without it no dead letter changes.
        """
        pinned = pin_tables(self._catalog, self._exchange, same_offsets=staging is not None)
        replaceable = ReplaceableMessages(pinned)
        scope = scope_of(pinned, replaceable)
        with open_row_hashes(SCHEMA) as store:
            schemas = StoredSchemas(self._settings, pinned.tables[BRONZE].properties, self._exchange.name)
            context = ReprocessContext(store=store, pinned=pinned, schemas=schemas)
            moved = revalidate(context, scope, replaceable, self._advance("revalidate", scope))
            outcome.messages, outcome.ambiguous = moved.messages_in_scope(), moved.ambiguous_ids()
            day = scope.plan.first_day
            outcome.skipped, outcome.since = (
                scope.skipped,
                None if day is None else UNIX_EPOCH + timedelta(min(day, LAST_DAY)),
            )
            outcome.moved = moved.counts()
            if schemas.unanswered is not None and not outcome.moved and not scope.whole:
                raise schemas.unanswered
            if outcome.moved:
                advance = self._advance("compare", scope)
                now = int(time.time() // 3600)  # Gold may have a later, absurd hour: no hot window ends there
                (newest_hour,) = GoldIds(self._catalog, self._exchange.code, self._exchange.dedup_key).newest_hours(
                    [now + 1]
                )
                found = find_replacements(context, newest_hour, advance)
                if staging is not None:
                    rewriter = Rewriter(context, found, self._definitions, self._advance("write", scope))
                    outcome.tables = _stage(rewriter.write_added(moved), rewriter, pinned, staging)
                else:
                    outcome.changes = changes(context, moved, self._definitions[pinned.name(SILVER)], advance)
                    outcome.tables = {layer.name: table for layer, table in found.sizes().items()}
            properties = schema_properties(self._exchange.name, schemas.new_texts())
            return outcome, moved.rows_by_partition(), properties

    def _check_key(self) -> None:
        if gold := find_table(self._catalog, GOLD_TABLE):
            check_key(gold.properties, self._exchange)

    def _advance(self, what: str, scope: Scope) -> Advance:
        total = scope.plan.rows
        self._progress(what, 0, total)
        return lambda rows: self._progress(what, rows, total)


def _stage(
    tables: dict[Layer, TableReplacement], rewriter: Rewriter, pinned: PinnedTables, staging: Staging
) -> dict[str, TableReplacement]:
    for layer, table in tables.items():
        rewriter.rewrite(layer, table)
        reach(Point.REWRITTEN)
        staging.stage(pinned.name(layer), table.removed, table.added)
    return {layer.name: table for layer, table in tables.items()}


def _check_layers(exchange: Exchange) -> None:
    """Raise ReprocessError if the exchange has layers whose rows would not be replaced."""
    other = [layer.name for layer in exchange.layers if layer not in (BRONZE, *REPLACED_LAYERS)]
    if other:
        raise ReprocessError(
            f"the rows of {' and '.join(other)} cannot be replaced: reprocessing supports dlq, silver and gold. Remove "
            f"the layer from flows/{exchange.name}.py, reprocess, and add it again with a new table"
        )
