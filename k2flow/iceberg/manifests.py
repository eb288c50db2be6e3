"""Entries of Iceberg's manifests, small enough to keep in memory."""

from pyiceberg.manifest import DataFile


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
