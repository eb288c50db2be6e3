"""Which orphan files are provably the table's own: maintenance deletes no others (ADR 20).

A file is spared if any metadata file in or above the table's location reaches it, whichever table, catalog or engine
that belongs to. Metadata files of the table's own history do not count: what only they reach has expired. Nothing is
deleted at all if

- another table of the catalog has a folder that overlaps with the table's,
- a metadata file of this table is neither in its history nor an attempt that lost to it: another catalog commits to
  the same table, or the catalog was restored from an older copy,
- a metadata file, or a manifest that it names, cannot be read.

Cost: one listing of the location and one of each folder above it. One read per hundred metadata files of the table that
no longer are in its log, one of each other metadata file and each manifest that it names. One load of each other table
of the catalog, once for all tables of a run. All only if there is an orphan file.
"""

import logging
import re
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from typing import Any

from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError
from pyiceberg.table import Table
from pyiceberg.typedef import Identifier

from k2flow.errors import MaintenanceError, one_line
from k2flow.iceberg.catalog import OUTAGES
from k2flow.iceberg.commit import STAGED_BRANCH
from k2flow.iceberg.metadata_files import READ_THREADS, MetadataFile, canonical, log_of, overlap, reached_files
from k2flow.iceberg.metadata_files import read_metadata as read_json
from k2flow.maintain.storage import Listing, TableStorage, table_folders

log = logging.getLogger(__name__)
Metadata = dict[str, Any]
LOAD_THREADS = 8
_UUID = re.compile(rb'"table-uuid"\s*:\s*"([^"]+)"')


class OtherTables:
    """The folders of all tables of a catalog, read at most once."""

    def __init__(self, catalog: Catalog) -> None:
        self._catalog = catalog

    def overlapping(self, table: Table, folders: Sequence[str]) -> str | None:
        """Return the name and location of another table that has a folder in, or above, one of `folders`."""
        own = tuple(table.name())
        for identifier, (location, *others) in self._folders.items():
            pairs = ((folder, other) for folder in folders for other in (location, *others))
            if tuple(identifier) != own and any(overlap(*pair) for pair in pairs):
                return f"{'.'.join(identifier)} in {location}"
        return None

    @cached_property
    def _folders(self) -> Mapping[Identifier, tuple[str, str, str]]:
        names = list(self._names(()))
        with ThreadPoolExecutor(LOAD_THREADS, "tables") as pool:
            found = pool.map(self._folders_of, names)
        return {name: folders for name, folders in zip(names, found, strict=True) if folders}

    def _names(self, namespace: Identifier) -> Iterator[Identifier]:
        try:
            inner = self._catalog.list_namespaces(namespace)
            if namespace:
                yield from self._catalog.list_tables(namespace)
        except (NoSuchNamespaceError, *OUTAGES) as error:  # it may be another team's
            log.debug("namespace %s: %s", namespace, one_line(error))
            return
        for each in inner:
            if len(each) > len(namespace):  # a catalog without nested namespaces may ignore the outer one
                yield from self._names(each)

    def _folders_of(self, name: Identifier) -> tuple[str, str, str] | None:
        try:
            return table_folders(self._catalog.load_table(name))
        except NoSuchTableError:
            return None
        except Exception as error:  # if its metadata is in the way, the listing finds it
            log.debug("table %s", name, exc_info=True)
            log.warning("table %s cannot be read, and its folders are unknown: %s", ".".join(name), one_line(error))
            return None


def owned_orphans(
    paths: Sequence[str],
    reachable: Collection[str],
    table: Table,
    storage: TableStorage,
    listing: Listing,
    others: OtherTables,
) -> list[str]:
    """Return those of the orphan files `paths` that are provably the table's own. Raises MaintenanceError.

    `reachable` are the paths that the table's own metadata reach, in any spelling.
    """
    name = table.name()[-1]
    if other := others.overlapping(table, storage.folders):
        raise _refusal(name, f"table {other} has the same folder or one inside the other: move one of the two")
    foreign = ForeignMetadata(table, storage, listing.metadata)
    spared = foreign.reached() | set(map(storage.key, [*reachable, *(file.path for file in foreign.files)]))
    if foreign.files:
        newest = max(foreign.files, key=lambda file: file.time_ns)
        text = "%s: %d metadata files in or above its location are not its own, %s the newest: their files are spared"
        log.warning(text, name, len(foreign.files), newest.path)
    return [path for path in paths if storage.key(path) not in spared]


