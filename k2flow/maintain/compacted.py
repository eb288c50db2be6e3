"""How far compaction has come, in a table property: the files of older days need not be looked at again.

A table of years has many manifests, and few of them name a file that maintenance may have to change. The property says
up to which day all partitions were compacted, and in which snapshot. What was written to an older day since then shows
by its sequence number. Without the property, or if another target size or an older head makes it useless, all manifests
are read.

One thing does not show: main was moved back to a snapshot before a compaction, and others have committed since. Each
full run of maintenance reads all manifests, and so finds what is due then.
"""

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date, datetime

from pydantic import TypeAdapter, ValidationError
from pyiceberg.manifest import ManifestFile
from pyiceberg.table import Table

from k2flow.iceberg.ledger import first_error
from k2flow.iceberg.manifests import data_manifests, days_of
from k2flow.iceberg.snapshots import head_number, main_lacks
from k2flow.iceberg.tables import TARGET_FILE_SIZE, number_property, retention_days
from k2flow.maintain.plans import (
    HOUR_SECONDS,
    OPEN_HOURS,
    LiveFile,
    days_since_1970,
    files_in,
    first_kept,
    forget_others,
    live_files,
    plan_compactions,
)

log = logging.getLogger(__name__)
KEY = "k2flow.compacted"


@dataclass(frozen=True)
class Compacted:
    """In the snapshot with `sequence_number`, no partition of a day (since 1970) before `before` had files to merge."""

    before: int
    sequence_number: int
    target_bytes: int

    def to_json(self) -> str:
        """Return the property's value."""
        return _JSON.dump_json(self).decode()


_JSON: TypeAdapter[Compacted] = TypeAdapter(Compacted)


def read_compacted(table: Table) -> Compacted | None:
    """Return how far the table is compacted; None if that is not known."""
    if (text := table.properties.get(KEY)) is None:
        return None
    try:
        compacted = _JSON.validate_json(text)
    except ValidationError as error:
        log.warning("%s: property %s is ignored (%s)", table.name()[-1], KEY, first_error(error))
        return None
    same_target = compacted.target_bytes == number_property(table, TARGET_FILE_SIZE)
    return None if not same_target or main_lacks(table.metadata, compacted.sequence_number) else compacted


def compacted_now(table: Table, files: Iterable[LiveFile], now: datetime) -> Compacted:
    """Return how far the table is compacted, by its `recent_files`, or all of its files."""
    target = number_property(table, TARGET_FILE_SIZE)
    due = [planned.partition[0] for planned in plan_compactions(files, target, now)]
    return Compacted(min([_first_open(now), *due]), head_number(table.metadata), target)


def may_advance(table: Table, now: datetime) -> bool:
    """Return whether a day was closed since the property was set. An empty table needs none."""
    if table.current_snapshot() is None:
        return False
    compacted = read_compacted(table)
    return compacted is None or compacted.before < _first_open(now)


def recent_files(
    table: Table, time_column: str, today: date, known: dict[str, list[LiveFile]] | None = None
) -> list[LiveFile]:
    """Return the files that maintenance may have to change, with all others of their days, and those since yesterday.

    Reads the manifests of these days, and those written since the property was set. `known` is as in `live_files`.
    """
    compacted = read_compacted(table)
    if compacted is None:
        return live_files(table, time_column, known)
    known = {} if known is None else known
    manifests = data_manifests(table)
    forget_others(known, manifests)
    since = compacted.sequence_number
    new = files_in(table, (each for each in manifests if each.sequence_number > since), time_column, known)
    late = {live.day for live in new if live.written_by > since}
    first = min(compacted.before, days_since_1970(today) - 1)
    kept = first_kept(retention_days(table), today)
    files = files_in(table, [each for each in manifests if _covers(each, first, late, kept)], time_column, known)
    return [live for live in files if live.day >= first or live.day in late or (kept is not None and live.day < kept)]


def _covers(manifest: ManifestFile, first: int, some: Iterable[int], before: int | None) -> bool:
    """Return whether a manifest may have files of days from `first` on, of `some` days, or of days before `before`."""
    days = days_of(manifest)
    return days.stop > first or any(day in days for day in some) or (before is not None and days.start < before)


def _first_open(now: datetime) -> int:
    """Return the first day (since 1970) that still gets rows, see `is_closed`."""
    return int(now.timestamp() // HOUR_SECONDS - OPEN_HOURS) // 24
