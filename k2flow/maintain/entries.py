"""The live data files of a snapshot, as maintenance sees them."""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pyiceberg.manifest import DataFile, ManifestContent, ManifestFile
from pyiceberg.table import Table

from k2flow.iceberg.manifests import without_statistics

UNIX_EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class LiveFile:
    """One data file without its statistics."""

    file: DataFile
    partition: tuple[Any, ...]  # the values of its partition fields
    lower: int | None  # the earliest value of its time column, in us since 1970; None if unknown
    upper: int | None = None  # the latest

    @property
    def day(self) -> date:
        """The day of its partition: the first partition field of every table is a day."""
        return UNIX_EPOCH + timedelta(days=self.partition[0])

    @property
    def hour(self) -> int | None:
        """The hour of its partition; None if the table is partitioned by days only."""
        return self.partition[1] if len(self.partition) > 1 else None


def live_files(table: Table, time_column: str, known: dict[str, list[LiveFile]] | None = None) -> list[LiveFile]:
    """Return the data files of the current snapshot that belong to a day. Flows write no others, and others stay.

    `known` caches the files of each manifest by its path, since manifests never change. Pass it again to save reads.
    """
    column = table.schema().find_field(time_column).field_id
    known = {} if known is None else known
    manifests = {manifest.manifest_path: manifest for manifest in data_manifests(table)}
    for path in known.keys() - manifests.keys():
        del known[path]
    for path in manifests.keys() - known.keys():
        entries = manifests[path].fetch_manifest_entry(table.io)
        known[path] = [_live(entry.data_file, column) for entry in entries]
    return [live for path in manifests for live in known[path] if None not in live.partition]


def data_manifests(table: Table) -> list[ManifestFile]:
    """Return the manifests of data files of the current snapshot; none without a snapshot."""
    snapshot = table.current_snapshot()
    manifests = snapshot.manifests(table.io) if snapshot else []
    return [manifest for manifest in manifests if manifest.content == ManifestContent.DATA]


def _live(file: DataFile, column: int) -> LiveFile:
    partition = tuple(file.partition[i] for i in range(len(file.partition)))
    lower, upper = ((bounds or {}).get(column) for bounds in (file.lower_bounds, file.upper_bounds))
    return LiveFile(without_statistics(file), partition, _number(lower), _number(upper))


def _number(bound: bytes | None) -> int | None:
    return None if bound is None else int.from_bytes(bound, "little", signed=True)
