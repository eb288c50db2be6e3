"""The live data files of a snapshot, as maintenance looks at them."""

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from pyiceberg.manifest import DataFile, ManifestContent, ManifestEntry, ManifestFile
from pyiceberg.table import Table

from k2flow.manifests import without_statistics

EPOCH = date(1970, 1, 1)


@dataclass(frozen=True)
class LiveFile:
    """One data file without its statistics, the values of its partition fields, and where its time column begins (None
    where that is not known)."""

    file: DataFile
    partition: tuple[Any, ...]
    lower: int | None

    @property
    def day(self) -> date:
        """The day of its partition: the first partition field of every table is one."""
        return EPOCH + timedelta(days=self.partition[0])

    @property
    def hour(self) -> int | None:
        """The hour of its partition, where the table has hours."""
        return self.partition[1] if len(self.partition) > 1 else None


def live_files(table: Table, time_column: str) -> list[LiveFile]:
    """All data files of the table's current snapshot that belong to a day: flows make no others, and others stay."""
    column = table.schema().find_field(time_column).field_id
    found = (_live(entry.data_file, column) for _, entry in entries(table))
    return [live for live in found if None not in live.partition]


def entries(table: Table) -> Iterator[tuple[ManifestFile, ManifestEntry]]:
    """Each live entry of the data manifests of the current snapshot, with its manifest."""
    for manifest in data_manifests(table):
        for entry in manifest.fetch_manifest_entry(table.io):
            yield manifest, entry


def data_manifests(table: Table) -> list[ManifestFile]:
    """The manifests of data files of the current snapshot; none where there is no snapshot."""
    snapshot = table.current_snapshot()
    manifests = snapshot.manifests(table.io) if snapshot else []
    return [manifest for manifest in manifests if manifest.content == ManifestContent.DATA]


def _live(file: DataFile, column: int) -> LiveFile:
    partition = tuple(file.partition[i] for i in range(len(file.partition)))
    bound = (file.lower_bounds or {}).get(column)
    lower = None if bound is None else int.from_bytes(bound, "little", signed=True)
    return LiveFile(without_statistics(file), partition, lower)
