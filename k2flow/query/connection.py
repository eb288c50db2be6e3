"""DuckDB over the tables: one view per table, each pinned to one snapshot."""

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
AsOf = datetime | int  # a moment (with a time zone), or the id of a snapshot of any table: the moment of its commit


def connect(as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB connection with a view of each table of market_data, named as the table; times are in UTC.

    As long as the connection is open, each view reads one snapshot: the newest at the time of the call, or at `as_of`.
    A table that had no snapshot then is an empty view. If a table's snapshots of that time have expired, reading
    its view is an error. Raises SettingsError, or CatalogError if the catalog or its storage failed. Raises
    QueryError if DuckDB cannot read a table, or no table has the snapshot `as_of`.
    """
    return connect_to(open_catalog(load_settings(exchange_names())), as_of)


def connect_to(catalog: Catalog, as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """Open a connection as `connect` does, on an open catalog."""
    with catalog_errors():
        try:
            names = sorted(name for _, name in catalog.list_tables(NAMESPACE))
        except NoSuchNamespaceError:
            names = []
        tables = {name: catalog.load_table((NAMESPACE, name)) for name in names}
    return connect_tables(tables, as_of)


def connect_tables(tables: Mapping[str, Table], as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """Open a connection as `connect` does, on these tables by view name; without `as_of`, each as it was loaded."""
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})  # nothing is downloaded at run time
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
    """Return SQL that gives DuckDB the S3 access that PyIceberg has below `location`, from a table's `s3.*` properties.

    Keys and region that the properties lack come from AWS's own environment variables.
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
    listed = ", ".join(f"{option} {string_literal(value)}" for option, value in options.items())
    return f'CREATE SECRET "{name}" ({listed})'


def string_literal(text: str) -> str:
    """Return SQL for a text."""
    return "'" + text.replace("'", "''") + "'"


def _moment_ms(tables: Mapping[str, Table], as_of: AsOf) -> int:
    """Return the moment in ms since 1970. Raises QueryError."""
    if isinstance(as_of, datetime):
        return math.floor(as_of.timestamp() * 1000)
    for table in tables.values():
        if snapshot := table.metadata.snapshot_by_id(as_of):
            return snapshot.timestamp_ms
    raise QueryError(f"no table has a snapshot {as_of}: it never existed, or has expired")


def _select(table: Table, moment_ms: int | None) -> str:
    newest = f"SELECT * FROM iceberg_scan({string_literal(table.metadata_location)}"
    if moment_ms is None:
        return f"{newest})"
    snapshot = table.snapshot_as_of_timestamp(moment_ms)
    if snapshot is not None:
        return f"{newest}, snapshot_from_id => {snapshot.snapshot_id})"
    oldest = min(table.metadata.snapshots, key=lambda snapshot: snapshot.timestamp_ms, default=None)
    if oldest is None or oldest.sequence_number == 1:  # its parent is unknown: PyIceberg drops it with the snapshot
        return f"{newest}) WHERE false"
    since = datetime.fromtimestamp(oldest.timestamp_ms / 1000, UTC)
    text = f"{table.name()[-1]}: the snapshots of that time have expired, the oldest is {oldest.snapshot_id} of {since}"
    return f"{newest}) WHERE error('{text}')::BOOLEAN"


def table_names(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the names of the tables that a connection has views of."""
    with query_errors():
        rows = connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    return {name for (name,) in rows}


@contextmanager
def query_errors() -> Iterator[None]:
    """Turn DuckDB's errors into QueryError, both of parsing a statement and of producing its rows."""
    try:
        yield
    except duckdb.Error as error:
        raise QueryError(_line(error)) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())


def _extension_file(name: str) -> Path:
    """Return the extension's file inside its Python package: nothing is downloaded at run time."""
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).rglob(f"{name}.duckdb_extension")):
            return path
    raise QueryError(
        f"DuckDB's extension {name} is not installed: pip install duckdb-extension-{name}=={duckdb.__version__}"
    )
