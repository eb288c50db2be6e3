"""The status of a table from its snapshots and files: size, dead letters, maintenance done and due."""

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date

from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation, Snapshot, Summary

from k2flow.errors import TableDiffersError
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors
from k2flow.iceberg.ledger import Ledger
from k2flow.maintain.actions import MaintenanceAction
from k2flow.maintain.compacted import recent_files
from k2flow.maintain.plans import LiveFile
from k2flow.status.flows import rows_of
from k2flow.status.model import DeadLetters, MaintenanceDone, MaintenanceDue, TableTotals


def files_of(
    table: Table, time_column: str, today: date, known: dict[str, list[LiveFile]] | None = None
) -> list[LiveFile]:
    """Return a table's `recent_files`. Raises CatalogError, and TableDiffersError if it has no `time_column`."""
    with column_errors(table):
        return recent_files(table, time_column, today, known)


@contextmanager
def column_errors(table: Table) -> Iterator[None]:
    """Raise CatalogError for errors of the storage, and TableDiffersError if the table lacks a column."""
    with catalog_errors():
        try:
            yield
        except ValueError as error:  # PyIceberg's error for a missing column
            raise TableDiffersError(
                f"{NAMESPACE}.{table.name()[-1]} lacks a column ({error}): `k2flow tables create` names the difference"
            ) from error


def rows_since(files: Iterable[LiveFile], since_us: int) -> int:
    """Estimate the rows written at `since_us` (us since 1970) or later, from the time bounds of the files.

    A file that begins before, as compacted ones do, counts in proportion to its time.
    """
    rows = 0.0
    for live in files:
        if live.lower is None or live.upper is None or live.upper < since_us:
            continue
        whole = live.lower >= since_us
        rows += live.file.record_count * (1.0 if whole else (live.upper - since_us) / (live.upper - live.lower))
    return round(rows)


def dead_letters(
    dlq: Ledger, silver: Ledger, hour_letters: int, hour_messages: int, reasons: Mapping[str, int]
) -> DeadLetters:
    """Return the dead letters of an exchange; their share of all messages comes from the ledgers of both tables."""
    letters, trades = rows_of(dlq), rows_of(silver)
    return DeadLetters(
        share=letters / (letters + trades) if letters + trades else None,
        hour_share=min(1.0, hour_letters / hour_messages) if hour_messages else None,
        hour_letters=hour_letters,
        hour_messages=hour_messages,
        reasons=dict(sorted(reasons.items(), key=lambda each: (-each[1], each[0]))),
        letters_read=sum(reasons.values()),
    )


def totals(snapshot: Snapshot | None, deletes: int = 0) -> TableTotals:
    """Return the totals in the summary of a snapshot with `deletes` delete files; zeros without one."""
    if snapshot is None or snapshot.summary is None:
        return TableTotals()
    summary = snapshot.summary.additional_properties
    rows, files, size = (int(summary.get(f"total-{what}", 0)) for what in ("records", "data-files", "files-size"))
    return TableTotals(rows, files, size, snapshot.timestamp_ms, deletes)


def maintenance_done(metadata: TableMetadata) -> tuple[MaintenanceDone, ...]:
    """Return the newest snapshot of each kind of maintenance, newest first."""
    found: dict[str, int] = {}
    for snapshot in metadata.snapshots:
        if what := _maintenance(snapshot.summary):
            found[what] = max(snapshot.timestamp_ms, found.get(what, 0))
    return tuple(MaintenanceDone(what, at) for what, at in sorted(found.items(), key=lambda each: -each[1]))


def _maintenance(summary: Summary | None) -> str | None:
    """Return the kind of maintenance that committed a snapshot, as `maintain` names it; None for other snapshots."""
    if summary is None or summary.operation not in (Operation.REPLACE, Operation.DELETE):
        return None
    if summary.operation is Operation.DELETE:
        return "retention"
    return "compaction" if int(summary.additional_properties.get("added-data-files", 0)) else "manifests"


def maintenance_due(actions: Iterable[MaintenanceAction]) -> tuple[MaintenanceDue, ...]:
    """Sum the actions on a table by kind, in order."""
    sums: dict[str, MaintenanceDue] = {}
    for each in actions:
        so_far = sums.get(each.what, MaintenanceDue(each.what, 0, 0))
        sums[each.what] = MaintenanceDue(each.what, so_far.removed + each.removed, so_far.added + each.added)
    return tuple(sums.values())
