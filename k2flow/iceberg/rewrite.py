"""Maintenance's own commits: files replaced (no row changes), files deleted, snapshots dropped.

Each asserts the table's head, so it lands only if no other commit has come since the table was read. Then it is made
anew upon the newer head, if all files that it removes are still there; after ATTEMPTS it is given up until the next
pass. Rows that a flow appends meanwhile are never touched.
"""

import logging
import random
import time
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
from pyiceberg.table.update import (
    AssertTableUUID,
    RemovePropertiesUpdate,
    RemoveSnapshotRefUpdate,
    RemoveSnapshotsUpdate,
    SetPropertiesUpdate,
    SetSnapshotRefUpdate,
    TableRequirement,
    TableUpdate,
)
from pyiceberg.table.update.snapshot import _SnapshotProducer

from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.commit import STAGED_BRANCH, Unstaged
from k2flow.iceberg.snapshots import Expiry, readers_tag

log = logging.getLogger(__name__)

ATTEMPTS = 8
MANIFEST_ENTRIES = 2_000
"""Of a manifest that maintenance writes: 1 to 2 MB, which no flow merges again."""
MERGE_BYTES = 1 << 19
"""Manifests that are smaller are made one with the others of the commit's days."""

Change = tuple[tuple[TableUpdate, ...], tuple[TableRequirement, ...]]


class CommitConflictError(Exception):
    """The table is no longer as a change needs it: others were first, or have staged a change of their own."""


class Touched(NamedTuple):
    """What a rewrite makes of the head's manifests: those that stay, the entries that move, and those that go."""

    stay: list[ManifestFile]
    move: list[ManifestEntry]
    go: list[ManifestEntry]


def has_live_files(manifest: ManifestFile) -> bool:
    """False for a manifest that only tells what a former commit has removed."""
    return manifest.has_added_files() or manifest.has_existing_files()


def staged_branch(table: Table) -> str | None:
    """The branch of rows that are being replaced, if there is one: no file may go meanwhile."""
    return next((name for name in table.metadata.refs if name.startswith(STAGED_BRANCH)), None)


class Rewrite(_SnapshotProducer["Rewrite"]):
    """A snapshot in which `removed` files (by path) are gone and `added` have come.

    The manifests that named a removed one, and all small ones, are written anew, ordered by partition, so that readers
    of an hour find its files in few of them.
    """

    def __init__(
        self,
        table: Table,
        operation: Operation,
        removed: Collection[str],
        added: Sequence[DataFile],
        properties: Mapping[str, str] = MappingProxyType({}),
        branch: str = MAIN_BRANCH,
    ) -> None:
        """`properties` go into the snapshot's summary."""
        super().__init__(operation, Unstaged(table), table.io, snapshot_properties=dict(properties), branch=branch)
        self._removed = set(removed)
        for file in added:
            self.append_data_file(file)

    @cached_property
    def _touched(self) -> Touched:
        """Raises CommitConflictError."""
        found = Touched([], [], [])
        snapshot = self._transaction.table_metadata.snapshot_by_name(self._target_branch)
        missing = set(self._removed)
        for manifest in snapshot.manifests(self._io) if snapshot else []:
            if manifest.content != ManifestContent.DATA:
                found.stay.append(manifest)
                continue
            if not has_live_files(manifest):
                continue
            entries = manifest.fetch_manifest_entry(self._io)
            going = [entry for entry in entries if entry.data_file.file_path in missing]
            if not going and manifest.manifest_length >= MERGE_BYTES:
                found.stay.append(manifest)
                continue
            paths = {entry.data_file.file_path for entry in going}
            missing -= paths
            found.go.extend(going)
            found.move.extend(entry for entry in entries if entry.data_file.file_path not in paths)
        if missing:
            raise CommitConflictError(
                f"{len(missing)} of the files are no longer in the table, {min(missing)} among them"
            )
        found.move.sort(key=lambda entry: [entry.data_file.partition[i] for i in range(len(entry.data_file.partition))])
        return found

    def _deleted_entries(self) -> list[ManifestEntry]:
        for entry in self._touched.go:
            self.delete_data_file(entry.data_file)
        return [self._with_status(entry, ManifestEntryStatus.DELETED) for entry in self._touched.go]

    def _existing_manifests(self) -> list[ManifestFile]:
        manifests = self._touched.stay
        moving = iter(self._touched.move)
        while entries := list(islice(moving, MANIFEST_ENTRIES)):
            with self.new_manifest_writer(self._transaction.table_metadata.spec()) as writer:
                for entry in entries:
                    writer.add_entry(self._with_status(entry, ManifestEntryStatus.EXISTING))
            manifests = [*manifests, writer.to_manifest_file()]
        return manifests

    def _with_status(self, entry: ManifestEntry, status: ManifestEntryStatus) -> ManifestEntry:
        return ManifestEntry.from_args(
            status=status,
            snapshot_id=self._snapshot_id if status == ManifestEntryStatus.DELETED else entry.snapshot_id,
            sequence_number=entry.sequence_number,
            file_sequence_number=entry.file_sequence_number,
            data_file=entry.data_file,
        )

    def _build_delete_files_partition_predicate(self) -> None:
        """Nothing: `_touched` looks for the files by their paths."""

    def _summary(self, snapshot_properties: dict[str, str] | None = None) -> Summary:
        """PyIceberg 0.12 counts for an overwrite but not for a replace, whose counts are the same."""
        operation, self._operation = self._operation, Operation.OVERWRITE
        try:
            counted = super()._summary(snapshot_properties or {})
        finally:
            self._operation = operation
        return Summary(operation, **counted.additional_properties)


