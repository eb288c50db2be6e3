"""Replaces rows of several tables of an exchange as if in one step: written, staged, committed, published.

No transaction spans tables, so the replacement is made durable before any reader sees a part of it:

1. `Staging.begin` fences the flow, and creates a branch of each table at its fence. While a table has the branch,
   maintenance leaves its files alone.
2. `Staging.stage` commits, on the branch, which data files are removed and which are added.
3. `Staging.commit_replacement` sets one property of the Bronze table: the branches, and the change of each ledger's
   counts. **From here on the replacement happens, whichever process dies.** It lands only if no process has fenced
   Bronze since `begin`. After it, no process that has read Bronze before can fence it.
4. `publish` applies each branch to its table's main, with the ledger, in one commit that also drops the branch. Then it
   removes the property, and sets another one that records it. It may be repeated, also by several processes at once.
   A flow that starts does it first.

A crash before step 3 leaves the tables as they were, and branches that the next flow or replacement drops.

Delivery guarantee: exactly once. This is write-audit-publish with Iceberg's branches (spec, "Snapshot References").
But publishing applies the same files to a newer main, because flows of other exchanges append to Gold meanwhile.
"""

import logging
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

from pydantic import TypeAdapter, ValidationError
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile, ManifestEntryStatus
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation, ancestors_of
from pyiceberg.table.update import (
    AssertRefSnapshotId,
    RemovePropertiesUpdate,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    TableUpdate,
)
from tenacity import stop_after_delay

from k2flow.errors import CommitConflictError, CommitError, FencedError
from k2flow.exchange import Exchange
from k2flow.failpoints import Point, reach
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.changes import note_replaced
from k2flow.iceberg.commit import NO_PROPERTIES, REPLACED_KEY, STAGED_BRANCH, STAGED_KEY, Committer, same_head
from k2flow.iceberg.dedup_key import key_properties
from k2flow.iceberg.head import carried_copies, reconcile
from k2flow.iceberg.replace import RewriteFiles, tag_for_readers
from k2flow.iceberg.retry import Changes
from k2flow.iceberg.rewrite import commit_change

log = logging.getLogger(__name__)
RETRY_SECONDS = 120
FENCED = "the flow of {} has started meanwhile: nothing was replaced. Stop it and start again"


@dataclass(frozen=True)
class StagedTable:
    """The replacement in one table: a branch, its head, and the change of each partition's row count.

    Its publication sets `properties`.
    """

    branch: str
    head: int
    rows: Mapping[int, int]
    properties: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class CommittedReplacement:
    """A committed replacement: what it is, in words, and its part in each table by name."""

    what: str
    tables: Mapping[str, StagedTable]


_JSON: TypeAdapter[CommittedReplacement] = TypeAdapter(CommittedReplacement)


