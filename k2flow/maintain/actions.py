"""What is due in a table, and what was done: each action with its counts."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime

from pyiceberg.table import Table

from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.commit import staged_branch
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.manifests import data_manifests, has_live_files
from k2flow.iceberg.replace import MERGE_BYTES
from k2flow.iceberg.snapshots import SnapshotExpiration, plan_expiration
from k2flow.iceberg.tables import TARGET_FILE_SIZE, number_property, retention_days
from k2flow.maintain.plans import Compaction, LiveFile, day_text, expired_files, plan_compactions

log = logging.getLogger(__name__)
MANY_MANIFESTS = 32  # from this number of small manifests they are rewritten, even if no data file changes


@dataclass(frozen=True)
class Timing:
    """How long files are kept, in seconds, and a clock (seconds since 1970)."""

    orphan_seconds: float = 3600.0  # younger files may belong to a commit that is about to land
    reader_seconds: float = 3600.0  # how long a query may read a snapshot
    clock: Callable[[], float] = time.time

    def now(self) -> datetime:
        """Return the current time."""
        return datetime.fromtimestamp(self.clock(), UTC)

    def now_ms(self) -> int:
        """Return the current time in ms since 1970."""
        return int(self.clock() * 1000)


@dataclass(frozen=True)
class MaintenanceAction:
    """An action done or due: the files (or snapshots) it removes and adds, with their rows and bytes."""

    table: str
    what: str
    removed: int
    added: int = 0
    rows: int = 0
    bytes: int = 0
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        files = f"{self.removed:,} removed, {self.added:,} added, {self.rows:,} rows, {self.bytes:,} bytes"
        detail = f" ({self.detail})" if self.detail else ""
        return f"{self.table}: {self.what}: {files}, {self.seconds:.2f} s{detail}"


def due_actions(table: Table, files: Sequence[LiveFile], timing: Timing) -> Iterator[MaintenanceAction]:
    """Yield what a run would do now, but for orphan files, which take a listing of the storage. Raises CatalogError."""
    if staged_branch(table):
        return
    if old := expired_by_retention(table, files, timing):
        yield retention_action(table, old)
    for each in due_compactions(table, files, timing):
        yield compaction_action(table, each, 1)
    if merge := manifests_action(table):
        yield merge
    if planned := due_expiration(table, timing):
        yield snapshots_action(table.name()[-1], planned)


def expired_by_retention(table: Table, files: Sequence[LiveFile], timing: Timing) -> list[LiveFile]:
    """Return the files of days that the table no longer keeps."""
    return expired_files(files, retention_days(table), timing.now().date())


def retention_action(table: Table, old: Sequence[LiveFile]) -> MaintenanceAction:
    """Return the action that removes the files `old`."""
    days = sorted({live.day for live in old})
    detail = f"days {day_text(days[0])} to {day_text(days[-1])}, {retention_days(table)} are kept"
    return _file_action(table, "retention", old, 0, detail)


def due_compactions(table: Table, files: Sequence[LiveFile], timing: Timing) -> list[Compaction]:
    """Return the compactions due; none if another engine's delete files apply to the table.

    Candles, whose files are sorted by more than a time, have none either: their flow writes one file for each hour.
    """
    if len(table.sort_order().fields) > 1:
        return []
    if deletes := applied_deletes(table, table.current_snapshot()):
        log.warning("not compacted: %s", deletes_text(table.name()[-1], deletes))
        return []
    old = {live.file.file_path for live in expired_by_retention(table, files, timing)}
    kept = [live for live in files if live.file.file_path not in old]
    return plan_compactions(kept, target_bytes(table), timing.now())


def compaction_action(table: Table, planned: Compaction, added: int) -> MaintenanceAction:
    """Return the action that replaces the files of a compaction by `added` new ones."""
    first = planned.files[0]
    partition = day_text(first.day) if first.hour is None else f"{day_text(first.day)} {first.hour:02d}h"
    return _file_action(table, "compaction", planned.files, added, f"partition {partition}")


def manifests_action(table: Table) -> MaintenanceAction | None:
    """Return the action that rewrites the manifests; None if they are in good order."""
    with catalog_errors():
        manifests = data_manifests(table)
    empty = [manifest for manifest in manifests if not has_live_files(manifest)]
    small = [manifest for manifest in manifests if manifest.manifest_length < MERGE_BYTES]
    if len(small) < MANY_MANIFESTS and not empty:
        return None
    sizes = {manifest.manifest_path: manifest.manifest_length for manifest in (*empty, *small)}
    name, size = table.name()[-1], sum(sizes.values())
    return MaintenanceAction(name, "manifests", len(sizes), bytes=size, detail="ordered by partition")


def due_expiration(table: Table, timing: Timing) -> SnapshotExpiration:
    """Return the snapshots and tags to expire."""
    return plan_expiration(table.metadata, timing.now_ms() - int(timing.reader_seconds * 1000))


def snapshots_action(name: str, planned: SnapshotExpiration) -> MaintenanceAction:
    """Return the action that expires snapshots and tags."""
    tags = f"and {len(planned.tags)} tags of maintenance" if planned.tags else ""
    return MaintenanceAction(name, "snapshots", len(planned.snapshot_ids), detail=tags)


def target_bytes(table: Table) -> int:
    """Return the target size of the table's data files. Raises TableDiffersError."""
    return number_property(table, TARGET_FILE_SIZE)


def _file_action(table: Table, what: str, files: Sequence[LiveFile], added: int, detail: str) -> MaintenanceAction:
    rows = sum(live.file.record_count for live in files)
    size = sum(live.file.file_size_in_bytes for live in files)
    return MaintenanceAction(table.name()[-1], what, len(files), added, rows, size, detail)
