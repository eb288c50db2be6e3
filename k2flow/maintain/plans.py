"""The live data files of a table, and plans: pure functions of these files and the time."""

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from pyiceberg.manifest import DataFile, ManifestEntry, ManifestFile
from pyiceberg.table import Table

from k2flow.iceberg.manifests import data_manifests, days_of, partition_values, without_statistics

UNIX_EPOCH = date(1970, 1, 1)
HOUR_SECONDS = 3600
CLOCK_SECONDS = 60.0  # between this host's clock and the storage's, beyond which the storage's counts
HOT_FILES = 32  # from this number of small files, a partition is compacted although rows still arrive in it
OPEN_HOURS = 1  # how long after its end an hour or a day still counts as open: rows and commits may be late


@dataclass(frozen=True)
class LiveFile:
    """One data file without its statistics."""

    file: DataFile
    partition: tuple[Any, ...]  # the values of its partition fields
    lower: int | None  # the earliest value of its time column, in us since 1970; None if unknown
    upper: int | None = None  # the latest
    written_by: int = 0  # the sequence number of the commit that wrote it

    @property
    def day(self) -> int:
        """The day of its partition, in days since 1970: the first partition field of every table is a day.

        It may be outside `date`'s years, as its retention's first day and its own next day may be.
        """
        return int(self.partition[0])

    @property
    def hour(self) -> int | None:
        """The hour of its partition; None if the table is partitioned by days only."""
        return self.partition[1] if len(self.partition) > 1 else None


def live_files(
    table: Table, time_column: str, known: dict[str, list[LiveFile]] | None = None, since: int | None = None
) -> list[LiveFile]:
    """Return the data files of the current snapshot that belong to a day. Flows write no others, and others stay.

    `known` caches the files of each manifest by its path, since manifests never change. Pass it again to save reads.
    `since`: only the files of days from this one on (since 1970), and only the manifests that may name them, are read.
    """
    known = {} if known is None else known
    manifests = data_manifests(table)
    forget_others(known, manifests)
    if since is None:
        return files_in(table, manifests, time_column, known)
    recent = [manifest for manifest in manifests if days_of(manifest).stop > since]
    return [live for live in files_in(table, recent, time_column, known) if live.day >= since]


def forget_others(known: dict[str, list[LiveFile]], manifests: Collection[ManifestFile]) -> None:
    """Drop from the cache what is not in `manifests`."""
    for path in known.keys() - {manifest.manifest_path for manifest in manifests}:
        del known[path]


def files_in(
    table: Table, manifests: Iterable[ManifestFile], time_column: str, known: dict[str, list[LiveFile]]
) -> list[LiveFile]:
    """Return the files of some manifests, as `live_files` does. Reads those that are not in the cache."""
    column = table.schema().find_field(time_column).field_id
    found: list[LiveFile] = []
    for manifest in manifests:
        path = manifest.manifest_path
        if path not in known:
            known[path] = [_live(entry, column) for entry in manifest.fetch_manifest_entry(table.io)]
        found += [live for live in known[path] if _is_dated(live)]
    return found


def _is_dated(live: LiveFile) -> bool:
    return bool(live.partition) and all(isinstance(value, int) for value in live.partition)


def _live(entry: ManifestEntry, column: int) -> LiveFile:
    file = entry.data_file
    bounds = [(bounds or {}).get(column) for bounds in (file.lower_bounds, file.upper_bounds)]
    lower, upper = (None if bound is None else int.from_bytes(bound, "little", signed=True) for bound in bounds)
    written_by = entry.file_sequence_number or 0
    return LiveFile(without_statistics(file), partition_values(file), lower, upper, written_by)


@dataclass(frozen=True)
class Compaction:
    """Files of one partition to merge, in the order in which their rows are read."""

    partition: tuple[Any, ...]
    files: tuple[LiveFile, ...]


def expired_files(files: Iterable[LiveFile], retention_days: int | None, today: date) -> list[LiveFile]:
    """Return the files of days before `today` - `retention_days`; None means unlimited retention."""
    first = first_kept(retention_days, today)
    return [] if first is None else [live for live in files if live.day < first]


def first_kept(retention_days: int | None, today: date) -> int | None:
    """Return the first day (since 1970) that a table keeps; None if it keeps all."""
    return None if retention_days is None else days_since_1970(today) - retention_days


def days_since_1970(day: date) -> int:
    """Return a day as a number, as partitions have it."""
    return (day - UNIX_EPOCH).days


def day_text(day: int) -> str:
    """Return a day, given in days since 1970, as a date, or as a number outside the years 1 to 9999."""
    try:
        return f"{UNIX_EPOCH + timedelta(days=day)}"
    except OverflowError:
        return f"{day:,} days since 1970"


def plan_compactions(files: Iterable[LiveFile], target_bytes: int, now: datetime) -> list[Compaction]:
    """Plan to merge the small files of each partition, those of less than half of `target_bytes`.

    Afterwards a closed partition has at most one small file. An open partition waits until it has HOT_FILES. Large
    partitions become several compactions, each of about one file's size.
    """
    small: dict[tuple[Any, ...], list[LiveFile]] = defaultdict(list)
    for live in files:
        if is_small(live, target_bytes):
            small[live.partition].append(live)
    found = []
    for partition, candidates in sorted(small.items()):
        if len(candidates) >= (2 if is_closed(candidates[0], now) else HOT_FILES):
            found += [Compaction(partition, tuple(group)) for group in _groups(candidates, target_bytes)]
    return found


def is_small(live: LiveFile, target_bytes: int) -> bool:
    """Return whether a file is worth merging with others."""
    return live.file.file_size_in_bytes < target_bytes // 2


def is_closed(live: LiveFile, now: datetime) -> bool:
    """Return whether the hour or day of this file's partition, and the time for late rows, are over."""
    end = (live.day + 1) * 24 if live.hour is None else live.day * 24 + live.hour + 1
    return (end + OPEN_HOURS) * HOUR_SECONDS <= now.timestamp()


def _groups(candidates: Iterable[LiveFile], target_bytes: int) -> list[list[LiveFile]]:
    """Split files, by their first time, into groups of about `target_bytes`, equal in size."""
    ordered = sorted(candidates, key=lambda live: (live.lower or 0, live.file.file_path))
    ends = list(itertools.accumulate(live.file.file_size_in_bytes for live in ordered))
    count = max(1, round(ends[-1] / target_bytes))
    groups: list[list[LiveFile]] = [[] for _ in range(count)]
    for live, end in zip(ordered, ends, strict=True):
        groups[min(count - 1, (end - live.file.file_size_in_bytes) * count // ends[-1])].append(live)
    return [group for group in groups if group]


def orphan_files(
    listed: Sequence[tuple[str, int, float]], reachable: set[str], now: float, orphan_seconds: float
) -> list[tuple[str, int]]:
    """Return the path and bytes of each orphan file among the files `listed` (path, bytes, time written).

    A file written less than `orphan_seconds` ago may belong to a commit that is about to land. The times written are by
    the storage's clock. If this host's clock, `now`, is far ahead of it, the newest file shows that: the lease of each
    run is one. So no file is deleted too early, and on a table where nothing was written some are deleted later.
    """
    newest = max((written for _, _, written in listed), default=now)
    by_storage = min(now, newest + CLOCK_SECONDS)
    return [(path, size) for path, size, at in listed if path not in reachable and by_storage - at > orphan_seconds]
