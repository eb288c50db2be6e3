"""The live data files of a snapshot, as maintenance looks at them."""

from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pyiceberg.manifest import DataFile, ManifestContent, ManifestFile
from pyiceberg.table import Table

from k2flow.iceberg.manifests import without_statistics

EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class LiveFile:
    """One data file without its statistics, the values of its partition fields, and where its time column begins and
    ends (us since 1970; None where that is not known)."""

    file: DataFile
    partition: tuple[Any, ...]
    lower: int | None
    upper: int | None = None

    @property
    def day(self) -> date:
        """The day of its partition: the first partition field of every table is one."""
        return EPOCH + timedelta(days=self.partition[0])

    @property
    def hour(self) -> int | None:
        """The hour of its partition, where the table has hours."""
        return self.partition[1] if len(self.partition) > 1 else None


def live_files(table: Table, time_column: str, known: dict[str, list[LiveFile]] | None = None) -> list[LiveFile]:
    """All data files of the table's current snapshot that belong to a day: flows make no others, and others stay.

    `known` keeps, for who looks again, what was read of each manifest (by its path), for a manifest never changes.
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
    """The manifests of data files of the current snapshot; none where there is no snapshot."""
    snapshot = table.current_snapshot()
    manifests = snapshot.manifests(table.io) if snapshot else []
    return [manifest for manifest in manifests if manifest.content == ManifestContent.DATA]


def _live(file: DataFile, column: int) -> LiveFile:
    partition = tuple(file.partition[i] for i in range(len(file.partition)))
    lower, upper = ((bounds or {}).get(column) for bounds in (file.lower_bounds, file.upper_bounds))
    return LiveFile(without_statistics(file), partition, _number(lower), _number(upper))


def _number(bound: bytes | None) -> int | None:
    return None if bound is None else int.from_bytes(bound, "little", signed=True)
