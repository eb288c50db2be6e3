"""Metadata files in a storage: whichever catalog, table or engine they belong to, and what they reach.

They are found by listing, so also if no catalog knows them: a catalog may be lost, or another one may use the same
warehouse. They are read as plain JSON, since other engines write other versions of the format.
"""

import gzip
import json
import logging
import os
import posixpath
import re
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, TypeVar
from urllib.parse import unquote

import pyarrow.fs as fs
from pyiceberg.io import FileIO
from pyiceberg.io.fsspec import FsspecFileIO
from pyiceberg.io.pyarrow import PyArrowFileIO
from pyiceberg.manifest import ManifestFile, read_manifest_list

METADATA_NAME = re.compile(r"\.metadata\.json(\.gz)?$")
READ_THREADS = 16
_VERSION = re.compile(r"v?(\d+)")
_SCHEMES = {"s3a": "s3", "s3n": "s3", "gcs": "gs", "abfss": "abfs", "wasbs": "wasb"}
log = logging.getLogger(__name__)
T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class MetadataFile:
    """One metadata file: its path, as the file system knows it, and its time in ns since 1970."""

    path: str
    time_ns: int

    @property
    def version(self) -> int:
        """The number that the file's name begins with; -1 without one."""
        number = _VERSION.match(self.path.rsplit("/", 1)[-1])
        return int(number[1]) if number else -1

    @property
    def folder(self) -> str:
        """The folder of its table, unless `write.metadata.path` is set."""
        return self.path.rsplit("/", 2)[0]


def canonical(location: str) -> str:
    """Return one spelling of a file's location, whatever its scheme, slashes, escapes and symbolic links to folders."""
    scheme, _, path = PyArrowFileIO.parse_location(location)
    return canonical_path(scheme, path)


def canonical_folder(location: str) -> str:
    """Return one spelling of a folder's location, as `canonical` does of a file's."""
    return posixpath.dirname(canonical(f"{location}/file"))


def canonical_path(scheme: str, path: str) -> str:
    """Return `canonical` of a path in the file system of a scheme."""
    folder, name = posixpath.split(unquote(path).rstrip("/"))
    if scheme == "file":
        return f"file:{_real_folder('/' + folder.removeprefix('localhost').lstrip('/'))}/{name}"
    return f"{_SCHEMES.get(scheme, scheme)}:{posixpath.normpath(f'{folder}/{name}').lstrip('/')}"


@lru_cache(maxsize=65_536)
def _real_folder(folder: str) -> str:
    return os.path.realpath(folder).rstrip("/")


def is_inside(path: str, folder: str) -> bool:
    """Return whether a canonical path is `folder` or below it."""
    return path == folder or path.startswith(f"{folder}/")


def overlap(one: str, other: str) -> bool:
    """Return whether two canonical folders are the same, or one is below the other."""
    return is_inside(one, other) or is_inside(other, one)


def file_system(io: FileIO, location: str) -> tuple[fs.FileSystem, str, str]:
    """Return the file system of a location, its scheme, and the location's path in it."""
    scheme, netloc, path = PyArrowFileIO.parse_location(location)
    if isinstance(io, FsspecFileIO):
        return fs.PyFileSystem(fs.FSSpecHandler(io.get_fs(scheme))), scheme, path
    assert isinstance(io, PyArrowFileIO), type(io)
    return io.fs_by_scheme(scheme, netloc), scheme, path


def metadata_files(infos: Iterable[fs.FileInfo]) -> Iterator[MetadataFile]:
    """Yield the metadata files of a listing."""
    for info in infos:
        if info.is_file and METADATA_NAME.search(info.base_name):
            yield MetadataFile(info.path, info.mtime_ns or 0)


def metadata_above(filesystem: fs.FileSystem, folder: str) -> list[MetadataFile]:
    """Return the metadata files of tables whose location is above `folder`. Folders that may not be read are left out.

    One listing for each level.
    """
    found: list[MetadataFile] = []
    while (parent := posixpath.dirname(folder)) not in (folder, ""):
        folder = parent
        found += metadata_files(list_allowed(filesystem, posixpath.join(folder, "metadata")))
    return found


def list_allowed(filesystem: fs.FileSystem, folder: str) -> list[fs.FileInfo]:
    """Return what is in a folder; nothing if it is no folder, or may not be read. Raises OSError for an outage."""
    try:
        found: list[fs.FileInfo] = filesystem.get_file_info(fs.FileSelector(folder, allow_not_found=True))
        return found
    except (PermissionError, NotADirectoryError):
        return []
    except OSError as error:
        if "ACCESS_DENIED" not in str(error).upper().replace(" ", "_"):
            raise
        log.debug("%s may not be listed: %s", folder, error)
        return []


def read_metadata(filesystem: fs.FileSystem, path: str) -> dict[str, Any]:
    """Return the JSON of a metadata file. Raises OSError if it cannot be read, ValueError if it is damaged."""
    with filesystem.open_input_stream(path, compression=None) as stream:
        content: bytes = stream.read()
    try:
        text = gzip.decompress(content) if content.startswith(b"\x1f\x8b") else content
        metadata = json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(metadata, dict) or not {"format-version", "location"} <= metadata.keys():
        raise ValueError(f"{path} is no metadata of a table")
    return metadata


def log_of(metadata: dict[str, Any]) -> list[str]:
    """Return the former metadata files that a metadata file names, oldest first."""
    return [entry["metadata-file"] for entry in metadata.get("metadata-log") or ()]


def has_rows_to_lose(metadata: dict[str, Any]) -> bool:
    """Return whether a table has ever had a snapshot."""
    return bool(metadata.get("snapshots"))


def reached_files(io: FileIO, metadata: Collection[dict[str, Any]]) -> set[str]:
    """Return the locations of all files that a reader of any snapshot of these metadata files may need.

    Each manifest is read once, however many snapshots share it. A manifest that is gone reaches nothing. Raises an
    error of any kind if one cannot be read.
    """
    snapshots = [snapshot for each in metadata for snapshot in each.get("snapshots") or ()]
    lists = {snapshot["manifest-list"] for snapshot in snapshots if "manifest-list" in snapshot}
    inline = {path for snapshot in snapshots for path in snapshot.get("manifests") or ()}  # format version 1
    statistics = (
        entry["statistics-path"]
        for each in metadata
        for key in ("statistics", "partition-statistics")
        for entry in each.get(key) or ()
    )

    def manifests_of(path: str) -> list[ManifestFile]:
        return list(read_manifest_list(io.new_input(path)))

    def files_of(manifest: ManifestFile) -> list[str]:
        return [entry.data_file.file_path for entry in manifest.fetch_manifest_entry(io)]

    found = {manifest.manifest_path: manifest for each in in_threads(manifests_of, lists) for manifest in each}
    for path in inline - found.keys():
        found[path] = ManifestFile.from_args(manifest_path=path, manifest_length=0, partition_spec_id=0)
    files = {path for each in in_threads(files_of, found.values()) for path in each}
    return {*lists, *found, *files, *statistics}


def in_threads(read: Callable[[T], Sequence[R]], items: Iterable[T]) -> list[Sequence[R]]:
    """Return what `read` returns for each item; nothing for one whose file is gone."""

    def attempt(item: T) -> Sequence[R]:
        try:
            return read(item)
        except FileNotFoundError:
            return ()

    with ThreadPoolExecutor(READ_THREADS, "metadata") as pool:
        return list(pool.map(attempt, items))
