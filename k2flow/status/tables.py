"""The status of a table from its snapshots and files: size, dead letters, maintenance done and due."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation, Snapshot, Summary

from k2flow.iceberg.ledger import Ledger
from k2flow.maintain.actions import MaintenanceAction
from k2flow.maintain.entries import LiveFile
from k2flow.status.flows import rows_of
from k2flow.status.model import DeadLetters, MaintenanceStep, TableTotals


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
    share = letters / (letters + trades) if letters + trades else None
    most = sorted(reasons.items(), key=lambda each: (-each[1], each[0]))
    return DeadLetters(
        share=share,
        hour_letters=hour_letters,
        hour_messages=hour_messages,
        reasons=tuple(most),
        letters_read=sum(reasons.values()),
    )


def totals(snapshot: Snapshot | None) -> TableTotals:
    """Return the totals in a snapshot's summary; zeros without one."""
    if snapshot is None or snapshot.summary is None:
        return TableTotals()
    summary = snapshot.summary.additional_properties
    rows, files, size = (int(summary.get(f"total-{what}", 0)) for what in ("records", "data-files", "files-size"))
    return TableTotals(rows, files, size, snapshot.timestamp_ms)


def last_maintained(metadata: TableMetadata) -> tuple[MaintenanceStep, ...]:
    """Return the newest snapshot of each step of maintenance, newest first."""
    found: dict[str, int] = {}
    for snapshot in metadata.snapshots:
        if what := _maintenance_step(snapshot.summary):
            found[what] = max(snapshot.timestamp_ms, found.get(what, 0))
    return tuple(MaintenanceStep(what, at) for what, at in sorted(found.items(), key=lambda each: -each[1]))


def _maintenance_step(summary: Summary | None) -> str | None:
    """Return the step of maintenance that committed a snapshot, as `maintain` names it; None for other snapshots."""
    if summary is None or summary.operation not in (Operation.REPLACE, Operation.DELETE):
        return None
    if summary.operation is Operation.DELETE:
        return "retention"
    return "compaction" if int(summary.additional_properties.get("added-data-files", 0)) else "manifests"


def sum_actions(actions: Iterable[MaintenanceAction]) -> tuple[MaintenanceAction, ...]:
    """Sum the actions on a table by what they do, in order."""
    sums: dict[str, MaintenanceAction] = {}
    for each in actions:
        so_far = sums.get(each.what, MaintenanceAction(each.table, each.what, 0))
        sums[each.what] = replace(
            so_far,
            removed=so_far.removed + each.removed,
            added=so_far.added + each.added,
            rows=so_far.rows + each.rows,
            bytes=so_far.bytes + each.bytes,
        )
    return tuple(sums.values())
