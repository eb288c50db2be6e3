"""Builds snapshots that take files out of a table, and may put others in their place."""

from collections.abc import Collection, Mapping, Sequence
from functools import cached_property
from itertools import islice
from types import MappingProxyType
from typing import NamedTuple

from pyiceberg.manifest import DataFile, ManifestContent, ManifestEntry, ManifestEntryStatus, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH, SnapshotRefType
from pyiceberg.table.snapshots import Operation, Summary
from pyiceberg.table.update import SetSnapshotRefUpdate

from k2flow.compat.pyiceberg.private import SnapshotProducer
from k2flow.errors import CommitConflictError
from k2flow.iceberg.append import EmptyTransaction
from k2flow.iceberg.changes import Partition
from k2flow.iceberg.manifests import days_of, has_live_files, partition_values
from k2flow.iceberg.snapshots import readers_tag

MANIFEST_ENTRIES = 2_000  # entries of a manifest that maintenance writes: 0.6 to 2 MB, which no flow merges again
MERGE_BYTES = 3 << 17  # smaller manifests are merged with the others of the commit
COMMIT_ENTRIES = 48
"""Entries of a manifest that a flow's commit writes: it writes those again beside the ones that change."""


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
        manifest_entries: int | None = None,
    ) -> None:
        """Take what to replace; `properties` go into the snapshot's summary.

        `days` (since 1970) are those of the removed files, if known: large manifests of other days stay unread. New
        manifests have `manifest_entries` at most, and one with half of them is large. By default it is
        MANIFEST_ENTRIES, and a manifest is large from MERGE_BYTES on.
        """
        super().__init__(
            operation, EmptyTransaction(table), table.io, snapshot_properties=dict(properties), branch=branch
        )
        self._removed = set(removed)
        self._days = days
        self._manifest_entries = manifest_entries
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
            large = self._is_large(manifest)
            if large and not (missing and self._may_name_removed(manifest)):
                found.unchanged.append(manifest)
                continue
            entries = manifest.fetch_manifest_entry(self._io)
            deleted = [entry for entry in entries if entry.data_file.file_path in missing]
            if large and not deleted:
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

    def _is_large(self, manifest: ManifestFile) -> bool:
        if self._manifest_entries is None:
            return manifest.manifest_length >= MERGE_BYTES
        return (manifest.added_files_count or 0) + (manifest.existing_files_count or 0) >= self._manifest_entries // 2

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
        while entries := list(islice(moved, self._manifest_entries or MANIFEST_ENTRIES)):
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


def tag_for_readers(table: Table, at_ms: int) -> SetSnapshotRefUpdate:
    """Return the update that tags the head, some of whose files are about to be removed, for its readers."""
    head = table.metadata.current_snapshot_id
    return SetSnapshotRefUpdate.model_validate(
        {"ref-name": readers_tag(at_ms, head), "type": SnapshotRefType.TAG, "snapshot-id": head}
    )
