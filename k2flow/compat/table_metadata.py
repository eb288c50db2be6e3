"""Makes PyIceberg handle a table's metadata once, where it does so again and again in each commit.

With the hundred snapshots that a table keeps, most of a commit's time went into metadata that had not changed. For a
process whose commits are many, such as a flow; the metadata itself, and what others see of it, is the same.
"""

from collections import OrderedDict
from threading import Lock
from typing import Any

from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.serializers import FromInputFile, ToOutputFile
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import MetadataLogEntry, Snapshot, SnapshotLogEntry
from pyiceberg.table.sorting import SortOrder

KEPT = 16
"""Metadata files that are remembered: the newest of each table, and some to spare."""

_read, _write = FromInputFile.table_metadata, ToOutputFile.table_metadata
_known: OrderedDict[str, TableMetadata] = OrderedDict()
_lock = Lock()


def install_metadata_cache() -> None:
    """For this whole process. A metadata file never changes (Iceberg spec, "File System Operations"), and neither does
    what PyIceberg holds of one in memory: so it need not be parsed again, nor its entries be copied."""
    for entry in (Snapshot, SnapshotLogEntry, MetadataLogEntry, Schema, PartitionSpec, SortOrder):
        entry.__deepcopy__ = lambda self, memo=None: self  # type: ignore[method-assign]
    FromInputFile.table_metadata = staticmethod(_read_once)  # type: ignore[method-assign]
    ToOutputFile.table_metadata = staticmethod(_write_known)  # type: ignore[method-assign]


def _read_once(input_file: Any, *args: Any, **kwargs: Any) -> TableMetadata:
    with _lock:
        known = _known.get(input_file.location)
    return known or _remember(input_file.location, _read(input_file, *args, **kwargs))


def _write_known(metadata: TableMetadata, output_file: Any, *args: Any, **kwargs: Any) -> None:
    _write(metadata, output_file, *args, **kwargs)
    _remember(output_file.location, metadata)


def _remember(location: str, metadata: TableMetadata) -> TableMetadata:
    with _lock:
        _known[location] = metadata
        while len(_known) > KEPT:
            _known.popitem(last=False)
    return metadata
