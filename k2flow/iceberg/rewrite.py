"""Maintenance's own commits: replace files (no row changes), remove files, expire snapshots.

Each asserts the table's head, so it lands only if no other commit has come since the table was read. Otherwise it is
built again on the newer head, if all files that it removes are still in the table. After ATTEMPTS it yields until the
next run. It never touches rows that a flow appends meanwhile.
"""

import logging
from collections.abc import Callable, Collection, Sequence

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update import AssertTableUUID, RemovePropertiesUpdate, SetPropertiesUpdate
from tenacity import stop_after_attempt
from tenacity.stop import stop_base

from k2flow.errors import CommitConflictError
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.changes import note_replaced
from k2flow.iceberg.commit import staged_branch
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.head import carried_copies
from k2flow.iceberg.replace import RewriteFiles, tag_for_readers
from k2flow.iceberg.retry import Changes, commit_once, retry_conflicts
from k2flow.iceberg.snapshots import SnapshotExpiration

log = logging.getLogger(__name__)
ATTEMPTS = 8


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