class Staging:
    """One replacement of rows of one exchange in tables `names`, up to its commit. Bronze's rows stay.

    With `new_key` Gold's deduplication key stays as it is recorded.
    """

    def __init__(self, catalog: Catalog, exchange: Exchange, names: Sequence[str], new_key: bool = False) -> None:
        self._catalog = catalog
        self._exchange = exchange
        self._names = names
        self._new_key = new_key
        self._bronze = Committer(catalog, exchange.bronze, exchange.name, exchange.settings.topic)
        self._branch = ""

    def begin(self) -> None:
        """Fence the flow; create the branches. Raises AlreadyRunningError (on this host), CommitError, CatalogError."""
        exchange = self._exchange
        self._bronze.fence("")
        epoch = self._bronze.ledger.writer_epoch
        abort_replacements(self._catalog, exchange, epoch)
        self._branch = f"{STAGED_BRANCH}{exchange.name}-{epoch}"
        for name in self._names:
            self._bronze.check_not_fenced()
            own = {} if self._new_key else key_properties(exchange, name)
            topic = exchange.settings.topic
            Committer(self._catalog, name, exchange.name, topic, own_properties=own).fence("", branch=self._branch)

    def abort(self) -> None:
        """Roll back before the commit: the tables stay as they were. Raises CommitError, CatalogError."""
        abort_replacements(self._catalog, self._exchange, self._bronze.ledger.writer_epoch + 1)

    def stage(self, name: str, removed: Collection[str], added: Sequence[DataFile]) -> None:
        """Remove files of table `name`, by their paths, and add others, on the branch."""
        if not removed and not added:
            return
        self._bronze.check_not_fenced()

        def build(table: Table) -> Changes:
            if self._branch not in table.metadata.refs:
                raise FencedError(f"{name}: {FENCED.format(self._exchange.name)}")
            return RewriteFiles(table, Operation.OVERWRITE, removed, added, branch=self._branch)._commit()

        _commit_change(self._catalog, name, build)
        reach(Point.STAGED)

    def commit_replacement(
        self,
        rows: Mapping[str, Mapping[int, int]],
        what: str,
        properties: Mapping[str, str] = NO_PROPERTIES,
        published: Mapping[str, Mapping[str, str]] = MappingProxyType({}),
    ) -> None:
        """Commit the replacement, described by `what`; `rows` has, by table and partition, the change of row counts.

        The same commit sets `properties` of Bronze. The publication in a table sets those of `published`, by table.
        After FencedError, the flow has started and nothing was committed. After CommitError or CatalogError the commit
        may have landed.
        """
        tables = {}
        for name in self._names:
            ref = load_table(self._catalog, name).metadata.refs.get(self._branch)
            if ref is None:
                raise FencedError(f"{name}: {FENCED.format(self._exchange.name)}")
            tables[name] = StagedTable(self._branch, ref.snapshot_id, rows.get(name, {}), published.get(name, {}))
        text = _JSON.dump_json(CommittedReplacement(what, tables), ensure_ascii=True).decode()
        self._bronze.commit_properties({STAGED_KEY + self._exchange.name: text, **properties})
        reach(Point.COMMITTED)


def publish(catalog: Catalog, exchange: Exchange) -> str | None:
    """Publish the committed replacement of `exchange` where that is not done yet. Return its description, or None.

    After a CommitError or CatalogError it may be called again.
    """
    key = STAGED_KEY + exchange.name
    properties = load_table(catalog, exchange.bronze).properties
    replacement = committed_replacement(properties, exchange)
    if replacement is None:
        return None
    for name, staged in replacement.tables.items():
        _commit_change(catalog, name, lambda table, staged=staged: _publication(table, exchange, staged))  # type: ignore[misc]
        reach(Point.PUBLISHED)
    text, branch = properties[key], next(iter(replacement.tables.values())).branch
    # The property is set once more, since PyIceberg fails to remove one that another process has just removed.
    properties = {key: text, REPLACED_KEY + exchange.name: branch}
    done = SetPropertiesUpdate(updates=properties), RemovePropertiesUpdate(removals=[key])

    def build(table: Table) -> Changes:
        """End it, unless another process has, and has committed a next replacement, whose fence moved the head."""
        return (done, (same_head(table),)) if table.properties.get(key) == text else ((), ())

    _commit_change(catalog, exchange.bronze, build)
    log.info("%s: %s: published", exchange.name, replacement.what)
    return replacement.what


def abort_replacements(catalog: Catalog, exchange: Exchange, before_epoch: int) -> None:
    """Drop the branches of replacements begun before a writer epoch of Bronze's ledger, and never committed.

    Only the process that has begun this epoch may call it: they cannot be committed any more. Raises CatalogError,
    CommitError.
    """
    own = f"{STAGED_BRANCH}{exchange.name}-"

    def build(table: Table) -> Changes:
        epochs = {name: name.removeprefix(own) for name in table.metadata.refs if name.startswith(own)}
        old = [name for name, epoch in epochs.items() if epoch.isdecimal() and int(epoch) < before_epoch]
        return tuple(update for name in old for update in _drop_branch(table, name)), ()

    for name in exchange.tables:
        _commit_change(catalog, name, build)


