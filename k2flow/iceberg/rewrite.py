"""Maintenance's own commits: replace files (no row changes), remove files, expire snapshots.

Each asserts the table's head, so it lands only if no other commit has come since the table was read. Otherwise it is
built again on the newer head, if all files that it removes are still in the table. After ATTEMPTS it yields until the
next run. It never touches rows that a flow appends meanwhile.
"""

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile, ManifestContent, ManifestEntry, ManifestEntryStatus, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Operation, Summary
from pyiceberg.table.update import AssertTableUUID, RemovePropertiesUpdate, SetPropertiesUpdate, SetSnapshotRefUpdate
from tenacity import stop_after_attempt
from tenacity.stop import stop_base

from k2flow.compat.pyiceberg.private import SnapshotProducer
from k2flow.errors import CommitConflictError
from k2flow.iceberg.append import EmptyTransaction
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.changes import Partition, note_replaced
from k2flow.iceberg.commit import staged_branch
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.head import carried_copies
from k2flow.iceberg.manifests import days_of, has_live_files, partition_values
from k2flow.iceberg.retry import Changes, commit_once, retry_conflicts
from k2flow.iceberg.snapshots import SnapshotExpiration, readers_tag

log = logging.getLogger(__name__)
ATTEMPTS = 8
MANIFEST_ENTRIES = 2_000  # entries of a manifest that maintenance writes: 1 to 2 MB, which no flow merges again
MERGE_BYTES = 1 << 19  # smaller manifests are merged with the others of the commit


class ManifestChanges(NamedTuple):
    """The head's manifests that stay, the entries that move to new manifests, and those that are deleted."""

    unchanged: list[ManifestFile]
    moved: list[ManifestEntry]
    deleted: list[ManifestEntry]


class RewriteFiles(SnapshotProducer["RewriteFiles"]):
    """A snapshot without the files `removed` (by path) and with the files `added`.

    It rewrites the manifests that name a removed file, and all small ones, ordered by partition. So readers of an hour
    find its files in few manifests.

    A replace changes no row. So an added file keeps the greatest data sequence number of the removed files of its
    partition, as Spark's `use-starting-sequence-number` does: see k2flow.iceberg.changes.
    """

    def __init__(
        self,
        table: Table,
        operation: Operation,
        removed: Collection[str],
        added: Sequence[DataFile],
        properties: Mapping[str, str] = MappingProxyType({}),
        branch: str = MAIN_BRANCH,
        days: Collection[int] | None = None,
    ) -> None:
        """Take what to replace; `properties` go into the snapshot's summary.

        `days` (since 1970) are those of the removed files, if known: large manifests of other days stay unread.
        """
        super().__init__(
            operation, EmptyTransaction(table), table.io, snapshot_properties=dict(properties), branch=branch
        )
        self._removed = set(removed)
        self._days = days
        self._rewritten = tuple(added) if operation == Operation.REPLACE else ()
        for file in () if self._rewritten else added:
            self.append_data_file(file)

    def replaced_partitions(self) -> set[Partition]:
        """Return the partitions in which rows are removed, or replaced by others."""
        files = [*(entry.data_file for entry in self._changes.deleted), *self._added_data_files]
        return {partition_values(file) for file in files}

    @cached_property
    def _changes(self) -> ManifestChanges:
        """The changes to the head's manifests. Raises CommitConflictError if a removed file is not in the table."""
        found = ManifestChanges([], [], [])
        snapshot = self._transaction.table_metadata.snapshot_by_name(self._target_branch)
        missing = set(self._removed)
        for manifest in snapshot.manifests(self._io) if snapshot else []:
            if manifest.content != ManifestContent.DATA:
                found.unchanged.append(manifest)
                continue
            if not has_live_files(manifest):
                continue
            if manifest.manifest_length >= MERGE_BYTES and not (missing and self._may_name_removed(manifest)):
                found.unchanged.append(manifest)
                continue
            entries = manifest.fetch_manifest_entry(self._io)
            deleted = [entry for entry in entries if entry.data_file.file_path in missing]
            if not deleted and manifest.manifest_length >= MERGE_BYTES:
                found.unchanged.append(manifest)
                continue
            paths = {entry.data_file.file_path for entry in deleted}
            missing -= paths
            found.deleted.extend(deleted)
            found.moved.extend(entry for entry in entries if entry.data_file.file_path not in paths)
        if missing:
            first = min(missing)
            raise CommitConflictError(f"{len(missing)} of the files are no longer in the table, {first} among them")
        found.moved.sort(key=lambda entry: partition_values(entry.data_file))
        return found

    def _may_name_removed(self, manifest: ManifestFile) -> bool:
        covered = days_of(manifest)
        return self._days is None or not covered or any(day in covered for day in self._days)

    def _deleted_entries(self) -> list[ManifestEntry]:
        for entry in self._changes.deleted:
            self.delete_data_file(entry.data_file)
        return [self._with_status(entry, ManifestEntryStatus.DELETED) for entry in self._changes.deleted]

    def _existing_manifests(self) -> list[ManifestFile]:
        manifests = [*self._changes.unchanged, *self._rewritten_manifests()]
        moved = iter(self._changes.moved)
        while entries := list(islice(moved, MANIFEST_ENTRIES)):
            with self.new_manifest_writer(self._transaction.table_metadata.spec()) as writer:
                for entry in entries:
                    writer.add_entry(self._with_status(entry, ManifestEntryStatus.EXISTING))
            manifests = [*manifests, writer.to_manifest_file()]
        return manifests

    def _rewritten_manifests(self) -> list[ManifestFile]:
        if not self._rewritten:
            return []
        newest: dict[Partition, int] = {}
        for entry in self._changes.deleted:
            partition = partition_values(entry.data_file)
            newest[partition] = max(newest.get(partition, 0), entry.sequence_number or 0)
        with self.new_manifest_writer(self._transaction.table_metadata.spec()) as writer:
            for file in self._rewritten:
                writer.add_entry(
                    ManifestEntry.from_args(
                        status=ManifestEntryStatus.ADDED,
                        snapshot_id=self._snapshot_id,
                        sequence_number=newest[partition_values(file)],
                        file_sequence_number=None,  # readers take it from the manifest
                        data_file=file,
                    )
                )
        return [writer.to_manifest_file()]

    def _with_status(self, entry: ManifestEntry, status: ManifestEntryStatus) -> ManifestEntry:
        return ManifestEntry.from_args(
            status=status,
            snapshot_id=self._snapshot_id if status == ManifestEntryStatus.DELETED else entry.snapshot_id,
            sequence_number=entry.sequence_number,
            file_sequence_number=entry.file_sequence_number,
            data_file=entry.data_file,
        )

    def _build_delete_files_partition_predicate(self) -> None:
        """Do nothing: `_changes` finds the files by their paths."""

    def _summary(self, snapshot_properties: dict[str, str] | None = None) -> Summary:
        """Count as for an overwrite: PyIceberg 0.12 does not count for a replace, whose counts are the same."""
        operation, self._operation = self._operation, Operation.OVERWRITE
        added, self._added_data_files = self._added_data_files, [*self._added_data_files, *self._rewritten]
        counted = super()._summary(snapshot_properties or {})
        self._operation, self._added_data_files = operation, added
        return Summary(operation, **counted.additional_properties)


