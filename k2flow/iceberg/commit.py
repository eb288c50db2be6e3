"""Commits data files together with the ledger of the offsets they hold, in one atomic Iceberg commit.

Delivery guarantee: exactly once. Whatever fails or dies, at whatever moment, a table holds the rows of exactly the
offsets that its ledger names:

- the ledger and the files are one commit, which Iceberg makes atomic (spec, "Optimistic concurrency");
- every attempt commits only if the table's head is still the one it knows (`assert-ref-snapshot-id`), which every fence
  and every append moves, so no stale writer can slip in; the first attempt knows the head that this writer's last
  commit left, each further one reads the table anew and refuses if another epoch has begun;
- an attempt whose outcome is unknown (a timeout, a dropped connection) is looked up in the ledger before it is
  repeated;
- each range of offsets must begin where the ledger ends.

The metadata that a commit carries stays small: snapshots beyond the newest KEEP_SNAPSHOTS are dropped from it in the
same commit (their files stay, for maintenance to remove), so the 10,000th commit costs what the 100th did.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    AssertTableUUID,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableRequirement,
    TableUpdate,
)
from pyiceberg.table.update.snapshot import _MergeAppendFiles
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from k2flow.errors import AlreadyRunningError, CatalogError, CommitError, FencedError
from k2flow.failpoints import Point, reach
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import OUTAGES, load_table
from k2flow.iceberg.ledger import Ledger, OffsetRange, Writer
from k2flow.iceberg.snapshots import superfluous_snapshots
from k2flow.observability.metrics import COMMIT_RETRIES, layer_of
from k2flow.timeouts import DeadlinePassedError, run_with_timeout

log = logging.getLogger(__name__)

STAGED_BRANCH = "k2flow-staged-"
"""And the exchange and an epoch: a branch whose head replaces rows, once it is decided (k2flow.iceberg.staging)."""
STAGED_KEY = "k2flow.staged."
"""And the exchange: a property of its Bronze table while the decided replacements are not all published."""
REPLACED_KEY = "k2flow.replaced."
"""And the exchange: a property of its Bronze table, the branch whose replacements were published last."""
DROP_AT = 110  # dropping ten at once costs a tenth of dropping one in each commit
MANIFEST_BYTES = 1 << 17
"""What manifests are merged up to. A merge writes every entry again, so that Iceberg's 8 MB would cost seconds."""
RETRY_SECONDS = 120
HUNG_SECONDS = 180
"""How long a commit may take with all its attempts. PyIceberg's clients wait for ever for a server that is frozen."""


