"""What is kept of the entries of Iceberg's manifests."""

from pyiceberg.manifest import DataFile


def without_statistics(file: DataFile) -> DataFile:
    """What reading needs of a data file: its statistics take many times as much memory."""
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
