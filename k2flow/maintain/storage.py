"""The files of a table in its storage: lists them, finds those that its metadata reach, and deletes others."""

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import MappingProxyType

import pyarrow.fs as fs
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.table import Table
from pyiceberg.table.locations import load_location_provider

from k2flow.errors import MaintenanceError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.metadata_files import (
    MetadataFile,
    canonical_folder,
    canonical_path,
    file_system,
    is_inside,
    metadata_above,
    metadata_files,
)
from k2flow.maintain.plans import LiveFile

ICEBERG_FILE = re.compile(r"\.(parquet|avro|orc|puffin|stats)$|\.metadata\.json(\.gz)?$")
"""The names of files that Iceberg's writers create. Never touch files with other names."""
DELETE_THREADS = 16
ListedFile = tuple[str, int, float]  # (path, bytes, time written in seconds since 1970)


@dataclass(frozen=True)
class Listing:
    """What is in the storage: the files in a table's folders, and all metadata files in and above its location."""

    files: Sequence[ListedFile]
    metadata: Sequence[MetadataFile]


class TableStorage:
    """The storage under a table's location. Raises CatalogError, MaintenanceError.

    `folders` are the table's own folders for data and metadata, as canonical locations: only files in them are ever
    deleted. `foreign_folders` are outside its location, where `write.data.path` or `write.metadata.path` put them:
    nothing there proves which table a file belongs to.
    """

    def __init__(self, table: Table) -> None:
        if not isinstance(table.io, PyArrowFileIO):
            raise MaintenanceError(
                f"{table.name()[-1]}: files can be listed with PyArrow's FileIO only, not {type(table.io).__name__}: "
                "set py-io-impl of the catalog to pyiceberg.io.pyarrow.PyArrowFileIO, or leave it out"
            )
        self.filesystem, self._scheme, self._path = file_system(table.io, table.location().rstrip("/"))
        location, folders = canonical_folder(table.location()), table_folders(table)[1:]
        self.folders = [folder for folder in folders if is_inside(folder, location)]
        self.foreign_folders = [folder for folder in folders if folder not in self.folders]

    def list_files(self) -> list[ListedFile]:
        """Return all files in the table's own folders, of the kinds that Iceberg's writers create."""
        return list(self.listing().files)

    def listing(self) -> Listing:
        """List the table's location once, and look for metadata above it."""
        with catalog_errors():
            everything = fs.FileSelector(self._path, recursive=True, allow_not_found=True)
            infos = [info for info in self.filesystem.get_file_info(everything) if info.is_file]
            above = metadata_above(self.filesystem, self._path)
        files = [
            (info.path, info.size, info.mtime_ns / 1e9)
            for info in infos
            if ICEBERG_FILE.search(info.base_name) and info.mtime_ns is not None and self._is_own(info.path)
        ]
        return Listing(files, [*metadata_files(infos), *above])

    def key(self, path: str) -> str:
        """Return the canonical location of a path in this storage."""
        return canonical_path(self._scheme, path)

    def delete(self, paths: Iterable[str]) -> int:
        """Delete files. Return how many existed: a file that is already gone is no error."""
        with catalog_errors(), ThreadPoolExecutor(DELETE_THREADS, "delete") as pool:
            return sum(pool.map(self._delete, paths))

    def _is_own(self, path: str) -> bool:
        key = self.key(path)
        return any(is_inside(key, folder) for folder in self.folders)

    def _delete(self, path: str) -> int:
        try:
            self.filesystem.delete_file(path)
        except FileNotFoundError:
            return 0
        return 1


def table_folders(table: Table) -> tuple[str, str, str]:
    """Return the canonical locations of a table, of its data and of its metadata."""
    location = table.location().rstrip("/")
    provider = load_location_provider(location, table.properties)
    return canonical_folder(location), canonical_folder(provider.data_path), canonical_folder(provider.metadata_path)


def path_of(location: str) -> str:
    """Return a location without its scheme, as a file system knows it."""
    path: str = PyArrowFileIO.parse_location(location)[2]
    return path


def reachable_files(table: Table, known: Mapping[str, Sequence[LiveFile]] = MappingProxyType({})) -> set[str]:
    """Return the paths of all files that a reader of any snapshot, tag or branch of `table`, or an engine, may need.

    Each manifest is read once, however many snapshots share it; not if `known` has its files. Raises CatalogError.
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
        for path, manifest in manifests.items():
            read = (entry.data_file for entry in manifest.fetch_manifest_entry(table.io)) if path not in known else ()
            locations.update(file.file_path for file in read)
            locations.update(live.file.file_path for live in known.get(path, ()))
    return set(map(path_of, locations))