class ForeignMetadata:
    """The metadata files of a listing that are not in the table's history, and what they reach."""

    def __init__(self, table: Table, storage: TableStorage, metadata: Sequence[MetadataFile]) -> None:
        """Read them. Raises MaintenanceError if one cannot be read, or shows that the table is not ours alone."""
        self._table = table
        self._storage = storage
        self._name = table.name()[-1]
        listed = {storage.key(file.path): file for file in metadata}
        self._head = canonical(table.metadata_location)
        self._history = self._read_history(listed)
        unknown = [file for key, file in listed.items() if key not in self._history]
        with ThreadPoolExecutor(READ_THREADS, "metadata") as pool:
            read = list(pool.map(self._read, unknown))
        known = [(file, each) for file, each in zip(unknown, read, strict=True) if each]
        if diverged := [file for file, each in known if self._has_diverged(each)]:
            raise self._diverged(diverged)
        found = [(file, each) for file, each in known if self._is_foreign(each)]
        self.files = [file for file, _ in found]
        self._metadata = [each for _, each in found]
        if branch := next((ref for each in self._metadata for ref in each.get("refs") or () if _is_staged(ref)), None):
            raise _refusal(self._name, f"rows of another table in its location are being replaced, branch {branch}")

    def reached(self) -> set[str]:
        """Return the canonical locations of all files that they reach."""
        try:
            return set(map(canonical, reached_files(self._table.io, self._metadata)))
        except Exception as error:
            newest = max((file.path for file in self.files), default=self._table.metadata_location)
            text = f"a file that metadata in its location names, such as {newest}, cannot be read ({one_line(error)})"
            raise _refusal(
                self._name, f"{text}: restore it, or delete the metadata file if no table needs it"
            ) from error

    def _read_history(self, listed: Mapping[str, MetadataFile]) -> set[str]:
        """Return the metadata files of this table's history: the log, and the logs of the oldest files that exist."""
        former = [canonical(entry.metadata_file) for entry in self._table.metadata.metadata_log]
        history = {self._head, *former}
        while oldest := next((key for key in former if key in listed), None):
            metadata = self._read(listed[oldest])
            former = [key for key in map(canonical, log_of(metadata or {})) if key not in history]
            history.update(former)
        return history

    def _has_diverged(self, metadata: Metadata) -> bool:
        """Return whether it continues another history of this table: its parent is not in the history that we know."""
        former = log_of(metadata)
        return self._is_own(metadata) and bool(former) and canonical(former[-1]) not in self._history

    def _diverged(self, files: Sequence[MetadataFile]) -> MaintenanceError:
        for file in files:
            log.warning("%s: not in its history: %s", self._name, file.path)
        newest = max(files, key=lambda file: (file.version, file.time_ns)).path
        return _refusal(
            self._name,
            f"{len(files)} metadata files of this table are not in its history, {newest} the newest: another catalog "
            "commits to the table, or the catalog is an older copy. Register the newer one, or delete the files that "
            "the log names",
        )

    def _is_foreign(self, metadata: Metadata) -> bool:
        """Return whether to spare what it reaches: it is another table's, or an attempt that may still land.

        Other attempts on this table have lost: its history went on elsewhere.
        """
        former = log_of(metadata)
        return not self._is_own(metadata) or (bool(former) and canonical(former[-1]) == self._head)

    def _is_own(self, metadata: Metadata) -> bool:
        return metadata.get("table-uuid") == str(self._table.metadata.table_uuid)

    def _read(self, file: MetadataFile) -> Metadata | None:
        """Return a metadata file's JSON; None if it is gone, or is an incomplete file of this table."""
        try:
            return read_json(self._storage.filesystem, file.path)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            if self._is_incomplete(file):
                return None
            text = f"metadata file {file.path} cannot be read ({one_line(error)})"
            raise _refusal(self._name, f"{text}: restore it, or delete it if no table needs it") from error

    def _is_incomplete(self, file: MetadataFile) -> bool:
        """Return whether a crash of a writer of this table has left a part of a metadata file: no catalog has it."""
        try:
            with self._storage.filesystem.open_input_stream(file.path, compression=None) as stream:
                content = stream.read()
            if content.startswith(b"\x1f\x8b"):
                content = zlib.decompressobj(wbits=31).decompress(content)
        except (OSError, zlib.error):
            return False
        found = _UUID.search(content)
        uuid = str(self._table.metadata.table_uuid).encode()
        return found is not None and found[1] == uuid and not content.rstrip().endswith(b"}")


def _is_staged(ref: str) -> bool:
    return ref.startswith(STAGED_BRANCH)


def _refusal(name: str, why: str) -> MaintenanceError:
    return MaintenanceError(f"{name}: orphan files are not deleted: {why}")
