"""A cache of table metadata: PyIceberg parses and copies all of a table's metadata several times in each commit.

With the hundred snapshots that a table keeps, most of a commit's time went into metadata that had not changed. The
cache is for processes with frequent commits, such as flows. The metadata and what other processes see stay the same.
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

CAPACITY = 16  # cached metadata files: the newest of each table, and some more
_read, _write = FromInputFile.table_metadata, ToOutputFile.table_metadata
_cache: OrderedDict[str, TableMetadata] = OrderedDict()
_lock = Lock()


def install_metadata_cache() -> None:
    """Install the cache for this whole process.

    A metadata file never changes (Iceberg spec, "File System Operations"), and neither do PyIceberg's objects of its
    entries. So a file is parsed once, and the entries are shared instead of copied.
    """
    for entry in (Snapshot, SnapshotLogEntry, MetadataLogEntry, Schema, PartitionSpec, SortOrder):
        entry.__deepcopy__ = lambda self, memo=None: self  # type: ignore[method-assign]
    FromInputFile.table_metadata = staticmethod(_read_cached)  # type: ignore[method-assign]
    ToOutputFile.table_metadata = staticmethod(_write_cached)  # type: ignore[method-assign]


def _read_cached(input_file: Any, *args: Any, **kwargs: Any) -> TableMetadata:
    with _lock:
        cached = _cache.get(input_file.location)
    return cached or _add(input_file.location, _read(input_file, *args, **kwargs))


def _write_cached(metadata: TableMetadata, output_file: Any, *args: Any, **kwargs: Any) -> None:
    _write(metadata, output_file, *args, **kwargs)
    _add(output_file.location, metadata)


def _add(location: str, metadata: TableMetadata) -> TableMetadata:
    with _lock:
        _cache[location] = metadata
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
    return metadata
