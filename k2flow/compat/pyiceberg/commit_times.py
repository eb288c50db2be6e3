"""The times in a table's metadata never go back, whatever the clocks of those who commit.

Java's readers refuse a table whose snapshot log, metadata log or last update goes back by more than a minute
(`TableMetadata` of iceberg-core). PyIceberg takes the host's time for each of them. With these functions each commit is
later than the table's last time, by a millisecond if need be. A log that another program has let go back is put right.
REST catalogs write the metadata themselves; there only the time of a snapshot is ours.
"""

from typing import TypeVar

import pyiceberg.catalog
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import MetadataLogEntry, SnapshotLogEntry
from pyiceberg.table.update import AddSnapshotUpdate, TableUpdate, update_table_metadata

TOLERANCE_MS = 60_000  # of Java's readers
Entry = TypeVar("Entry", SnapshotLogEntry, MetadataLogEntry)


def install_commit_times() -> None:
    """Keep the times in order in what PyIceberg commits itself, for this whole process: all catalogs but REST."""
    pyiceberg.catalog.update_table_metadata = _update_in_order  # type: ignore[attr-defined]


def last_time_ms(metadata: TableMetadata) -> int:
    """Return the latest time in the metadata of a table, in ms since 1970."""
    times = [metadata.last_updated_ms]
    times += [entry.timestamp_ms for entry in metadata.snapshot_log]
    times += [entry.timestamp_ms for entry in metadata.metadata_log]
    times += [snapshot.timestamp_ms for snapshot in metadata.snapshots]
    return max(times)


def in_order(updates: tuple[TableUpdate, ...], metadata: TableMetadata) -> tuple[TableUpdate, ...]:
    """Return the updates of a commit, each new snapshot later than the table that they are applied to."""
    earliest = last_time_ms(metadata) + 1
    return tuple(
        AddSnapshotUpdate(snapshot=update.snapshot.model_copy(update={"timestamp_ms": earliest}))
        if isinstance(update, AddSnapshotUpdate) and update.snapshot.timestamp_ms < earliest
        else update
        for update in updates
    )


def _update_in_order(
    base_metadata: TableMetadata,
    updates: tuple[TableUpdate, ...],
    enforce_validation: bool = False,
    metadata_location: str | None = None,
) -> TableMetadata:
    earliest = last_time_ms(base_metadata) + 1
    ordered = in_order(updates, base_metadata)
    after = update_table_metadata(base_metadata, ordered, enforce_validation, metadata_location)
    if after.last_updated_ms == base_metadata.last_updated_ms:  # nothing is changed
        return after
    known = {(entry.snapshot_id, entry.timestamp_ms) for entry in base_metadata.snapshot_log}
    log = [
        entry if (entry.snapshot_id, entry.timestamp_ms) in known else _not_before(entry, earliest)
        for entry in after.snapshot_log
    ]
    times = {
        "snapshot_log": _ascending(log),
        "metadata_log": _ascending(after.metadata_log),
        "last_updated_ms": max(after.last_updated_ms, earliest),
    }
    return after.model_copy(update=times)


def _ascending(log: list[Entry]) -> list[Entry]:
    """Return a log with each entry that goes back beyond the tolerance at the time of the one before it."""
    ordered: list[Entry] = []
    for entry in log:
        last_ms = ordered[-1].timestamp_ms if ordered else entry.timestamp_ms
        ordered.append(_not_before(entry, last_ms) if entry.timestamp_ms < last_ms - TOLERANCE_MS else entry)
    return ordered


def _not_before(entry: Entry, time_ms: int) -> Entry:
    return entry if entry.timestamp_ms >= time_ms else entry.model_copy(update={"timestamp_ms": time_ms})
