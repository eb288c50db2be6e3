"""DuckDB over the tables: a view for each, of one consistent snapshot."""

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import duckdb
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError

from k2flow.catalog import NAMESPACE, catalog_errors, open_catalog
from k2flow.errors import QueryError
from k2flow.exchange import exchange_names
from k2flow.settings import load_settings

EXTENSIONS = ("avro", "iceberg")


def connect() -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with a view for each table of market_data, named as the table; times are in UTC.

    Each view reads the snapshot that was the table's newest when `connect` was called, however long the connection is
    used. A table without a snapshot is an empty view. Raises SettingsError, CatalogError, QueryError.
    """
    return connect_to(open_catalog(load_settings(exchange_names())))


def connect_to(catalog: Catalog) -> duckdb.DuckDBPyConnection:
    """As `connect`, for a catalog that is open already."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})  # nothing is fetched at run time
    for extension in EXTENSIONS:
        connection.load_extension(str(_extension_file(extension)))
    connection.execute("SET TimeZone = 'UTC'")
    with catalog_errors():
        try:
            names = [name for _, name in catalog.list_tables(NAMESPACE)]
        except NoSuchNamespaceError:
            names = []
        for name in sorted(names):
            table = catalog.load_table((NAMESPACE, name))
            location = table.metadata_location.replace("'", "''")
            try:
                connection.execute(f"CREATE VIEW \"{name}\" AS SELECT * FROM iceberg_scan('{location}')")
            except duckdb.Error as error:
                raise QueryError(f"DuckDB cannot read {NAMESPACE}.{name}: {_line(error)}") from error
    return connection


@contextmanager
def query_errors() -> Iterator[None]:
    """Turns what DuckDB says of a statement, when it is read or while its rows are made, into a QueryError."""
    try:
        yield
    except duckdb.Error as error:
        raise QueryError(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _extension_file(name: str) -> Path:
    """The extension's file in the package that carries it: nothing is fetched at run time."""
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        for path in sorted(Path(folder).rglob(f"{name}.duckdb_extension")):
            return path
    raise QueryError(
        f"DuckDB's extension {name} is not installed: pip install duckdb-extension-{name}=={duckdb.__version__}"
    )
