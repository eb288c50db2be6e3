"""A cache of table metadata: PyIceberg parses and copies all of a table's metadata several times in each commit.

With the hundred snapshots that a table keeps, most of a commit's time went into metadata that had not changed. The
cache is for processes with frequent commits, such as flows. The metadata and what other processes see stay the same.

Metadata that another process has committed shares the entries that it has in common with the version read before: most
of its time goes into snapshots, and only the newest one is new. What depends on a schema is found by its identity, see
k2flow.compat.pyiceberg.identity.
"""

import gzip
import json
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from threading import Lock
from typing import Any, NamedTuple

from pydantic import ValidationError as PydanticError
from pyiceberg.exceptions import ValidationError
from pyiceberg.io import InputFile
from pyiceberg.partitioning import PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.serializers import FromInputFile, ToOutputFile
from pyiceberg.table.metadata import TableMetadata, TableMetadataWrapper
from pyiceberg.table.snapshots import MetadataLogEntry, Snapshot, SnapshotLogEntry
from pyiceberg.table.sorting import SortOrder

from k2flow.compat.pyiceberg.compressed_metadata import COMPRESSED

CAPACITY = 16  # cached metadata files: the newest of each table, and some more
SHARED = {
    "schemas": "schema-id",
    "partition-specs": "spec-id",
    "sort-orders": "order-id",
    "snapshots": "snapshot-id",
    "snapshot-log": "timestamp-ms",
    "metadata-log": "metadata-file",
}
"""The lists of the JSON whose entries are shared, with the key that finds an entry in the version before."""
_read, _write = FromInputFile.table_metadata, ToOutputFile.table_metadata
_cache: OrderedDict[str, TableMetadata] = OrderedDict()
_versions: OrderedDict[str, "_Version"] = OrderedDict()
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


class _Version(NamedTuple):
    """The version of a table that was read last: the JSON of its SHARED lists, and what it was parsed into."""

    json: Mapping[str, Sequence[Any]]
    parsed: Mapping[str, Sequence[Any]]


def _read_cached(input_file: InputFile, *args: Any, **kwargs: Any) -> TableMetadata:
    with _lock:
        cached = _cache.get(input_file.location)
    return cached or _add(input_file.location, _parse(_content(input_file)))


def _content(input_file: InputFile) -> bytes:
    with input_file.open() as stream:
        content = stream.read()
    return gzip.decompress(content) if input_file.location.endswith(COMPRESSED) else content


def _parse(content: bytes) -> TableMetadata:
    """Parse metadata as PyIceberg does. Raises its ValidationError, or ValueError."""
    found = json.loads(content)
    shares = isinstance(found, dict) and found.get("format-version") == 2 and "table-uuid" in found
    table = str(found["table-uuid"]) if shares else ""
    with _lock:
        before = _versions.get(table)
    lists = {name: found[name] for name in SHARED if _has_entries(found.get(name))} if shares else {}
    try:
        metadata = TableMetadataWrapper.model_validate({**found, **_shared(lists, before)} if before else found).root
    except PydanticError as error:
        raise ValidationError(error) from error
    if shares:
        parsed = {name: tuple(getattr(metadata, name.replace("-", "_"))) for name in lists}
        with _lock:
            _versions[table] = _Version(lists, parsed)
            _versions.move_to_end(table)
            while len(_versions) > CAPACITY:
                _versions.popitem(last=False)
    return metadata


def _has_entries(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


def _shared(lists: Mapping[str, Sequence[Any]], before: _Version) -> dict[str, list[Any]]:
    """Return the lists, with each entry that the version before has too as it was parsed then."""
    shared = {}
    for name in lists.keys() & before.json.keys():
        key, old = SHARED[name], zip(before.json[name], before.parsed[name], strict=True)
        known = {raw.get(key): (raw, parsed) for raw, parsed in old}
        pairs = [(raw, known.get(raw.get(key))) for raw in lists[name]]
        shared[name] = [same[1] if same and same[0] == raw else raw for raw, same in pairs]
    return shared


def _write_cached(metadata: TableMetadata, output_file: Any, *args: Any, **kwargs: Any) -> None:
    _write(metadata, output_file, *args, **kwargs)
    _add(output_file.location, metadata)


def _add(location: str, metadata: TableMetadata) -> TableMetadata:
    with _lock:
        _cache[location] = metadata
        while len(_cache) > CAPACITY:
            _cache.popitem(last=False)
    return metadata
