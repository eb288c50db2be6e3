"""Builds snapshots that only add files, or nothing."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from pyiceberg.manifest import DataFile
from pyiceberg.table import Table, Transaction
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.table.snapshots import Operation

from k2flow.compat.pyiceberg.private import MergeAppendFiles
from k2flow.iceberg.head import carried_copies

MANIFEST_BYTES = 1 << 17
"""Manifests are merged up to this size. A merge writes every entry again: with Iceberg's 8 MB it would take seconds."""


class EmptyTransaction(Transaction):
    """A transaction without updates. PyIceberg's own copies all metadata at each access, 14 times a commit."""

    @property
    def table_metadata(self) -> TableMetadata:
        """The table's metadata, not copied."""
        return self._table.metadata


def append_files(
    table: Table, files: Sequence[DataFile] = (), properties: Mapping[str, str] = MappingProxyType({})
) -> MergeAppendFiles:
    """Return a snapshot on the head of main, not committed, with `files` added and `properties` in its summary.

    It carries the copies of ledgers on, see k2flow.iceberg.head.
    """
    copies = {**carried_copies(table.metadata), **properties}
    snapshot = MergeAppendFiles(Operation.APPEND, EmptyTransaction(table), table.io, snapshot_properties=copies)
    snapshot._target_size_bytes = MANIFEST_BYTES
    for file in files:
        snapshot.append_data_file(file)
    return snapshot
