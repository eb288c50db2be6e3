"""Delete files. k2flow writes none: another engine has, to delete or update rows (merge on read)."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Any

from pyiceberg.manifest import DataFile, DataFileContent, ManifestContent, ManifestEntry
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from k2flow.iceberg.catalog import NAMESPACE, catalog_errors
from k2flow.iceberg.manifests import partition_values

PATH = 2147483546  # the field id of a position delete's column `file_path` (Iceberg spec, "Reserved Field IDs")
REMEDY = (
    "rewrite its data files with that engine (Spark: CALL system.rewrite_data_files(table => '{table}', "
    "options => map('delete-file-threshold', '1'))), then try again"
)


def delete_files(table: Table, snapshot: Snapshot | None) -> int:
    """Return the number of delete files in a snapshot, even of those that apply to no file. Raises CatalogError."""
    with catalog_errors():
        manifests = snapshot.manifests(table.io) if snapshot else []
    deletes = [manifest for manifest in manifests if manifest.content == ManifestContent.DELETES]
    return sum((each.added_files_count or 0) + (each.existing_files_count or 0) for each in deletes)


def applied_deletes(
    table: Table, snapshot: Snapshot | None, paths: Iterable[str] | None = None, *, equality: bool = False
) -> list[DataFile]:
    """Return the delete files that apply to data files of a snapshot: to any, or to those of `paths`.

    With `equality`, equality deletes only. An engine leaves delete files behind that apply to no file any more. Without
    delete files no data manifest is read. Raises CatalogError.
    """
    with catalog_errors():
        manifests = snapshot.manifests(table.io) if snapshot else []
        deletes = [
            entry
            for manifest in manifests
            if manifest.content == ManifestContent.DELETES
            for entry in manifest.fetch_manifest_entry(table.io)
            if not equality or entry.data_file.content == DataFileContent.EQUALITY_DELETES
        ]
        if not deletes:
            return []
        wanted = None if paths is None else set(paths)
        files: dict[tuple[int, tuple[Any, ...]], list[ManifestEntry]] = defaultdict(list)
        for manifest in manifests:
            if manifest.content == ManifestContent.DATA:
                for entry in manifest.fetch_manifest_entry(table.io):
                    if wanted is None or entry.data_file.file_path in wanted:
                        files[_partition(entry.data_file)].append(entry)
    everything = [entry for some in files.values() for entry in some]
    found = []
    for delete in deletes:
        file = delete.data_file
        unpartitioned = file.content == DataFileContent.EQUALITY_DELETES and not partition_values(file)
        candidates = everything if unpartitioned else files[_partition(file)]
        if any(_applies(delete, entry) for entry in candidates):
            found.append(file)
    return found


def deletes_text(name: str, deletes: list[DataFile]) -> str:
    """Return the cause of an error, and what to do, for a table whose delete files k2flow would have to apply."""
    number = "a delete file" if len(deletes) == 1 else f"{len(deletes)} delete files"
    table = f"{NAMESPACE}.{name}"
    return f"{table} has {number} of another engine ({deletes[0].file_path}): {REMEDY.format(table=table)}"


def _partition(file: DataFile) -> tuple[int, tuple[Any, ...]]:
    return file.spec_id, partition_values(file)


def _applies(delete: ManifestEntry, data: ManifestEntry) -> bool:
    """Return whether a delete file applies to a data file of its partition (Iceberg spec, "Scan Planning")."""
    deleted_at, written_at = delete.sequence_number or 0, data.sequence_number or 0
    if delete.data_file.content == DataFileContent.EQUALITY_DELETES:
        return written_at < deleted_at
    path = data.data_file.file_path.encode()
    bounds = delete.data_file.lower_bounds or {}, delete.data_file.upper_bounds or {}
    lower, upper = (each.get(PATH) for each in bounds)
    return written_at <= deleted_at and (lower is None or lower <= path) and (upper is None or path <= upper)
