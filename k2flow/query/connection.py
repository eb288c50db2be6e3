"""DuckDB over the tables: a view for each, of one consistent snapshot."""

import importlib.util
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

import duckdb
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError
from pyiceberg.table import Table

from k2flow.config.settings import load_settings
from k2flow.errors import QueryError
from k2flow.exchange import exchange_names
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, open_catalog

EXTENSIONS = ("avro", "iceberg")
S3 = "s3://"

AsOf = datetime | int
"""A moment (with a time zone) or the id of a snapshot of one of the tables, which stands for the moment it was made."""


def connect(as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """A DuckDB connection with a view for each table of market_data, named as the table; times are in UTC.

    Each view reads the snapshot that was the table's newest when `connect` was called, or at `as_of`, however long the
    connection is used. A table that had no snapshot then is an empty view; one whose snapshots of then are no longer
    kept is an error once it is read. Raises SettingsError, CatalogError, QueryError.
    """
    return connect_to(open_catalog(load_settings(exchange_names())), as_of)


def connect_to(catalog: Catalog, as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """As `connect`, for a catalog that is open already."""
    with catalog_errors():
        tables = _tables(catalog)
    return connect_tables(tables, as_of)


def connect_tables(tables: Mapping[str, Table], as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """As `connect`, for these tables alone, by the names of their views; without `as_of` each as it was loaded."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})  # nothing is fetched at run time
    for extension in EXTENSIONS:
        connection.load_extension(str(_extension_file(extension)))
    connection.execute("SET TimeZone = 'UTC'")
    if any(table.location().startswith(S3) for table in tables.values()):
        connection.load_extension(str(_extension_file("httpfs")))
    moment = None if as_of is None else _moment_ms(tables, as_of)
    for name, table in tables.items():
        try:
            if table.location().startswith(S3):
                connection.execute(s3_secret(name, table.location(), table.io.properties))
            connection.execute(f'CREATE VIEW "{name}" AS {_select(table, moment)}')
        except duckdb.Error as error:
            raise QueryError(f"DuckDB cannot read {NAMESPACE}.{name}: {_line(error)}") from error
    return connection


def s3_secret(name: str, location: str, properties: Mapping[str, str]) -> str:
    """SQL that lets DuckDB read what is below `location` as PyIceberg does, by the `s3.*` of a catalog or table.

    Without keys in those the ones of AWS's own variables are taken, and so is the region.
    """

    def named(*suffixes: str) -> list[str | None]:
        return [properties.get(f"s3.{suffix}") or properties.get(f"client.{suffix}") for suffix in suffixes]

    keys = named("access-key-id", "secret-access-key", "session-token")
    if not keys[0]:
        names = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
        keys = [os.environ.get(name) for name in names]
    region = named("region")[0] or os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION")
    given = dict(zip(("KEY_ID", "SECRET", "SESSION_TOKEN", "REGION"), (*keys, region), strict=True))
    options = {"TYPE": "s3", "SCOPE": location, **{option: value for option, value in given.items() if value}}
    if endpoint := properties.get("s3.endpoint"):
        scheme, _, host = endpoint.rpartition("://")
        options |= {"ENDPOINT": host.rstrip("/"), "USE_SSL": str(scheme != "http").lower()}
        virtual = properties.get("s3.force-virtual-addressing", "false").lower() == "true"
        options["URL_STYLE"] = "vhost" if virtual else "path"
    listed = ", ".join(f"{option} {_literal(value)}" for option, value in options.items())
    return f'CREATE SECRET "{name}" ({listed})'


def _literal(text: str) -> str:
    return "'" + text.replace("'", "''") + "'"


def _tables(catalog: Catalog) -> dict[str, Table]:
    try:
        names = sorted(name for _, name in catalog.list_tables(NAMESPACE))
    except NoSuchNamespaceError:
        return {}
    return {name: catalog.load_table((NAMESPACE, name)) for name in names}


def _moment_ms(tables: Mapping[str, Table], as_of: AsOf) -> int:
    """Milliseconds since 1970. Raises QueryError."""
    if isinstance(as_of, datetime):
        return math.floor(as_of.timestamp() * 1000)
    for table in tables.values():
        snapshot = table.metadata.snapshot_by_id(as_of)
        if snapshot is not None:
            return snapshot.timestamp_ms
    raise QueryError(f"no table has a snapshot {as_of}: it is wrong, or no longer kept")


def _select(table: Table, moment_ms: int | None) -> str:
    """SQL for all rows of a table as of a moment, or as they are now."""
    newest = f"SELECT * FROM iceberg_scan({_literal(table.metadata_location)}"
    if moment_ms is None:
        return f"{newest})"
    snapshot = table.snapshot_as_of_timestamp(moment_ms)
    if snapshot is not None:
        return f"{newest}, snapshot_from_id => {snapshot.snapshot_id})"
    oldest = min(table.metadata.snapshots, key=lambda snapshot: snapshot.timestamp_ms, default=None)
    if oldest is None or oldest.sequence_number == 1:  # PyIceberg forgets the parents of those that it drops
        return f"{newest}) WHERE false"
    since = datetime.fromtimestamp(oldest.timestamp_ms / 1000, UTC)
    text = f"{table.name()[-1]}: snapshots of then are no longer kept, the oldest is {oldest.snapshot_id} of {since}"
    return f"{newest}) WHERE error('{text}')::BOOLEAN"


def table_names(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """The tables of which a connection has a view."""
    with query_errors():
        return {
            name for (name,) in connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
        }


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