def rewrite(
    catalog: Catalog,
    name: str,
    operation: Operation,
    removed: Collection[str],
    added: Sequence[DataFile],
    at_ms: int,
) -> bool:
    """Commits a Rewrite, and a tag of time `at_ms` for those who read the snapshot before it. False: it was given up.

    Raises CatalogError; then it may have landed.
    """
    made: list[Rewrite] = []

    def change(table: Table) -> Change:
        if made:  # certainly not committed
            made.pop()._clean_all_uncommitted()
        if staged := staged_branch(table):
            raise CommitConflictError(f"rows are being replaced, branch {staged}")
        producer = Rewrite(table, operation, removed, added)
        made.append(producer)
        updates, requirements = producer._commit()
        return (*updates, keep_for_readers(table, at_ms)), requirements

    try:
        landed = apply(catalog, name, change)
    except CommitConflictError as gone:
        log.info("%s: stepped back: %s", name, gone)
        landed = False
    if not landed and made:
        made.pop()._clean_all_uncommitted()
    return landed


def keep_for_readers(table: Table, at_ms: int) -> SetSnapshotRefUpdate:
    """Tags the head, some of whose files are about to go, for those who read it."""
    head = table.metadata.current_snapshot_id
    return SetSnapshotRefUpdate.model_validate(
        {"ref-name": readers_tag(at_ms, head), "type": SnapshotRefType.TAG, "snapshot-id": head}
    )


def drop(catalog: Catalog, name: str, plan: Callable[[Table], Expiry]) -> Expiry | None:
    """Drops the snapshots and tags that `plan` names of the table as it is; None where it was given up."""
    dropped = Expiry((), ())

    def change(table: Table) -> Change:
        nonlocal dropped
        dropped = plan(table)
        updates: list[TableUpdate] = [RemoveSnapshotRefUpdate.model_validate({"ref-name": tag}) for tag in dropped.tags]
        if dropped.snapshot_ids:
            updates.append(RemoveSnapshotsUpdate.model_validate({"snapshot-ids": list(dropped.snapshot_ids)}))
        return tuple(updates), ()

    return dropped if apply(catalog, name, change) else None


def set_property(catalog: Catalog, name: str, key: str, value: str | None) -> bool:
    """Sets a table property, or removes it; False where it was given up."""
    update = RemovePropertiesUpdate(removals=[key]) if value is None else SetPropertiesUpdate(updates={key: value})
    return apply(catalog, name, lambda table: ((update,), ()))


def apply(catalog: Catalog, name: str, change: Callable[[Table], Change]) -> bool:
    """Makes `change` of the table as it is, and anew where another commit came first. Raises CatalogError."""
    for attempt in range(ATTEMPTS):
        table = load_table(catalog, name)
        with catalog_errors():
            updates, requirements = change(table)
            if not updates:
                return True
            try:
                table._do_commit(updates, (AssertTableUUID(uuid=table.metadata.table_uuid), *requirements))
                return True
            except CommitFailedException:
                log.debug("%s: another commit came first", name)
            except ValueError as error:  # PyIceberg's word for a snapshot or tag that is no longer there
                log.debug("%s: the table has changed: %s", name, error)
        time.sleep(random.uniform(0, 0.05 * 2 ** min(attempt, 4)))
    log.info("%s: stepped back after %d attempts: others commit all the time", name, ATTEMPTS)
    return False
