"""One pass over a table: what is due is planned, done unless it is a dry run, and told."""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from itertools import islice

from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile, ManifestContent
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation

from k2flow.iceberg import rewrite as commits
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.snapshots import Expiry, expiry
from k2flow.iceberg.tables import RETENTION, TableDefinition
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.entries import LiveFile, data_manifests, live_files
from k2flow.maintain.plans import Compaction, compactions, expired, unreachable
from k2flow.maintain.storage import TableFiles, path_of, reachable

log = logging.getLogger(__name__)

THREADS = 2
TOGETHER = 16
"""Compactions that are committed at once: what is done so far stays done if the process dies."""
MANY_MANIFESTS = 32
"""So many small manifests are written anew even if no data file changes."""


@dataclass(frozen=True)
class Timing:
    """How long things are kept, in seconds, and what time it is (seconds since 1970)."""

    safe_seconds: float = 3600.0
    reader_seconds: float = 3600.0
    clock: Callable[[], float] = time.time

    def now(self) -> datetime:
        return datetime.fromtimestamp(self.clock(), UTC)


@dataclass(frozen=True)
class Action:
    """What was done to a table, or would be: files (or snapshots) that went and came, their rows and bytes."""

    table: str
    what: str
    gone: int
    come: int = 0
    rows: int = 0
    bytes: int = 0
    detail: str = ""
    seconds: float = 0.0

    def __str__(self) -> str:
        parts = [
            f"{self.gone:,} gone",
            f"{self.come:,} come",
            f"{self.rows:,} rows",
            f"{self.bytes:,} bytes",
            f"{self.seconds:.2f} s",
        ]
        return f"{self.table}: {self.what}: {', '.join(parts)}{f' ({self.detail})' if self.detail else ''}"


class Pass:
    """All steps on one table, in their order. Raises CatalogError, MaintenanceError."""

    def __init__(self, catalog: Catalog, definition: TableDefinition, timing: Timing, dry_run: bool = False) -> None:
        self._catalog = catalog
        self._definition = definition
        self._name = definition.name
        self._timing = timing
        self._dry = dry_run

    def run(self) -> Iterator[Action]:
        """Each action as it is done, logged too."""
        if staged := commits.staged_branch(self._table()):
            log.warning(
                "%s: left alone: rows are being replaced, branch %s. If nobody does it any more, the next start of "
                "that exchange's flow ends it",
                self._name,
                staged,
            )
            return
        steps = (self._retain, self._compact, self._merge_manifests, self._expire, self._sweep)
        for step in (self._due, self._sweep) if self._dry else steps:
            began = time.perf_counter()
            for planned in step():
                action = replace(planned, seconds=time.perf_counter() - began)
                log.info("%s%s", "would do: " if self._dry else "", action)
                yield action
                began = time.perf_counter()

    def _due(self) -> Iterator[Action]:
        table = self._table()
        yield from due(table, self._live(table), self._timing)

    def _retain(self) -> Iterator[Action]:
        """Days that are over go whole: a change of metadata alone."""
        table = self._table()
        old = _expired(table, self._live(table), self._timing)
        if old and commits.rewrite(self._catalog, self._name, Operation.DELETE, _paths(old), (), self._ms()):
            yield _retired(table, old)

    def _compact(self) -> Iterator[Action]:
        table = self._table()
        plan = _compactions(table, self._live(table), self._timing)
        compactor = Compactor(table, self._definition)
        waiting = iter(plan)
        with ThreadPoolExecutor(THREADS, "compaction") as pool:
            while some := list(islice(waiting, TOGETHER)):
                new = list(pool.map(lambda one: compactor.compact(one.files), some))
                yield from self._commit(table, some, new)

    def _commit(self, table: Table, done: Sequence[Compaction], new: Sequence[Sequence[DataFile]]) -> Iterator[Action]:
        removed = [path for one in done for path in _paths(one.files)]
        added = [file for files in new for file in files]
        if commits.rewrite(self._catalog, self._name, Operation.REPLACE, removed, added, self._ms()):
            for one, files in zip(done, new, strict=True):
                yield _compacted(table, one, len(files))
        else:  # certainly not committed
            TableFiles(table).delete(path_of(file.file_path) for file in added)

    def _merge_manifests(self) -> Iterator[Action]:
        """Few manifests, ordered by partition; none that tells of gone files alone, for readers read those too."""
        merged = _merged(self._table())
        if merged and commits.rewrite(self._catalog, self._name, Operation.REPLACE, (), (), self._ms()):
            yield merged

    def _expire(self) -> Iterator[Action]:
        dropped = commits.drop(self._catalog, self._name, lambda table: _expiry(table, self._timing))
        if dropped and (dropped.snapshot_ids or dropped.tags):
            yield _dropped(self._name, dropped)

    def _sweep(self) -> Iterator[Action]:
        """Files that nothing reaches. They are listed before the metadata are read: what is committed in between is
        reached by then, and what is not committed yet is too young."""
        files = TableFiles(self._table())
        listed = files.listed()
        old = unreachable(listed, reachable(self._table()), self._timing.clock(), self._timing.safe_seconds)
        if not old:
            return
        paths = [path for path, _ in old]
        gone = len(paths) if self._dry else files.delete(paths)
        yield Action(self._name, "unreachable files", gone, bytes=sum(size for _, size in old))

    def _ms(self) -> int:
        return int(self._timing.clock() * 1000)

    def _table(self) -> Table:
        return load_table(self._catalog, self._name)

    def _live(self, table: Table) -> list[LiveFile]:
        with catalog_errors():
            return live_files(table, self._definition.time_column)


