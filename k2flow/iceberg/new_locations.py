"""Where a new table goes: to a location of its own, and not beside a lost table unless a setting allows it (ADR 20).

The location is the catalog's default with a unique suffix, as with Iceberg's `unique-table-location`. So no two tables
share a folder, whichever catalogs name them. A table is lost if the storage has metadata of a table of this name, with
a snapshot, that no table of the catalog owns: above all if the catalog itself was lost.
"""

import logging
import re
import uuid
from collections.abc import Iterator
from typing import NamedTuple

import pyarrow.fs as fs
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import BadRequestError
from pyiceberg.io import FileIO
from pyiceberg.schema import Schema
from pyiceberg.table import CreateTableTransaction
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_fixed

from k2flow.errors import DataFileError
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, find_table, table_names
from k2flow.iceberg.metadata_files import (
    MetadataFile,
    canonical_folder,
    file_system,
    has_rows_to_lose,
    list_allowed,
    metadata_above,
    metadata_files,
    read_metadata,
)

log = logging.getLogger(__name__)
_WHILE_WRITTEN = Retrying(
    retry=retry_if_exception_type(ValueError), stop=stop_after_delay(2), wait=wait_fixed(0.1), reraise=True
)
_SUFFIX = r"(-[0-9a-f]{8}(-?[0-9a-f]{4}){3}-?[0-9a-f]{12})?"


class DefaultLocation(NamedTuple):
    """Where the catalog would create a table, and the access to its storage."""

    location: str
    io: FileIO


def default_location(catalog: Catalog, name: str, schema: Schema) -> DefaultLocation | None:
    """Ask the catalog, which creates nothing. Return None if it does not say before it creates a table."""
    try:
        staged: CreateTableTransaction = catalog.create_table_transaction((NAMESPACE, name), schema)
    except (BadRequestError, NotImplementedError) as error:
        log.warning("%s: the catalog chooses its location, and lost tables are not looked for: %s", name, error)
        return None
    return DefaultLocation(staged.table_metadata.location.rstrip("/"), staged._table.io)


def unique_location(default: DefaultLocation | None) -> str | None:
    """Return a location that no other table has ever had; None leaves the choice to the catalog."""
    return None if default is None else f"{default.location}-{uuid.uuid4().hex}"


def lost_metadata(catalog: Catalog, name: str, default: DefaultLocation | None) -> str | None:
    """Return the location of the newest metadata file with rows of a lost table of this name; None if there is none.

    Raises CatalogError. A metadata file that cannot be read counts as one with rows.
    """
    if default is None:
        return None
    with catalog_errors():
        filesystem, scheme, path = file_system(default.io, default.location)
        parent, base = path.rsplit("/", 1)
        of_this_name = re.compile(f"({re.escape(base)}|{re.escape(name)}){_SUFFIX}")
        folders = [
            info.path
            for info in list_allowed(filesystem, parent)
            if info.type == fs.FileType.Directory and of_this_name.fullmatch(info.base_name)
        ]
        known: set[str] | None = None
        found = []
        for newest in (*_newest_in(filesystem, folders), *_newest(metadata_above(filesystem, path))):
            if not _has_rows(filesystem, newest):
                continue
            known = _known_locations(catalog) if known is None else known
            if canonical_folder(_location(scheme, newest.folder)) not in known:
                found.append(newest)
    newest_of_all = max(found, key=lambda file: file.time_ns, default=None)
    return None if newest_of_all is None else _location(scheme, newest_of_all.path)


def _newest_in(filesystem: fs.FileSystem, folders: list[str]) -> Iterator[MetadataFile]:
    for folder in folders:
        yield from _newest(metadata_files(list_allowed(filesystem, f"{folder}/metadata")))


def _newest(files: Iterator[MetadataFile] | list[MetadataFile]) -> list[MetadataFile]:
    newest = max(files, key=lambda file: (file.version, file.time_ns), default=None)
    return [] if newest is None else [newest]


def _has_rows(filesystem: fs.FileSystem, file: MetadataFile) -> bool:
    """Return False for a table that was just created, by another process too, and never held a row.

    A file that cannot be read may still be in the other process's hands: it is read again for a while.
    """
    try:
        return has_rows_to_lose(_WHILE_WRITTEN(read_metadata, filesystem, file.path))
    except FileNotFoundError:
        return False
    except ValueError:
        return True


def _known_locations(catalog: Catalog) -> set[str]:
    """Return the locations of the namespace's tables: a table may have been renamed."""
    found = set()
    for each in table_names(catalog):
        try:
            table = find_table(catalog, each)
        except DataFileError:
            continue
        if table is not None:
            found.add(canonical_folder(table.location()))
    return found


def _location(scheme: str, path: str) -> str:
    return f"{scheme}://{path}"
