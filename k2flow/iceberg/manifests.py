"""Iceberg's manifests and their entries."""

from collections.abc import Sequence
from typing import Any

from pyiceberg.manifest import DataFile, ManifestContent, ManifestFile
from pyiceberg.table import Table
from pyiceberg.typedef import Record


def data_manifests(table: Table) -> list[ManifestFile]:
    """Return the manifests of data files of the current snapshot; none without a snapshot."""
    snapshot = table.current_snapshot()
    manifests = snapshot.manifests(table.io) if snapshot else []
    return [manifest for manifest in manifests if manifest.content == ManifestContent.DATA]


def has_live_files(manifest: ManifestFile) -> bool:
    """Return False for a manifest that only records files removed by an earlier commit."""
    return manifest.has_added_files() or manifest.has_existing_files()


def days_of(manifest: ManifestFile) -> range:
    """Return a range of days since 1970 that covers a manifest's entries (Iceberg spec, Appendix D).

    The first partition field of every table is a day. A manifest without bounds has no day: our flows write none.
    """
    summaries = manifest.partitions
    if not summaries or summaries[0].lower_bound is None or summaries[0].upper_bound is None:
        return range(0)
    low, high = (int.from_bytes(b, "little", signed=True) for b in (summaries[0].lower_bound, summaries[0].upper_bound))
    return range(low, high + 1)


def partition_values(file: DataFile) -> tuple[Any, ...]:
    """Return the values of a file's partition fields."""
    return tuple(file.partition[i] for i in range(len(file.partition)))


def hour_of(partition: Sequence[Any] | Record) -> int:
    """Return the hour since 1970 of a partition of Gold or the candles."""
    return int(partition[0] * 24 + partition[1])


def without_statistics(file: DataFile) -> DataFile:
    """Return a data file without its statistics, which take many times the memory of the rest."""
    slim = DataFile.from_args(
        content=file.content,
        file_path=file.file_path,
        file_format=file.file_format,
        partition=file.partition,
        record_count=file.record_count,
        file_size_in_bytes=file.file_size_in_bytes,
        sort_order_id=file.sort_order_id,
    )
    slim.spec_id = file.spec_id
    return slim