def committed_replacement(bronze: Mapping[str, str], exchange: Exchange) -> CommittedReplacement | None:
    """Return the committed, not fully published replacement in Bronze's properties. Raises CommitError if damaged."""
    key = STAGED_KEY + exchange.name
    if (text := bronze.get(key)) is None:
        return None
    try:
        return _JSON.validate_json(text)
    except ValidationError as error:
        raise CommitError(
            f"table property {key} cannot be read ({ledgers.first_error(error)}): restore it from a snapshot"
        ) from error


def _publication(table: Table, exchange: Exchange, staged: StagedTable) -> Changes:
    """Return the commit that replaces on main what `staged` replaces on its branch; nothing if that is done."""
    branch = staged.branch
    ref = table.metadata.refs.get(branch)
    if ref is None:
        return (), ()
    if ref.snapshot_id != staged.head:
        raise CommitError(f"{table.name()[-1]}: another program has moved branch {branch}: restore its head")
    removed, added = _files(table, staged.head)
    ledger = ledgers.read(table.properties, exchange.name, exchange.settings.topic)
    ledger = reconcile(table.name()[-1], table.metadata, exchange.name, ledger).corrected(staged.rows)
    if removed or added:
        ledger = ledger.in_snapshot()
    entry = {ledgers.KEY + exchange.name: ledger.to_json()}
    properties = SetPropertiesUpdate(updates={**ledger.properties(exchange.name), **staged.properties})
    updates: tuple[TableUpdate, ...] = (properties, *_drop_branch(table, branch))
    same_branch = AssertRefSnapshotId.model_validate({"ref": branch, "snapshot-id": staged.head})
    if removed or added:
        copies = {**carried_copies(table.metadata), **entry}
        replacement = RewriteFiles(table, Operation.OVERWRITE, removed, added, copies)
        rewritten, _ = replacement._commit()
        noted = note_replaced(table.metadata, replacement.replaced_partitions())
        updates = (*rewritten, noted, tag_for_readers(table, time.time_ns() // 1_000_000), *updates)
    return updates, (same_branch, same_head(table))


def _files(table: Table, head: int) -> tuple[list[str], list[DataFile]]:
    removed, added = [], []
    snapshot = table.metadata.snapshot_by_id(head)
    for manifest in snapshot.manifests(table.io) if snapshot else []:
        if manifest.added_snapshot_id != head:
            continue
        for entry in manifest.fetch_manifest_entry(table.io, discard_deleted=False):
            if entry.snapshot_id == head and entry.status == ManifestEntryStatus.DELETED:
                removed.append(entry.data_file.file_path)
            elif entry.snapshot_id == head and entry.status == ManifestEntryStatus.ADDED:
                added.append(entry.data_file)
    return removed, added


def _drop_branch(table: Table, branch: str) -> tuple[TableUpdate, ...]:
    """Return the updates that drop a branch, and its head unless main has it too."""
    head = table.metadata.refs[branch].snapshot_id
    dropped = RemoveSnapshotRefUpdate.model_validate({"ref-name": branch})
    if any(snapshot.snapshot_id == head for snapshot in ancestors_of(table.current_snapshot(), table.metadata)):
        return (dropped,)
    return dropped, RemoveSnapshotsUpdate.model_validate({"snapshot-ids": [head]})


def _commit_change(catalog: Catalog, name: str, build: Callable[[Table], Changes]) -> None:
    """Commit a change, however often other commits come first, for RETRY_SECONDS. Raises CommitError, CatalogError."""
    try:
        if not commit_change(catalog, name, build, stop_after_delay(RETRY_SECONDS)):
            raise CommitError(f"{name}: conflicting commits for {RETRY_SECONDS} s: start again")
    except CommitConflictError as error:
        raise CommitError(
            f"{name}: {error}: another program has replaced them since. Let that table's main go back to the snapshot "
            "before it, and start again"
        ) from error
