"""The changes of a table since a consumer last read it, found by the sequence numbers of its data files.

Iceberg gives each data file two numbers (spec, "Sequence Numbers"). The data sequence number is that of the commit that
brought its rows, and the file sequence number that of the commit that wrote the file. Our compaction keeps the greatest
data sequence number of the files that it replaces, see `RewriteFiles`. So the files above a number hold all that is new
since then, whatever maintenance did and however many snapshots have expired.

A compacted file above the number may also hold rows from before it. So its partition counts as replaced: a sum of
rows must read it again. A commit of k2flow that removes rows lists their partitions in a table property.
Other removals show in the number of rows, and a moved main branch in its history: then the table must be read whole.

A consumer may read the changes in parts of ascending sequence numbers. What compaction moved to a later number, it gets
with that number. So it has the table's rows once it has read all parts.
"""

import json
import math
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias
from uuid import UUID

from pydantic import TypeAdapter, ValidationError
from pyiceberg.manifest import DataFile, ManifestEntry, ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.update import SetPropertiesUpdate

from k2flow.errors import CommitError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.manifests import data_manifests, days_of, has_live_files, partition_values, without_statistics
from k2flow.iceberg.snapshots import head_number, main_lacks

Partition: TypeAlias = tuple[Any, ...]
KEY = "k2flow.replaced-partitions"
MAX_REPLACED = 1_000  # partitions listed in the property: about 15 KB


@dataclass(frozen=True)
class Position:
    """How far a consumer has read a table: all of its `rows`, with data sequence numbers up to `sequence_number`."""

    table_uuid: UUID
    sequence_number: int
    rows: int


@dataclass(frozen=True)
class Changes:
    """What a consumer must read to continue from one position to `position`.

    `appended` are files whose rows are all new. Each partition of `replaced` must be read whole: its files are listed,
    and none are left if all its rows are gone. If `whole` is set, it says why the table must be read from the start:
    `appended` then has all its files. Data files come without statistics.
    """

    position: Position
    appended: Sequence[DataFile]
    replaced: Mapping[Partition, Sequence[DataFile]] = field(default_factory=dict)
    whole: str | None = None


def changes(
    table: Table, after: Position | None, rows_in: Callable[[Partition], int], max_rows: int | None = None
) -> Changes:
    """Return the changes of a table, as it was loaded, since `after`; None: since it was created.

    `rows_in` returns how many rows the consumer has read of a partition. It is asked for replaced partitions only. With
    `max_rows`, the changes end at the sequence number at which that many new rows are reached. Reads the manifests that
    were written since, and those of replaced partitions. Raises CatalogError, and CommitError if the property is
    damaged.
    """
    with catalog_errors():
        manifests = [each for each in data_manifests(table) if has_live_files(each)]
        rows = sum((each.added_rows_count or 0) + (each.existing_rows_count or 0) for each in manifests)
        number = head_number(table.metadata)
        now = Position(table.metadata.table_uuid, number, rows)
        if after is None or after.table_uuid != now.table_uuid:
            return _whole(table, manifests, now, max_rows, "it was not read before")
        if main_lacks(table.metadata, after.sequence_number):
            return _whole(table, manifests, now, max_rows, "its main branch was moved to another snapshot")
        new = [
            entry
            for manifest in manifests
            if manifest.sequence_number > after.sequence_number
            for entry in manifest.fetch_manifest_entry(table.io)
            if _number(entry) > after.sequence_number
        ]
        part, position = _first_part(new, now, max_rows)
        replaced = _replaced_since(table.metadata, after.sequence_number)
        if replaced is None:
            return _whole(table, manifests, now, max_rows, "many of its partitions were replaced")
        replaced.update(partition_values(entry.data_file) for entry in new if _is_rewritten(entry))
        appended = [entry.data_file for entry in part if partition_values(entry.data_file) not in replaced]
        files = _files_of(table, manifests, replaced, position.sequence_number)
        other_rows = position.rows - _rows(file for some in (appended, *files.values()) for file in some)
        if other_rows != after.rows - sum(map(rows_in, replaced)):
            return _whole(table, manifests, now, max_rows, "another program removed rows, or restored an earlier state")
        return Changes(position, [without_statistics(file) for file in appended], files)


