"""A table's recent days as a table of their own: DuckDB reads all manifests of a table for each query."""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import ManifestContent, ManifestFile, write_manifest_list
from pyiceberg.table import Table
from pyiceberg.table.refs import MAIN_BRANCH

from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.manifests import days_of

UNIX_EPOCH = date(1970, 1, 1)


def recent_metadata(tables: Mapping[str, Table], since: date, folder: Path) -> dict[str, str]:
    """Return by name the metadata file of each table's current snapshot, with its files of `since` and later.

    Some older files stay: those whose manifests name newer ones too. The metadata files are written to `folder`, and
    must stay as long as they are read. Raises CatalogError.
    """
    first = (since - UNIX_EPOCH).days
    return {name: _recent(table, first, folder / name) for name, table in tables.items()}


def _recent(table: Table, first: int, path: Path) -> str:
    snapshot = table.current_snapshot()
    with catalog_errors():
        manifests = snapshot.manifests(table.io) if snapshot else []
    recent = [manifest for manifest in manifests if _may_be_recent(manifest, first)]
    if snapshot is None or len(recent) == len(manifests):
        return table.metadata_location
    listed = path.with_suffix(".avro")
    number, parent = snapshot.sequence_number, snapshot.parent_snapshot_id
    output = PyArrowFileIO().new_output(str(listed))
    with write_manifest_list(2, output, snapshot.snapshot_id, parent, number, "null") as writer:
        writer.add_manifests(recent)
    metadata = table.metadata.model_copy(
        update={
            "snapshots": [snapshot.model_copy(update={"manifest_list": str(listed)})],
            "snapshot_log": [],
            "metadata_log": [],
            "refs": {MAIN_BRANCH: table.metadata.refs[MAIN_BRANCH]},
        }
    )
    named = path.with_suffix(".metadata.json")
    named.write_text(metadata.model_dump_json(exclude_none=True), "utf-8")
    return str(named)


def _may_be_recent(manifest: ManifestFile, first: int) -> bool:
    days = days_of(manifest)
    return manifest.content != ManifestContent.DATA or not days or days.stop > first
