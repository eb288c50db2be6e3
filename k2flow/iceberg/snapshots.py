"""The snapshots of a table: its head, and which ones it keeps, by one rule for commits and for maintenance."""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Snapshot
from pyiceberg.table.update import RemoveSnapshotRefUpdate, RemoveSnapshotsUpdate, TableUpdate

KEEP_SNAPSHOTS = 100
_READERS_TAG = re.compile(r"k2flow-readers-(\d+)-\d+")


def head_number(metadata: TableMetadata) -> int:
    """Return the sequence number of main's head; 0 without one."""
    head = metadata.snapshot_by_id(metadata.current_snapshot_id) if metadata.current_snapshot_id is not None else None
    return (head.sequence_number or 0) if head else 0


def history(metadata: TableMetadata) -> Iterator[Snapshot]:
    """Yield the snapshots of main, newest first, as far as they have not expired."""
    by_id = {snapshot.snapshot_id: snapshot for snapshot in metadata.snapshots}
    current = metadata.current_snapshot_id
    while current is not None and (snapshot := by_id.get(current)):
        yield snapshot
        current = snapshot.parent_snapshot_id


def main_lacks(metadata: TableMetadata, number: int) -> bool:
    """Return whether main surely lacks the commit with a sequence number, since it was moved to another snapshot.

    This is sure for an expired commit too, if main has snapshots from before it and after it.
    """
    numbers = {snapshot.sequence_number or 0 for snapshot in history(metadata)}
    return number > head_number(metadata) or (number not in numbers and min(numbers, default=number) < number)


def readers_tag(at_ms: int, snapshot_id: int | None) -> str:
    """Return the name of a tag that keeps a snapshot's replaced files until its readers end."""
    return f"k2flow-readers-{at_ms}-{snapshot_id}"


@dataclass(frozen=True)
class SnapshotExpiration:
    """Snapshots and tags to remove from a table's metadata. Afterwards their files may be orphan files."""

    snapshot_ids: tuple[int, ...] = ()
    tags: tuple[str, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.snapshot_ids or self.tags)

    def updates(self) -> tuple[TableUpdate, ...]:
        """Return the updates that remove them."""
        tags = [RemoveSnapshotRefUpdate.model_validate({"ref-name": tag}) for tag in self.tags]
        ids = {"snapshot-ids": list(self.snapshot_ids)}
        return (*tags, *([RemoveSnapshotsUpdate.model_validate(ids)] if self.snapshot_ids else []))


def plan_expiration(metadata: TableMetadata, tags_before_ms: int = 0) -> SnapshotExpiration:
    """Expire the readers' tags of before a time (ms since 1970; 0: none), then each snapshot that nothing needs.

    The newest KEEP_SNAPSHOTS stay, and the heads of the branches and tags that are left.
    """
    created = {name: match for name in metadata.refs if (match := _READERS_TAG.fullmatch(name))}
    tags = tuple(name for name, match in created.items() if int(match[1]) < tags_before_ms)
    needed = {ref.snapshot_id for name, ref in metadata.refs.items() if name not in tags}
    by_age = sorted(metadata.snapshots, key=lambda snapshot: snapshot.sequence_number or 0)
    ids = tuple(s.snapshot_id for s in by_age[:-KEEP_SNAPSHOTS] if s.snapshot_id not in needed)
    return SnapshotExpiration(ids, tags)