class Committer:
    """The one writer of commits of one exchange into one table.

    `fence` comes first. After that `commit` is all; a CommitError means that this copy of the flow must stop: what was
    not committed is read from Kafka again by the next one.
    """

    def __init__(self, catalog: Catalog, name: str, exchange: str, topic: str, accept_gaps: bool = False) -> None:
        self._catalog = catalog
        self._name = name
        self._exchange = exchange
        self._topic = topic
        self._accept_gaps = accept_gaps
        self._writer = Writer.this()
        self._table = load_table(catalog, name)
        self._fresh = True  # whether `_table` is as this writer's last commit left it
        self.ledger = self._read()

    def fence(self, topic_id: str, began_with: Ledger | None = None, branch: str | None = None) -> None:
        """Begins a new epoch, after which no commit of an earlier one can succeed; `branch` then begins at it.

        `began_with` is the ledger that the flow found when it began, if it has read anything since: what it has read
        (Gold's ids above all) may lack the rows of a commit that came in between, so it must begin again after one.

        The fence is an empty append: a commit that changes properties alone would leave the table's head, and with it a
        predecessor's `assert-ref-snapshot-id`, as it was. Raises AlreadyRunningError where the predecessor still runs
        on this host, FencedError where another has begun an epoch since, CommitError.
        """
        before = self.ledger
        if before.writer is not None and before.writer.running_here():
            raise AlreadyRunningError(
                f"the flow of {self._exchange} already runs: {before.writer} commits to {self._name}. Stop it first"
            )
        if began_with is not None and began_with.epoch != before.epoch:
            raise self._taken_over(before, began_with.epoch)
        reach(Point.FENCE)
        self._commit(before.fenced(self._writer, topic_id), [], append=True, branch=branch)
        if began_with is not None and began_with != before:
            raise CommitError(
                f"{self._name}: {before.writer} has committed since this copy of the flow began, and cannot any more: "
                "start again"
            )

    def decide(self, key: str, text: str) -> None:
        """Sets a property, if nothing was committed since this writer's last commit.

        An empty append, for what `fence` is one: a fence that has read the table before lands no more. Raises
        FencedError, CommitError.
        """
        after = replace(self.ledger, sequence=self.ledger.sequence + 1)
        self._commit(after, [], append=True, properties={key: text})

    def check(self) -> None:
        """Raises FencedError where others have committed since this writer's last commit."""
        self._refresh()
        self._fresh = False
        if (current := self._read()) != self.ledger:
            raise self._taken_over(current, self.ledger.epoch)

    def commit(self, files: Sequence[DataFile], ranges: Sequence[OffsetRange]) -> None:
        """Adds `files`, which hold the rows of exactly `ranges`, and advances the ledger over them.

        Without files only the ledger is advanced, and no snapshot is made. Raises OffsetGapError, FencedError,
        CommitError.
        """
        after = self.ledger.advanced(ranges, self._accept_gaps)
        self._commit(after, files, append=bool(files))

    def _commit(
        self,
        after: Ledger,
        files: Sequence[DataFile],
        append: bool,
        branch: str | None = None,
        properties: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """`branch` begins at the snapshot that is appended, and `properties` are set with it."""
        try:
            run_with_timeout(HUNG_SECONDS, lambda: self._try_until_done(after, files, append, branch, properties))
        except DeadlinePassedError as error:
            raise CommitError(
                f"{self._name}: the catalog or its storage has not answered for {HUNG_SECONDS} s; nothing is lost: "
                "start again when it does"
            ) from error
        self.ledger = after

    def _try_until_done(
        self, after: Ledger, files: Sequence[DataFile], append: bool, branch: str | None, properties: Mapping[str, str]
    ) -> None:
        retrying = Retrying(
            retry=retry_if_exception_type((CommitFailedException, *OUTAGES)),
            # Short at first: the flows of two exchanges meet at Gold whenever their triggers coincide.
            wait=wait_exponential_jitter(initial=0.05, max=5, jitter=0.05),
            stop=stop_after_delay(RETRY_SECONDS),
            before_sleep=lambda _: COMMIT_RETRIES.labels(self._exchange, layer_of(self._name)).inc(),
            reraise=True,
        )
        try:
            for attempt in retrying:
                with attempt:
                    self._attempt(after, files, append, branch, properties)
        except CommitFailedException as error:
            raise CommitError(
                f"{self._name}: gave up after {RETRY_SECONDS} s of conflicting commits: {error}"
            ) from error
        except OUTAGES as error:
            raise CommitError(
                f"{self._name}: the catalog or its storage failed for {RETRY_SECONDS} s ({error}); nothing is lost: "
                "start again when it is back"
            ) from error

    def _refresh(self) -> None:
        try:
            self._table = load_table(self._catalog, self._name)
        except CatalogError as error:
            if isinstance(error.__cause__, OUTAGES):
                raise error.__cause__ from None
            raise

    def _read(self) -> Ledger:
        return ledgers.read(self._table.properties, self._exchange, self._topic)

    def _taken_over(self, by: Ledger, epoch: int) -> FencedError:
        who = f"{by.writer} (epoch {by.epoch})" if by.writer else "nobody"
        return FencedError(f"{self._name}: {who} has taken over from epoch {epoch}; this copy of the flow stops")

    def _attempt(
        self, after: Ledger, files: Sequence[DataFile], append: bool, branch: str | None, properties: Mapping[str, str]
    ) -> None:
        reach(Point.COMMIT_BEGUN)
        if not self._fresh or len(self._table.metadata.snapshots) >= DROP_AT:  # maintenance may have dropped some
            self._refresh()
        self._fresh = False
        current, before = self._read(), self.ledger
        if current == after:
            log.info("%s: an attempt whose outcome was unknown had landed", self._name)
            return
        if current != before:
            raise self._taken_over(current, before.epoch)
        if STAGED_KEY + self._exchange in self._table.properties:
            raise CommitError(
                f"{self._name}: rows of {self._exchange} are being replaced: start again, which finishes it first"
            )
        metadata = self._table.metadata
        if branch is not None and (other := next((r for r in metadata.refs if r.startswith(STAGED_BRANCH)), None)):
            raise CommitError(
                f"{self._name}: rows of it are being replaced already, on branch {other}: let that end. If nobody does "
                "it any more, the next start of that exchange's flow ends it"
            )
        entry = {ledgers.KEY + self._exchange: after.to_json()}
        updates: tuple[TableUpdate, ...] = (SetPropertiesUpdate(updates={**entry, **properties}),)
        requirements: tuple[TableRequirement, ...] = (AssertTableUUID(uuid=metadata.table_uuid),)
        producer = None
        if append:
            producer = _MergeAppendFiles(
                Operation.APPEND, Unstaged(self._table), self._table.io, snapshot_properties=entry
            )
            producer._target_size_bytes = MANIFEST_BYTES
            for file in files:
                producer.append_data_file(file)
            appended, unchanged_head = producer._commit()
            reach(Point.MANIFEST_WRITTEN)
            updates = (*appended, *updates, *_drop_old_snapshots(metadata))
            requirements = (*requirements, *unchanged_head)
            if branch is not None:
                updates = (*updates, _branch_at(branch, producer.snapshot_id))
        else:
            head = metadata.current_snapshot_id
            requirements = (
                *requirements,
                AssertRefSnapshotId.model_validate({"ref": MAIN_BRANCH, "snapshot-id": head}),
            )
        try:
            self._table._do_commit(updates, requirements)
            reach(Point.COMMIT_LANDED)
            self._fresh = True
        except CommitFailedException:
            if producer is not None:  # certainly not committed; after any other error it may be, so nothing is deleted
                producer._clean_all_uncommitted()
            raise
        except ValueError as error:
            # PyIceberg's word for updates that do not fit the table as it is by now: another process has made a
            # snapshot elsewhere than on the head, or has dropped one that this attempt drops.
            raise CommitFailedException(f"the table has changed: {error}") from error


class Unstaged(Transaction):
    """A transaction with nothing staged: PyIceberg's own copies all metadata at each look, 14 times a commit."""

    @property
    def table_metadata(self) -> TableMetadata:
        return self._table.metadata


def _branch_at(branch: str, snapshot_id: int) -> SetSnapshotRefUpdate:
    return SetSnapshotRefUpdate.model_validate(
        {"ref-name": branch, "type": SnapshotRefType.BRANCH, "snapshot-id": snapshot_id}
    )


def _drop_old_snapshots(metadata: TableMetadata) -> tuple[TableUpdate, ...]:
    """Return the update that drops superfluous snapshots, once there are DROP_AT. Tags of readers are maintenance's."""
    if len(metadata.snapshots) < DROP_AT:
        return ()
    old = superfluous_snapshots(metadata)
    return (RemoveSnapshotsUpdate.model_validate({"snapshot-ids": old}),) if old else ()
