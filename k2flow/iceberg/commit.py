"""Commits data files together with the ledger of the offsets they hold, in one atomic Iceberg commit.

Delivery guarantee: exactly once. At every moment, and after any crash, a table holds exactly the rows of the offsets in
its ledger:

1. The ledger and the files are one commit, which Iceberg makes atomic (spec, "Optimistic concurrency").
2. Every attempt commits only if the table's head is the one it knows (`assert-ref-snapshot-id`). Every fence and every
   append moves the head, so no stale writer can commit in between. The first attempt knows the head that this writer's
   last commit left. Each further attempt reads the table again.
3. An attempt that reads a ledger of another writer epoch stops: this writer is fenced. One that finds a head without
   the rows of the ledger (main was moved) stops too, see k2flow.iceberg.head.
4. If the outcome of an attempt is unknown (a timeout, a dropped connection), the next attempt first looks for its
   ledger in the table, and repeats the commit only if it did not land (commit-state-unknown reconciliation). The same
   holds after a refusal, which may answer a request that a proxy repeated. Only then are the manifests deleted.
5. Each range of offsets must begin where the ledger ends.

The metadata that a commit carries stays small: the same commit expires snapshots older than the newest KEEP_SNAPSHOTS.
Their files stay until maintenance deletes them. So the 10,000th commit costs as much as the 100th.
"""

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableUpdate,
)
from tenacity import stop_after_delay

from k2flow.compat.pyiceberg.private import MergeAppendFiles
from k2flow.errors import AlreadyRunningError, CatalogError, CommitConflictError, CommitError, FencedError, one_line
from k2flow.failpoints import Point, reach
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.append import append_files
from k2flow.iceberg.catalog import OUTAGES, load_table
from k2flow.iceberg.head import AfterRollback, carried_copies, reconcile
from k2flow.iceberg.ledger import CommittedRange, Ledger, OffsetRange, Writer
from k2flow.iceberg.replace import COMMIT_ENTRIES, RewriteFiles, tag_for_readers
from k2flow.iceberg.retry import Changes, commit_once, retry_conflicts
from k2flow.iceberg.snapshots import plan_expiration
from k2flow.observability.metrics import COMMIT_RETRIES, layer_of
from k2flow.timeouts import REQUESTS, DeadlinePassedError, run_with_timeout

log = logging.getLogger(__name__)
Snapshots = MergeAppendFiles | RewriteFiles
STAGED_BRANCH = "k2flow-staged-"
"""Prefix of a branch whose head replaces rows once it is committed; the exchange and a writer epoch follow."""
STAGED_KEY = "k2flow.staged."
"""Prefix of a property of Bronze while a committed replacement is not fully published; the exchange follows."""
REPLACED_KEY = "k2flow.replaced."
"""Prefix of a property of Bronze, the branch of the replacement published last; the exchange follows."""
EXPIRE_AT = 110  # expiring ten snapshots at once costs a tenth of expiring one in each commit
NO_PROPERTIES: Mapping[str, str] = MappingProxyType({})
RETRY_SECONDS = 120
MAX_WAIT_SECONDS = 5
OUTAGE_LOG_SECONDS = 10
TAG_SECONDS = 600
"""Between two tags for readers of removed files. Maintenance leaves younger files alone for longer than that."""
HUNG_SECONDS = 180
"""How long a commit may take without another request. PyIceberg's clients wait forever for a frozen server."""


@dataclass(frozen=True, kw_only=True)
class LedgerCommit:
    """One commit of a ledger."""

    after: Ledger  # the ledger after the commit
    append: bool  # whether to append a snapshot, which moves the head; otherwise only properties change
    files: Sequence[DataFile] = ()  # added
    removed: Mapping[str, int] = field(default_factory=dict)  # the paths of files to remove, with their days since 1970
    branch: str | None = None  # created at the appended snapshot
    properties: Mapping[str, str] = field(default_factory=dict)  # set beside the ledger


