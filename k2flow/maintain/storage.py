"""The files of a table in its storage: lists them, finds those that its metadata reach, and deletes others."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor

import pyarrow.fs as fs
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.table import Table
from pyiceberg.table.locations import load_location_provider

from k2flow.errors import MaintenanceError
from k2flow.iceberg.catalog import catalog_errors

ICEBERG_FILE = re.compile(r"\.(parquet|avro|orc|puffin|stats)$|\.metadata\.json(\.gz)?$")
"""The names of files that Iceberg's writers create. Never touch files with other names."""
DELETE_THREADS = 16
ListedFile = tuple[str, int, float]  # (path, bytes, time written in seconds since 1970)


class TableStorage:
    """The storage under a table's folders for data and metadata. Raises CatalogError, MaintenanceError."""

    def __init__(self, table: Table) -> None:
        if not isinstance(table.io, PyArrowFileIO):
            raise MaintenanceError(
                f"{table.name()[-1]}: files can be listed with PyArrow's FileIO only, not {type(table.io).__name__}: "
                "set py-io-impl of the catalog to pyiceberg.io.pyarrow.PyArrowFileIO, or leave it out"
            )
        metadata = table.metadata
        locations = load_location_provider(metadata.location, metadata.properties)
        files = (locations.new_data_location("x"), locations.new_metadata_location("x"))
        scheme, netloc, _ = PyArrowFileIO.parse_location(metadata.location)
        self._filesystem: fs.FileSystem = table.io.fs_by_scheme(scheme, netloc)
        self._folders = sorted({path_of(file).rsplit("/", 1)[0] for file in files})

    def list_files(self) -> list[ListedFile]:
        """Return all files of the kinds that Iceberg's writers create."""
        found = []
        with catalog_errors():
            for folder in self._folders:
                everything = fs.FileSelector(folder, recursive=True, allow_not_found=True)
                for info in self._filesystem.get_file_info(everything):
                    if info.is_file and ICEBERG_FILE.search(info.base_name):
                        found.append((info.path, info.size, info.mtime.timestamp()))
        return found

    def delete(self, paths: Iterable[str]) -> int:
        """Delete files. Return how many existed: a file that is already gone is no error."""
        with catalog_errors(), ThreadPoolExecutor(DELETE_THREADS, "delete") as pool:
            return sum(pool.map(self._delete, paths))

    def _delete(self, path: str) -> int:
        try:
            self._filesystem.delete_file(path)
        except FileNotFoundError:
            return 0
        return 1


def path_of(location: str) -> str:
    """Return a location without its scheme, as a file system knows it."""
    path: str = PyArrowFileIO.parse_location(location)[2]
    return path


def reachable_files(table: Table) -> set[str]:
    """Return the paths of all files that a reader of any snapshot, tag or branch of `table`, or an engine, may need.

    Each manifest is read once, however many snapshots share it. Raises CatalogError.
    """
    metadata = table.metadata
    locations = {table.metadata_location, *(entry.metadata_file for entry in metadata.metadata_log)}
    locations.update(statistics.statistics_path for statistics in metadata.statistics)
    locations.update(statistics.statistics_path for statistics in getattr(metadata, "partition_statistics", ()))
    manifests = {}
    with catalog_errors():
        for snapshot in metadata.snapshots:
            locations.add(snapshot.manifest_list)
            manifests.update({manifest.manifest_path: manifest for manifest in snapshot.manifests(table.io)})
        locations.update(manifests)
        for manifest in manifests.values():
            locations.update(entry.data_file.file_path for entry in manifest.fetch_manifest_entry(table.io))
    return set(map(path_of, locations))