def rewrite_files(
    catalog: Catalog,
    name: str,
    operation: Operation,
    removed: Collection[str],
    added: Sequence[DataFile],
    at_ms: int,
    days: Collection[int] | None = None,
) -> bool:
    """Commit a RewriteFiles, and a tag of time `at_ms` for the readers of the snapshot before it. `days` are as there.

    Return False after yielding to other commits: the table shows that nothing was committed. Raises CatalogError if the
    catalog failed. Then the commit may have landed.
    """
    attempts: list[RewriteFiles] = []

    def landed(table: Table) -> bool:
        return any(table.metadata.snapshot_by_id(attempt.snapshot_id) for attempt in attempts)

    def build(table: Table) -> Changes:
        if landed(table):  # although the catalog has refused it, see commit_once
            return (), ()
        if staged := staged_branch(table):
            raise CommitConflictError(f"rows are being replaced, branch {staged}")
        if added and (deletes := applied_deletes(table, table.current_snapshot(), removed)):
            raise CommitConflictError(deletes_text(name, deletes))  # the new files would bring the rows back
        copies = carried_copies(table.metadata)
        attempts.append(RewriteFiles(table, operation, removed, added, copies, days=days))
        updates, requirements = attempts[-1]._commit()
        if operation != Operation.REPLACE:
            updates = (*updates, note_replaced(table.metadata, attempts[-1].replaced_partitions()))
        return (*updates, tag_for_readers(table, at_ms)), requirements

    try:
        committed = commit_change(catalog, name, build)
    except CommitConflictError as error:
        log.info("%s: yields: %s", name, error)
        committed = False
    committed = committed or landed(load_table(catalog, name))
    for attempt in attempts[:-1] if committed else attempts:
        attempt._clean_all_uncommitted()
    return committed


def tag_for_readers(table: Table, at_ms: int) -> SetSnapshotRefUpdate:
    """Return the update that tags the head, some of whose files are about to be removed, for its readers."""
    head = table.metadata.current_snapshot_id
    return SetSnapshotRefUpdate.model_validate(
        {"ref-name": readers_tag(at_ms, head), "type": SnapshotRefType.TAG, "snapshot-id": head}
    )


def expire_snapshots(
    catalog: Catalog, name: str, plan: Callable[[Table], SnapshotExpiration]
) -> SnapshotExpiration | None:
    """Expire what `plan` returns for the table as it is. Return it, or None after yielding to other commits."""
    planned = SnapshotExpiration()

    def build(table: Table) -> Changes:
        nonlocal planned
        planned = plan(table)
        return planned.updates(), ()

    return planned if commit_change(catalog, name, build) else None


def set_property(catalog: Catalog, name: str, key: str, value: str | None) -> bool:
    """Set a table property, or remove it. Return False after yielding to other commits."""
    update = RemovePropertiesUpdate(removals=[key]) if value is None else SetPropertiesUpdate(updates={key: value})
    return commit_change(catalog, name, lambda table: ((update,), ()))


def commit_change(
    catalog: Catalog,
    name: str,
    build: Callable[[Table], Changes],
    stop: stop_base = stop_after_attempt(ATTEMPTS),  # noqa: B008 - it keeps no state
) -> bool:
    """Commit the changes that `build` returns for the table as it is; build them again after a conflict.

    Without updates nothing is committed. Return False after yielding to other commits, which `stop` decides. Raises
    CatalogError if the catalog failed. Then the commit may have landed.
    """

    def attempt() -> None:
        table = load_table(catalog, name)
        updates, requirements = build(table)
        if updates:
            commit_once(table, (updates, (AssertTableUUID(uuid=table.metadata.table_uuid), *requirements)))

    try:
        with catalog_errors():
            retry_conflicts(attempt, stop)
    except CommitFailedException as error:
        log.info("%s: yields to other commits: %s", name, error)
        return False
    return True