def files_of(
    table: Table, partitions: Collection[Partition] | None = None, until: float = math.inf
) -> dict[Partition, list[DataFile]]:
    """Return the data files of some partitions of a table, as it was loaded, without statistics; None: of all.

    Only files with a sequence number up to `until` are returned. Reads the manifests of their days. Raises
    CatalogError.
    """
    with catalog_errors():
        manifests = [each for each in data_manifests(table) if has_live_files(each)]
        if partitions is not None:
            return _files_of(table, manifests, partitions, until)
        found: dict[Partition, list[DataFile]] = defaultdict(list)
        for manifest in manifests:
            for entry in manifest.fetch_manifest_entry(table.io):
                if _number(entry) <= until:
                    found[partition_values(entry.data_file)].append(without_statistics(entry.data_file))
        return found


def note_replaced(metadata: TableMetadata, partitions: Iterable[Partition]) -> SetPropertiesUpdate:
    """Return the update that lists partitions whose rows the next commit to a table replaces or removes.

    The oldest partitions beyond MAX_REPLACED are dropped. A consumer that has not read so far reads the table whole.
    """
    noted = _noted(metadata)
    number, own = metadata.next_sequence_number(), sorted(set(partitions))
    listed = [*noted.commits, (number, own)]
    complete_after = noted.complete_after
    while sum(len(each) for _, each in listed) > MAX_REPLACED:
        complete_after = listed.pop(0)[0]
    text = json.dumps({"complete_after": complete_after, "commits": listed}, separators=(",", ":"))
    return SetPropertiesUpdate(updates={KEY: text})


@dataclass(frozen=True)
class _Noted:
    """The partitions replaced by each commit after `complete_after`, by its sequence number."""

    complete_after: int = 0
    commits: tuple[tuple[int, tuple[Partition, ...]], ...] = ()


_JSON: TypeAdapter[_Noted] = TypeAdapter(_Noted)


def _noted(metadata: TableMetadata) -> _Noted:
    text = metadata.properties.get(KEY)
    try:
        return _JSON.validate_json(text) if text else _Noted()
    except ValidationError as error:
        raise CommitError(
            f"table property {KEY} cannot be read: remove it, and delete what was derived from the table"
        ) from error


def _replaced_since(metadata: TableMetadata, number: int) -> set[Partition] | None:
    """Return the partitions replaced by commits after a sequence number; None if they are no longer known."""
    noted = _noted(metadata)
    if number < noted.complete_after:
        return None
    return {partition for commit, partitions in noted.commits if commit > number for partition in partitions}


def _first_part(
    entries: Sequence[ManifestEntry], position: Position, max_rows: int | None
) -> tuple[Sequence[ManifestEntry], Position]:
    """Return the first new entries with about `max_rows` rows, and the position after them; None: all of them."""
    rows = 0
    ordered = sorted(entries, key=_number)
    for i, entry in enumerate(ordered):
        if max_rows is not None and rows >= max_rows and _number(entry) > _number(ordered[i - 1]):
            left = sum(each.data_file.record_count for each in ordered[i:])
            return ordered[:i], replace(position, sequence_number=_number(ordered[i - 1]), rows=position.rows - left)
        rows += entry.data_file.record_count
    return entries, position


def _whole(
    table: Table, manifests: Sequence[ManifestFile], position: Position, max_rows: int | None, why: str
) -> Changes:
    every = [entry for manifest in manifests for entry in manifest.fetch_manifest_entry(table.io)]
    entries, position = _first_part(every, position, max_rows)
    return Changes(position, [without_statistics(entry.data_file) for entry in entries], whole=why)


def _files_of(
    table: Table, manifests: Sequence[ManifestFile], partitions: Collection[Partition], until: float
) -> dict[Partition, list[DataFile]]:
    found: dict[Partition, list[DataFile]] = {partition: [] for partition in sorted(partitions)}
    days = {partition[0] for partition in partitions}
    for manifest in manifests:
        if any(day in days_of(manifest) for day in days):
            for entry in manifest.fetch_manifest_entry(table.io):
                if (partition := partition_values(entry.data_file)) in found and _number(entry) <= until:
                    found[partition].append(without_statistics(entry.data_file))
    return found


def _rows(files: Iterable[DataFile]) -> int:
    return sum(file.record_count for file in files)


def _number(entry: ManifestEntry) -> int:
    return entry.sequence_number or 0


def _is_rewritten(entry: ManifestEntry) -> bool:
    return entry.file_sequence_number != entry.sequence_number
