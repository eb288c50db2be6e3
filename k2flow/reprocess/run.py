"""Judging again from beginning to end: what would change is found, written, and published in one commit per table.

Delivery guarantee: exactly once, whoever dies when (k2flow.iceberg.staging). Memory: what the hashes take is bounded, as is
what is read and written at once; each message of which something else becomes takes some 25 bytes more. The hashes take
about 40 bytes of disk for each message judged, each row of Silver and each affected one of Gold.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta

from pyiceberg.catalog import Catalog

from k2flow.config.settings import Settings
from k2flow.errors import FencedError, ReprocessError
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.iceberg.staging import Staging, finish
from k2flow.iceberg.tables import create, definitions
from k2flow.inspection.pinned import PinnedTables, pin
from k2flow.inspection.progress import Progress
from k2flow.inspection.row_hashes import open_store
from k2flow.layers import GOLD_TABLE
from k2flow.reprocess.changes import Change, changes
from k2flow.reprocess.difference import SCHEMA, VALID, Difference, Replaced
from k2flow.reprocess.rewriting import Rewriting
from k2flow.reprocess.scope import EPOCH, Days, Known, Letters, Scope
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.gold_ids import GoldIds
from k2flow.trades.registry import open_schemas

__all__ = ["VALID", "Outcome", "replay", "reprocess"]


@dataclass
class Outcome:
    """What was replaced, or would be.

    `judged` messages, the first of which Bronze took in, or failed, on day `since`. `moved` counts those of which
    something else becomes, by what they were and are: a reason code or VALID; (VALID, VALID) are trades whose values
    change, `changes` some of those. `tables` are the rows that went and came, by layer. `left_alone` messages are of a
    topic that was deleted, or not in all tables yet. `unclear` ids are left as they are too, since nothing tells which
    rows of Silver their messages gave. `finished` is an earlier replacement that was decided and has been
    published first.
    """

    what: str
    judged: int = 0
    moved: Mapping[tuple[str, str], int] = field(default_factory=dict)
    changes: Sequence[Change] = ()
    tables: Mapping[str, Replaced] = field(default_factory=dict)
    left_alone: int = 0
    unclear: int = 0
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
    """Judges the messages that Bronze ingested on [first, last] again, by today's schemas and rules.

    The flow must be stopped, unless it is a dry run. Raises ReprocessError, AlreadyRunningError, FencedError, CommitError,
    AuditError (a table cannot be read), CatalogError, RegistryError: then nothing was replaced, or, with a CommitError
    after the decision, what was decided is published by the next call or the next start of the flow.
    """
    what = f"reprocess {first} to {last}"
    return _Redo(catalog, settings, exchange, dry_run, progress).run(
        what, lambda pinned, known: Days(pinned, known, (first, last))
    )


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
    """Judges dead letters again and moves those that are valid trades by now into Silver and Gold. As `reprocess`."""
    what = f"dlq replay{''.join(f' {reason}' for reason in reasons)}"
    return _Redo(catalog, settings, exchange, dry_run, progress).run(
        what, lambda pinned, known: Letters(pinned, known, reasons, (first, last))
    )


class _Redo:
    def __init__(
        self, catalog: Catalog, settings: Settings, exchange: Exchange, dry_run: bool, progress: Progress
    ) -> None:
        self._catalog = catalog
        self._exchange = exchange
        self._dry = dry_run
        self._progress = progress
        do_not_wait = threading.Event()
        do_not_wait.set()  # for a registry that is out of reach
        self._decoder = TradeDecoder(exchange, open_schemas(settings, do_not_wait))
        self._definitions = definitions(exchange)

    def run(self, what: str, scope_of: Callable[[PinnedTables, Known], Scope]) -> Outcome:
        if self._dry:
            return self._judge(Outcome(what), scope_of, None)[0]
        exchange = self._exchange
        outcome = Outcome(what, finished=finish(self._catalog, exchange))
        create(self._catalog, self._definitions.values())  # they may be of an older k2flow
        staging = Staging(self._catalog, exchange, (exchange.dlq, exchange.silver, GOLD_TABLE))
        try:
            staging.begin()
            outcome, rows = self._judge(outcome, scope_of, staging)
        except BaseException:  # a signal, too: while there are branches nobody maintains the tables
            staging.give_up()
            raise
        if not outcome.moved:
            staging.give_up()
            return outcome
        fewer = {p: -n for p, n in rows.items()}
        try:
            staging.decide({exchange.dlq: fewer, exchange.silver: rows, GOLD_TABLE: rows}, what)
        except FencedError:  # after any other error it may have been decided
            staging.give_up()
            raise
        finish(self._catalog, exchange)
        outcome.published = True
        return outcome

    def _judge(
        self, outcome: Outcome, scope_of: Callable[[PinnedTables, Known], Scope], staging: Staging | None
    ) -> tuple[Outcome, dict[int, int]]:
        """What changes, all of it staged if there is a `staging`; and how many more rows are valid, by partition."""
        pinned = self._pin(all_agree=staging is not None)
        known = Known(pinned)
        scope = scope_of(pinned, known)
        with open_store(SCHEMA) as store:
            newest_hour = GoldIds(self._catalog, self._exchange.code).newest_hour
            difference = Difference(store, pinned, self._decoder, newest_hour)
            outcome.judged = difference.judge(scope, known, self._advance("judge", scope.plan.rows))
            outcome.left_alone, day = scope.left_alone, scope.plan.first_day
            outcome.since = None if day is None else EPOCH + timedelta(day)
            advance = self._advance("compare", scope.plan.rows)
            difference.find_leaving(scope, advance)
            outcome.unclear = difference.settle()
            outcome.moved = difference.counts()
            if outcome.moved:
                difference.find_gone(advance)
                if staging is not None:
                    outcome.tables = self._rewrite(difference, scope, pinned, staging)
                else:
                    silver = self._definitions[self._exchange.silver]
                    outcome.changes = changes(difference, scope, pinned, silver, self._decoder, advance)
                    outcome.tables = difference.sizes()
            return outcome, difference.rows_by_partition()

    def _rewrite(
        self, difference: Difference, scope: Scope, pinned: PinnedTables, staging: Staging
    ) -> Mapping[str, Replaced]:
        advance = self._advance("write", scope.plan.rows)
        rewriting = Rewriting(difference, pinned, self._definitions, self._decoder, advance)
        rewriting.write_new(scope)
        rewriting.write_gold()
        for layer, replaced in rewriting.tables.items():
            rewriting.write_without(layer)
            reach(Point.REWRITTEN)
            staging.stage(pinned.name(layer), replaced.removed, replaced.added)
        return rewriting.tables

    def _pin(self, all_agree: bool) -> PinnedTables:
        """Raises ReprocessError where there are no tables, or where they are to hold the same offsets and do not."""
        pinned, _ = pin(self._catalog, [self._exchange])
        if not pinned:
            raise ReprocessError(f"there are no tables of {self._exchange.name}: run its flow first")
        held = [{p: extent.next for p, extent in ledger.partitions.items()} for ledger in pinned[0].ledgers.values()]
        if all_agree and any(each != held[0] for each in held):
            raise ReprocessError(
                f"the tables of {self._exchange.name} do not hold the same offsets, since a flow was stopped amid its "
                f"commits: run `k2flow run {self._exchange.name} --until-caught-up`, then this again"
            )
        return pinned[0]

    def _advance(self, what: str, total: int) -> Callable[[int], None]:
        self._progress(what, 0, total)
        return lambda rows: self._progress(what, rows, total)
