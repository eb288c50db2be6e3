"""The Iceberg catalog: PyIceberg's own configuration of the catalog `k2flow`, or SQLite under K2FLOW_HOME."""

import gzip
import os
import re
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyiceberg.catalog
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError, NoSuchTableError, NotInstalledError, RESTError, ValidationError
from pyiceberg.table import Table
from pyiceberg.utils.config import Config
from sqlalchemy.exc import IntegrityError, ProgrammingError, SQLAlchemyError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed

from k2flow.compat.pyiceberg.commit_times import install_commit_times
from k2flow.compat.pyiceberg.compressed_metadata import install_compressed_metadata
from k2flow.compat.pyiceberg.manifest_readers import install_manifest_readers
from k2flow.compat.pyiceberg.manifest_writers import install_manifest_writers
from k2flow.compat.pyiceberg.requests import install_requests
from k2flow.config.settings import Settings
from k2flow.errors import (
    CatalogError,
    CatalogRefusedError,
    CatalogSettingsError,
    DataFileError,
    MissingExtraError,
    one_line,
)
from k2flow.retryable import Verdict, answered, verdict

CATALOG = "k2flow"
NAMESPACE = "market_data"
OUTAGES = (SQLAlchemyError, RESTError, OSError)
"""The errors of an unreachable catalog or storage, through PyIceberg. Those of requests are OSErrors."""
DAMAGED = (ValidationError, ValueError, KeyError, TypeError, EOFError, zlib.error, gzip.BadGzipFile, FileNotFoundError)
"""The errors of reading the metadata of one table if the file is damaged or gone. The last two are OSErrors too."""
SQLITE_BUSY_SECONDS = 60  # SQLite's own 5 s ended in 'database is locked' when several processes committed


def open_catalog(settings: Settings) -> Catalog:
    """Open the catalog that the environment or .pyiceberg.yaml configures as `k2flow`, else SQLite in `settings.home`.

    Raises CatalogError if it cannot be reached or is configured wrongly.
    """
    install_compressed_metadata()
    install_commit_times()
    install_manifest_readers()
    install_manifest_writers()
    install_requests()
    with catalog_errors():
        try:
            given = _given()
            uri = str(given.get("uri", ""))
            _check_path(str(given.get("warehouse", "")))
            rest = str(given.get("type", "rest")).lower() == "rest" and "py-catalog-impl" not in given
            if rest and uri.startswith("http"):
                # The others start sooner without an HTTP client.
                from k2flow.compat.pyiceberg.rest_catalog import TimedRestCatalog

                return TimedRestCatalog(CATALOG, **given)
            if given:
                # Without the ping, the first call after a restart of the database fails. PyIceberg reads
                # PYICEBERG_CATALOG__K2FLOW__POOL_PRE_PING as `pool-pre-ping`, which it then ignores.
                ping = {"pool_pre_ping": "true"} if uri.startswith("postgresql") else {}
                return _load_catalog({**ping, **given}, (IntegrityError, ProgrammingError))
            return _load_catalog(default_properties(settings.home), (SQLAlchemyError,))
        except (ValueError, ImportError, NotInstalledError, KeyError, TypeError, AttributeError) as error:
            if getattr(error.__cause__, "name", "") == "psycopg2":
                raise MissingExtraError(
                    "the catalog in PostgreSQL needs the Python package psycopg2: pip install 'k2flow[postgres]'"
                ) from error
            raise CatalogSettingsError(
                f"the catalog is configured wrongly: {error}; see PYICEBERG_CATALOG__K2FLOW__*"
            ) from error


def _load_catalog(properties: dict[str, Any], race: tuple[type[SQLAlchemyError], ...]) -> Catalog:
    """Load the catalog. If several processes create its tables at once, all but one fail with `race`: try again."""
    retrying = Retrying(
        retry=retry_if_exception_type(race), stop=stop_after_attempt(4), wait=wait_fixed(0.3), reraise=True
    )
    return retrying(pyiceberg.catalog.load_catalog, CATALOG, **properties)


def configured(settings: Settings) -> dict[str, str]:
    """Return PyIceberg's properties of the catalog `k2flow` as text; empty if none are given."""
    return {key: str(value) for key, value in _given().items()}


def _given() -> dict[str, Any]:
    return dict(Config().get_catalog_config(CATALOG) or {})  # some are nested


def default_properties(home: Path) -> dict[str, str]:
    """Return the properties of the SQLite catalog and warehouse folder under `home`. Create the folder."""
    root = home.resolve()
    _check_path(str(root))
    (root / "warehouse").mkdir(parents=True, exist_ok=True)
    return {
        "type": "sql",
        "uri": f"sqlite:///{root / 'catalog.db'}?timeout={SQLITE_BUSY_SECONDS}",
        "warehouse": f"file://{root / 'warehouse'}",
    }


def _check_path(path: str) -> None:
    """Raise CatalogSettingsError if a URI of `path` would name another place: files of all tables would meet there."""
    if re.search("[#?]|%[0-9A-Fa-f]{2}", path):
        raise CatalogSettingsError(
            f"{path}: a path with `#`, `?`, or `%` and two hexadecimal digits means another one in a URI: "
            "choose another folder"
        )


def load_table(catalog: Catalog, name: str) -> Table:
    """Return the table `name` of market_data. Raises CatalogError if it does not exist or cannot be read."""
    found = find_table(catalog, name)
    if found is None:
        raise CatalogError(f"table {NAMESPACE}.{name} does not exist: run `k2flow tables create`")
    return found


def find_table(catalog: Catalog, name: str) -> Table | None:
    """Return the table as `load_table` does, but None if it does not exist. Raises DataFileError, CatalogError."""
    with catalog_errors():
        try:
            return catalog.load_table((NAMESPACE, name))
        except NoSuchTableError:
            return None
        except DAMAGED as error:
            raise DataFileError(
                f"the metadata of {NAMESPACE}.{name} cannot be read ({one_line(error)[:200]}): restore the file, or "
                "register the table again from the metadata file before it"
            ) from error


def table_names(catalog: Catalog) -> set[str]:
    """Return the names of the tables of market_data, without reading one. Raises CatalogError."""
    with catalog_errors():
        try:
            return {identifier[-1] for identifier in catalog.list_tables(NAMESPACE)}
        except NoSuchNamespaceError:
            return set()


@contextmanager
def catalog_errors() -> Iterator[None]:
    """Raise a CatalogError for each error of an unreachable catalog or storage; see k2flow.retryable."""
    try:
        yield
    except OUTAGES as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        where = "PYICEBERG_CATALOG__K2FLOW__*" if os.environ.get("PYICEBERG_CATALOG__K2FLOW__URI") else "K2FLOW_HOME"
        kind: type[CatalogError] = CatalogSettingsError
        if verdict(error) is Verdict.RETRIED:
            kind = CatalogRefusedError if answered(error) else CatalogError
        raise kind(f"the catalog or its storage cannot be used: {reason}; check {where}") from error
