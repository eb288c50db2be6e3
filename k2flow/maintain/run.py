"""One maintenance run over a table: plans what is due, does it unless it is a dry run, and reports it."""

import logging
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import islice

from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation

from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.commit import staged_branch
from k2flow.iceberg.rewrite import expire_snapshots, rewrite_files, set_property
from k2flow.iceberg.tables import TableDefinition
from k2flow.maintain import actions
from k2flow.maintain.actions import MaintenanceAction, Timing
from k2flow.maintain.compacted import KEY, compacted_now, may_advance, read_compacted, recent_files
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.ownership import OtherTables, owned_orphans
from k2flow.maintain.plans import Compaction, LiveFile, live_files, orphan_files
from k2flow.maintain.storage import TableStorage, path_of, reachable_files

log = logging.getLogger(__name__)
THREADS = 2
COMPACTIONS_PER_COMMIT = 16  # the compactions committed so far stay done if the process dies


class MaintenanceRun:
    """All steps on one table, in their order. Raises CatalogError, DataFileError, MaintenanceError.

    A full run reads all manifests of the table, each once, and lists its storage. Its memory is about 2 KB a data file.
    Other runs read what may have changed, and leave orphan files for the next full one.
    """

    def __init__(
        self,
        catalog: Catalog,
        definition: TableDefinition,
        timing: Timing,
        dry_run: bool = False,
        others: OtherTables | None = None,
        full: bool = True,
    ) -> None:
        """Take the table; `others` is shared by the runs of all tables."""
        self._full = full
        self._known: dict[str, list[LiveFile]] = {}  # the files of each manifest
        self._catalog = catalog
        self._others = others or OtherTables(catalog)
        self._definition = definition
        self._name = definition.name
        self._timing = timing
        self._dry_run = dry_run

    def run(self) -> Iterator[MaintenanceAction]:
        """Yield each action once it is done, and log it."""
        if staged := staged_branch(self._table()):
            log.warning(
                "%s: skipped: rows are being replaced, branch %s. If no process does it any more, the next start of "
                "that exchange's flow ends it",
                self._name,
                staged,
            )
            return
        changes = (self._remove_expired, self._compact, self._rewrite_manifests, self._note_compacted)
        steps = (self._due,) if self._dry_run else (*changes, self._expire_snapshots)
        for step in (*steps, *((self._delete_orphans,) if self._full else ())):
            began = time.perf_counter()
            for each in step():
                action = replace(each, seconds=time.perf_counter() - began)
                log.info("%s%s", "would do: " if self._dry_run else "", action)
                yield action
                began = time.perf_counter()

    def _due(self) -> Iterator[MaintenanceAction]:
        table = self._table()
        yield from actions.due_actions(table, self._live_files(table), self._timing)

    def _remove_expired(self) -> Iterator[MaintenanceAction]:
        """Remove whole days by a change of metadata alone."""
        table = self._table()
        old = actions.expired_by_retention(table, self._live_files(table), self._timing)
        if old and self._rewrite(Operation.DELETE, old):
            yield actions.retention_action(table, old)

    def _compact(self) -> Iterator[MaintenanceAction]:
        table = self._table()
        compactor = Compactor(table, self._definition)
        planned = iter(actions.due_compactions(table, self._live_files(table), self._timing))
        with ThreadPoolExecutor(THREADS, "compaction") as pool:
            while some := list(islice(planned, COMPACTIONS_PER_COMMIT)):
                new = list(pool.map(lambda each: compactor.compact(each.files), some))
                yield from self._commit(table, some, new)

    def _commit(
        self, table: Table, done: Sequence[Compaction], new: Sequence[Sequence[DataFile]]
    ) -> Iterator[MaintenanceAction]:
        removed = [live for each in done for live in each.files]
        added = [file for files in new for file in files]
        if self._rewrite(Operation.REPLACE, removed, added):
            for each, files in zip(done, new, strict=True):
                yield actions.compaction_action(table, each, len(files))
        else:  # certainly not committed
            TableStorage(table).delete(path_of(file.file_path) for file in added)

    def _rewrite_manifests(self) -> Iterator[MaintenanceAction]:
        """Leave few manifests, ordered by partition. Remove those that only record removed files: they slow readers."""
        planned = actions.manifests_action(self._table())
        if planned and self._rewrite(Operation.REPLACE):
            yield planned

    def _note_compacted(self) -> Iterator[MaintenanceAction]:
        """Once a day is closed, note how far the table is compacted."""
        table = self._table()
        if may_advance(table, self._timing.now()) and not staged_branch(table):
            compacted, before = compacted_now(table, self._live_files(table), self._timing.now()), read_compacted(table)
            if before is None or compacted.before > before.before:
                set_property(self._catalog, self._name, KEY, compacted.to_json())
        yield from ()

    def _expire_snapshots(self) -> Iterator[MaintenanceAction]:
        done = expire_snapshots(self._catalog, self._name, lambda table: actions.due_expiration(table, self._timing))
        if done:
            yield actions.snapshots_action(self._name, done)

    def _delete_orphans(self) -> Iterator[MaintenanceAction]:
        """Delete orphan files.

        List the files before reading the metadata. A commit in between makes its files reachable. Files that are not
        committed yet are too young.
        """
        storage = TableStorage(self._table())
        if storage.foreign_folders:
            text = "%s: orphan files outside its location are not deleted, since other tables may write to %s too"
            log.warning(text, self._name, ", ".join(storage.foreign_folders))
        listing = storage.listing()
        table = self._table()
        if staged_branch(table):  # begun since: files that are not staged yet may be old
            return
        reachable = reachable_files(table, self._known)
        sizes = dict(orphan_files(listing.files, reachable, self._timing.clock(), self._timing.orphan_seconds))
        orphans = owned_orphans(list(sizes), reachable, table, storage, listing, self._others) if sizes else []
        if not orphans:
            return
        removed = len(orphans) if self._dry_run else storage.delete(orphans)
        yield MaintenanceAction(self._name, "orphan files", removed, bytes=sum(sizes[path] for path in orphans))

    def _rewrite(self, operation: Operation, removed: Sequence[LiveFile] = (), added: Sequence[DataFile] = ()) -> bool:
        paths, days = [live.file.file_path for live in removed], {live.day for live in removed}
        return rewrite_files(self._catalog, self._name, operation, paths, added, self._timing.now_ms(), days)

    def _table(self) -> Table:
        return load_table(self._catalog, self._name)

    def _live_files(self, table: Table) -> list[LiveFile]:
        with catalog_errors():
            column = self._definition.layer.time_column
            if self._full:
                return live_files(table, column, self._known)
            return recent_files(table, column, self._timing.now().date(), self._known)
