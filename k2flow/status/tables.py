"""What snapshots and files say of a table: its size, its dead letters, and what maintenance did and would do."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation, Snapshot, Summary

from k2flow.iceberg.ledger import Ledger
from k2flow.maintain.entries import LiveFile
from k2flow.maintain.run import Action
from k2flow.status.flows import rows_of
from k2flow.status.report import DeadLetters, Maintained, Totals


def rows_since(files: Iterable[LiveFile], since_us: int) -> int:
    """About how many rows were written at `since_us` (us since 1970) or later, by the bounds of the files' time.

    Of a file that began before, as compacted ones do, a part in proportion to the time.
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
    """The share of all by the ledgers of both tables, the rest as it was counted."""
    letters, trades = rows_of(dlq), rows_of(silver)
    share = letters / (letters + trades) if letters + trades else None
    most = sorted(reasons.items(), key=lambda each: (-each[1], each[0]))
    return DeadLetters(share, hour_letters, hour_messages, tuple(most), sum(reasons.values()))


def totals(snapshot: Snapshot | None) -> Totals:
    """What a snapshot says of itself; nothing of none."""
    if snapshot is None or snapshot.summary is None:
        return Totals()
    told = snapshot.summary.additional_properties
    rows, files, size = (int(told.get(f"total-{what}", 0)) for what in ("records", "data-files", "files-size"))
    return Totals(rows, files, size, snapshot.timestamp_ms)


def last_maintained(metadata: TableMetadata) -> tuple[Maintained, ...]:
    """Of each step of maintenance the newest snapshot that it made, newest first."""
    found: dict[str, int] = {}
    for snapshot in metadata.snapshots:
        if what := _maintenance(snapshot.summary):
            found[what] = max(snapshot.timestamp_ms, found.get(what, 0))
    return tuple(Maintained(what, at) for what, at in sorted(found.items(), key=lambda each: -each[1]))


def _maintenance(summary: Summary | None) -> str | None:
    """Which step of maintenance has made a snapshot, as `maintain` names it; None if none has."""
    if summary is None or summary.operation not in (Operation.REPLACE, Operation.DELETE):
        return None
    if summary.operation is Operation.DELETE:
        return "retention"
    return "compaction" if int(summary.additional_properties.get("added-data-files", 0)) else "manifests"


def summed(actions: Iterable[Action]) -> tuple[Action, ...]:
    """One action for each thing that is to be done to a table, in order."""
    sums: dict[str, Action] = {}
    for each in actions:
        so_far = sums.get(each.what, Action(each.table, each.what, 0))
        sums[each.what] = replace(
            so_far,
            gone=so_far.gone + each.gone,
            come=so_far.come + each.come,
            rows=so_far.rows + each.rows,
            bytes=so_far.bytes + each.bytes,
        )
    return tuple(sums.values())
