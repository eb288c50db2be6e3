"""What there is to do, as pure functions of what a table holds and of the time."""

import itertools
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from k2flow.maintain.entries import LiveFile

HOT_FILES = 32
"""So many small files of a partition that is still written to are compacted."""
OPEN_HOURS = 1
"""How long after its end an hour or a day still counts as written to: for stragglers, and for who commits late."""


@dataclass(frozen=True)
class Compaction:
    """Files of one partition that become fewer, in the order in which their rows are read."""

    partition: tuple[Any, ...]
    files: tuple[LiveFile, ...]

    @property
    def rows(self) -> int:
        return sum(live.file.record_count for live in self.files)

    @property
    def bytes(self) -> int:
        return sum(live.file.file_size_in_bytes for live in self.files)


def expired(files: Iterable[LiveFile], retention_days: int | None, today: date) -> list[LiveFile]:
    """The files of whole days that the table need no longer keep: those before `today` - `retention_days`."""
    if retention_days is None:
        return []
    first_kept = today - timedelta(days=retention_days)
    return [live for live in files if live.day < first_kept]


def compactions(files: Iterable[LiveFile], target_bytes: int, now: datetime) -> list[Compaction]:
    """What to compact: in each partition the files of less than half of `target_bytes`, if there are several.

    Afterwards at most one file of a closed partition is that small. One that is still written to is left alone until
    HOT_FILES have gathered. Large partitions become several compactions, each of about one file's size.
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
    """Whether a file is worth making one with others."""
    return live.file.file_size_in_bytes < target_bytes // 2


def is_closed(live: LiveFile, now: datetime) -> bool:
    """Whether the hour or day of this file's partition is over, and its stragglers' time too."""
    begin = datetime(live.day.year, live.day.month, live.day.day, tzinfo=UTC)
    end = begin + (timedelta(days=1) if live.hour is None else timedelta(hours=live.hour + 1))
    return end + timedelta(hours=OPEN_HOURS) <= now


def _groups(candidates: Iterable[LiveFile], target_bytes: int) -> list[list[LiveFile]]:
    """OwnedTrades in equal groups of about `target_bytes`, by where their time begins."""
    ordered = sorted(candidates, key=lambda live: (live.lower or 0, live.file.file_path))
    ends = list(itertools.accumulate(live.file.file_size_in_bytes for live in ordered))
    count = max(1, round(ends[-1] / target_bytes))
    groups: list[list[LiveFile]] = [[] for _ in range(count)]
    for live, end in zip(ordered, ends, strict=True):
        groups[min(count - 1, (end - live.file.file_size_in_bytes) * count // ends[-1])].append(live)
    return [group for group in groups if group]


def unreachable(
    listed: Sequence[tuple[str, int, float]], reachable: set[str], now: float, safe_seconds: float
) -> list[tuple[str, int]]:
    """Of the files (path, bytes, when they were written) those that nothing reaches and that are old enough.

    A file that was written less than `safe_seconds` ago may belong to a commit that is on its way.
    """
    return [(path, size) for path, size, written in listed if path not in reachable and now - written > safe_seconds]