def due(table: Table, files: Sequence[LiveFile], timing: Timing) -> Iterator[Action]:
    """What a pass would do now to a table whose live files are `files`; but for the files that nothing reaches, which
    it takes a listing of the storage to know. Raises CatalogError."""
    if commits.staged_branch(table):
        return
    if old := _expired(table, files, timing):
        yield _retired(table, old)
    for one in _compactions(table, files, timing):
        yield _compacted(table, one, 1)
    if merged := _merged(table):
        yield merged
    dropped = _expiry(table, timing)
    if dropped.snapshot_ids or dropped.tags:
        yield _dropped(table.name()[-1], dropped)


def _expired(table: Table, files: Sequence[LiveFile], timing: Timing) -> list[LiveFile]:
    return expired(files, _retention(table), timing.now().date())


def _retired(table: Table, old: Sequence[LiveFile]) -> Action:
    days = sorted({live.day for live in old})
    return _action(table, "retention", old, detail=f"days {days[0]} to {days[-1]}, {_retention(table)} are kept")


def _compactions(table: Table, files: Sequence[LiveFile], timing: Timing) -> list[Compaction]:
    snapshot = table.current_snapshot()
    with catalog_errors():
        manifests = snapshot.manifests(table.io) if snapshot else []
    if any(manifest.content == ManifestContent.DELETES for manifest in manifests):
        log.warning("%s: not compacted: another engine's delete files apply to it; compact it there", table.name()[-1])
        return []
    over = set(_paths(_expired(table, files, timing)))
    kept = [live for live in files if live.file.file_path not in over]
    return compactions(kept, target_bytes(table), timing.now())


def target_bytes(table: Table) -> int:
    """What size the table's files are to have."""
    return int(table.properties["write.target-file-size-bytes"])


def _compacted(table: Table, one: Compaction, come: int) -> Action:
    return _action(table, "compaction", one.files, come=come, detail=f"partition {_shown(one)}")


def _merged(table: Table) -> Action | None:
    """What comes of the manifests; None where they are fine."""
    with catalog_errors():
        manifests = data_manifests(table)
    empty = [manifest for manifest in manifests if not commits.has_live_files(manifest)]
    small = [manifest for manifest in manifests if manifest.manifest_length < commits.MERGE_BYTES]
    if len(small) < MANY_MANIFESTS and not empty:
        return None
    going = {manifest.manifest_path: manifest.manifest_length for manifest in (*empty, *small)}
    return Action(table.name()[-1], "manifests", len(going), bytes=sum(going.values()), detail="ordered by partition")


def _expiry(table: Table, timing: Timing) -> Expiry:
    return expiry(table.metadata, int(timing.clock() * 1000), int(timing.reader_seconds * 1000))


def _dropped(name: str, dropped: Expiry) -> Action:
    tags = f"and {len(dropped.tags)} tags of maintenance" if dropped.tags else ""
    return Action(name, "snapshots", len(dropped.snapshot_ids), detail=tags)


def _action(table: Table, what: str, files: Sequence[LiveFile], come: int = 0, detail: str = "") -> Action:
    rows = sum(live.file.record_count for live in files)
    size = sum(live.file.file_size_in_bytes for live in files)
    return Action(table.name()[-1], what, len(files), come, rows, size, detail)


def _paths(files: Sequence[LiveFile]) -> list[str]:
    return [live.file.file_path for live in files]


def _retention(table: Table) -> int | None:
    days = table.properties.get(RETENTION)
    return None if days is None else int(days)


def _shown(compaction: Compaction) -> str:
    first = compaction.files[0]
    return f"{first.day}" if first.hour is None else f"{first.day} {first.hour:02d}h"