class Committer:
    """The only writer that commits one exchange's rows to one table.

    Call `fence` first. After a CommitError this copy of the flow must stop: the next one reads everything that was not
    committed from Kafka again.
    """

    def __init__(
        self,
        catalog: Catalog,
        name: str,
        exchange: str,
        topic: str,
        accept_gaps: bool = False,
        after_rollback: AfterRollback = "stop",
        of_log: Callable[[Ledger], Ledger] = lambda ledger: ledger,
        own_properties: Mapping[str, str] = NO_PROPERTIES,
    ) -> None:
        """Read the table. Raises HeadMovedError (see k2flow.iceberg.head), CommitError, CatalogError.

        Until the fence, `after_rollback` says what to do with a moved head, and `of_log` is applied to the ledger.
        Every commit sets `own_properties`.
        """
        self._catalog = catalog
        self._name = name
        self._exchange = exchange
        self._topic = topic
        self._accept_gaps = accept_gaps
        self._after_rollback = after_rollback
        self._of_log = of_log
        self._own_properties = own_properties
        self._writer = Writer.this()
        self._table = load_table(catalog, name)
        self._fresh = True  # whether `_table` is as this writer's last commit left it
        self._outage_logged = -math.inf  # when, by the monotonic clock
        self._tagged_at = -math.inf  # when the head was last tagged for readers of removed files, since 1970
        self._refused: Snapshots | None = None  # the last attempt's snapshot, if the catalog refused it
        self.ledger = self._read()

    def fence(self, topic_id: str, began_with: Ledger | None = None, branch: str | None = None) -> None:
        """Begin a new writer epoch: no commit of an earlier one can succeed after it.

        The fence is an empty append. A commit that changes only properties would leave the table's head as it was, and
        with it the predecessor's `assert-ref-snapshot-id`.

        `topic_id` is Kafka's. `began_with` is the ledger that the flow found when it began, if it has read rows since.
        These rows (above all Gold's ids) may lack a commit of the predecessor in between. The flow must then start
        again. `branch` names a branch to create at the fence.

        Raises AlreadyRunningError if the predecessor still runs on this host, FencedError if another writer epoch has
        begun since. Raises CommitError if the commit failed, or the predecessor has committed since the flow began.
        """
        before = self.ledger
        if before.writer is not None and before.writer.running_here():
            raise AlreadyRunningError(
                f"the flow of {self._exchange} already runs: {before.writer} commits to {self._name}. Stop it first"
            )
        if began_with is not None and began_with.writer_epoch != before.writer_epoch:
            raise self._fenced_by(before, began_with.writer_epoch)
        reach(Point.FENCE)
        self._commit(LedgerCommit(after=before.fenced(self._writer, topic_id), append=True, branch=branch))
        self._after_rollback = "restart" if self._after_rollback == "recompute" else "stop"
        self._of_log = lambda ledger: ledger
        if began_with is not None and began_with != before:
            raise CommitError(
                f"{self._name}: {before.writer} has committed since this copy of the flow began, and cannot any more: "
                "start again"
            )

    def commit_properties(self, properties: Mapping[str, str]) -> None:
        """Set properties, if nothing was committed since this writer's last commit.

        It is an empty append, for the same reason as `fence`: a fence that has read the table before cannot land after.
        Raises FencedError, CommitError.
        """
        after = replace(self.ledger, sequence=self.ledger.sequence + 1)
        self._commit(LedgerCommit(after=after, append=True, properties=properties))

    def check_not_fenced(self) -> None:
        """Read the table again. Raises FencedError if others have committed since this writer's last commit."""
        self._refresh()
        self._check_fence(self._read())

    def commit(
        self, files: Sequence[DataFile], ranges: Sequence[OffsetRange], properties: Mapping[str, str] = NO_PROPERTIES
    ) -> None:
        """Add `files`, which hold the rows of exactly `ranges`, and advance the ledger over them.

        Without files only the ledger advances, and no snapshot is created. `properties` are set unless the table has
        them: CommitError if one has another value. Raises OffsetGapError if a range is not
        contiguous with the ledger, FencedError if another writer epoch has begun, CommitError if the commit failed.
        """
        after = self.ledger.advanced(ranges, self._accept_gaps)
        new = {key: text for key, text in properties.items() if self._table.properties.get(key) != text}
        for key in new.keys() & self._table.properties.keys():
            raise CommitError(f"{self._name}: property {key} has another value than this process has used: start again")
        self._commit(LedgerCommit(after=after, append=bool(files), files=files, properties=new))

    def overwrite(
        self,
        files: Sequence[DataFile],
        removed: Mapping[str, int],
        held: Mapping[int, CommittedRange],
        properties: Mapping[str, str] = NO_PROPERTIES,
    ) -> None:
        """Replace the files `removed` (paths, with their days since 1970) by `files`, and set properties.

        Then the table holds exactly the rows of `held`. Without files only the ledger changes, unless `held` ends
        before it. Raises what `commit` raises, and CommitConflictError if a removed file is not in the table.
        """
        after = self.ledger.restated(held)
        back = any(held[p].next < known.next for p, known in self.ledger.partitions.items() if p in held)
        append = back or bool(files or removed)
        self._commit(LedgerCommit(after=after, append=append, files=files, removed=removed, properties=properties))

    def _commit(self, request: LedgerCommit) -> None:
        if request.append:
            request = replace(request, after=request.after.in_snapshot())
        attempts = partial(
            retry_conflicts,
            lambda: self._attempt(request),
            stop_after_delay(RETRY_SECONDS),
            max_wait_seconds=MAX_WAIT_SECONDS,
            outages=OUTAGES,
            on_retry=self._note_retry,
        )
        try:
            run_with_timeout(HUNG_SECONDS, attempts, REQUESTS)
        except DeadlinePassedError as error:
            raise CommitError(
                f"{self._name}: the catalog or its storage has not answered for {HUNG_SECONDS} s; nothing is lost: "
                "start again when it does"
            ) from error
        except CommitFailedException as error:
            raise CommitError(
                f"{self._name}: conflicting commits for {RETRY_SECONDS} s ({error}): start again"
            ) from error
        except OUTAGES as error:
            raise CommitError(
                f"{self._name}: the catalog or its storage failed for {RETRY_SECONDS} s ({error}); nothing is lost: "
                "start again when it is back"
            ) from error
        self.ledger = request.after

    def _note_retry(self, error: BaseException | None) -> None:
        """Count an attempt that failed. Log an outage, but no conflict: it passes within a moment."""
        COMMIT_RETRIES.labels(self._exchange, layer_of(self._name)).inc()
        if isinstance(error, OUTAGES) and time.monotonic() - self._outage_logged >= OUTAGE_LOG_SECONDS:
            self._outage_logged = time.monotonic()
            text = "%s: the catalog or its storage failed (%s); trying again for %d s at most"
            log.warning(text, self._name, one_line(error), RETRY_SECONDS)

    def _attempt(self, request: LedgerCommit) -> None:
        reach(Point.COMMIT_BEGUN)
        if not (fresh := self._fresh and len(self._table.metadata.snapshots) < EXPIRE_AT):  # some may have expired
            self._refresh()
        self._fresh = False
        current = self._read()
        if current == request.after:  # commit-state-unknown reconciliation
            log.info("%s: an attempt with an unknown outcome had landed", self._name)
            self._refused = None
            return
        self._check_fence(current)
        if self._refused is not None:  # the ledger proves that it did not land
            self._refused._clean_all_uncommitted()
            self._refused = None
        self._check_replacements(request)
        try:
            changes, producer = self._build(request)
        except CommitConflictError as error:
            if not fresh:
                raise
            raise CommitFailedException(str(error)) from error  # others may have changed the table since
        try:
            commit_once(self._table, changes)
        except CommitFailedException:
            self._refused = producer
            raise
        reach(Point.COMMIT_LANDED)
        self._fresh = True

    def _refresh(self) -> None:
        """Read the table again. Raise an outage as it is, for the next attempt."""
        self._fresh = False
        try:
            self._table = load_table(self._catalog, self._name)
        except CatalogError as error:
            if isinstance(error.__cause__, OUTAGES):
                raise error.__cause__ from None
            raise

    def _check_fence(self, current: Ledger) -> None:
        if current != self.ledger:
            raise self._fenced_by(current, self.ledger.writer_epoch)

    def _check_replacements(self, request: LedgerCommit) -> None:
        """Refuse to commit while rows are being replaced, and to begin a second replacement."""
        if STAGED_KEY + self._exchange in self._table.properties:
            raise CommitError(
                f"{self._name}: rows of {self._exchange} are being replaced: start again, which completes it first"
            )
        if request.branch is not None and (other := staged_branch(self._table)):
            raise CommitError(
                f"{self._name}: rows of it are already being replaced, on branch {other}: wait for the end. If no "
                "process does it any more, the next start of that exchange's flow ends it"
            )

    def _build(self, request: LedgerCommit) -> tuple[Changes, Snapshots | None]:
        """Write the manifests of a request. Return its changes, and the snapshot to append, if any."""
        metadata = self._table.metadata
        own = request.after.properties(self._exchange)
        properties = SetPropertiesUpdate(updates={**own, **self._own_properties, **request.properties})
        same_table = AssertTableUUID(uuid=metadata.table_uuid)
        if not request.append:
            return ((properties,), (same_table, same_head(self._table))), None
        copy = {ledgers.KEY + self._exchange: request.after.to_json()}
        if request.removed:
            copies, days = {**carried_copies(metadata), **copy}, set(request.removed.values())
            producer: Snapshots = RewriteFiles(
                self._table,
                Operation.OVERWRITE,
                request.removed,
                request.files,
                copies,
                days=days,
                manifest_entries=COMMIT_ENTRIES,
            )
        else:
            producer = append_files(self._table, request.files, copy)
        appended, unchanged_head = producer._commit()
        reach(Point.MANIFEST_WRITTEN)
        updates: list[TableUpdate] = [*appended, properties]
        if request.removed and (now := time.time()) - self._tagged_at >= TAG_SECONDS:
            self._tagged_at = now
            updates.append(tag_for_readers(self._table, int(now * 1000)))
        if len(metadata.snapshots) >= EXPIRE_AT:  # readers' tags stay for maintenance
            updates += plan_expiration(metadata).updates()
        if request.branch is not None:
            ref = {"ref-name": request.branch, "type": SnapshotRefType.BRANCH, "snapshot-id": producer.snapshot_id}
            updates.append(SetSnapshotRefUpdate.model_validate(ref))
        return (tuple(updates), (same_table, *unchanged_head)), producer

    def _read(self) -> Ledger:
        """Return what the table holds. Raises HeadMovedError if its head was moved, CommitError."""
        ledger = ledgers.read(self._table.properties, self._exchange, self._topic)
        held = reconcile(self._name, self._table.metadata, self._exchange, ledger, self._after_rollback)
        return self._of_log(held)

    def _fenced_by(self, other: Ledger, epoch: int) -> CommitError:
        if other.sequence < self.ledger.sequence and other.writer_epoch <= epoch:
            return CommitError(
                f"{self._name}: its ledger is at commit {other.sequence}, before commit {self.ledger.sequence} of this "
                "copy of the flow: the table was restored from an earlier metadata file. Start again to read from there"
            )
        who = f"{other.writer} (writer epoch {other.writer_epoch})" if other.writer else "an unknown process"
        return FencedError(f"{self._name}: {who} has fenced writer epoch {epoch}; this copy of the flow stops")


def same_head(table: Table) -> AssertRefSnapshotId:
    """Return the requirement that the head of main is still the one that `table` has."""
    return AssertRefSnapshotId.model_validate({"ref": MAIN_BRANCH, "snapshot-id": table.metadata.current_snapshot_id})


def staged_branch(table: Table) -> str | None:
    """Return the branch of rows that are being replaced, if there is one: no file may be removed meanwhile."""
    return next((name for name in table.metadata.refs if name.startswith(STAGED_BRANCH)), None)
