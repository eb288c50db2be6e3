"""DuckDB over the tables: one view per table, each pinned to one snapshot."""

import importlib.util
import logging
import math
import os
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from types import MappingProxyType

import duckdb
from duckdb.sqltypes import VARCHAR
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import NoSuchNamespaceError
from pyiceberg.manifest import ManifestFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Snapshot

from k2flow.config.settings import load_settings
from k2flow.errors import DataFileError, QueryError
from k2flow.exchange import exchange_names
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, find_table, open_catalog
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.layers import CANDLES_TABLE
from k2flow.query.candle_copy import CandleRows
from k2flow.query.candles import candles_macro
from k2flow.query.sql import error_text, identifier, query_errors, string_literal

log = logging.getLogger(__name__)
EXTENSIONS = ("avro", "iceberg")
S3 = "s3://"
CANDLE_ROWS = "k2flow_candle_rows"  # DuckDB's function for what `candles(interval)` reads
CREATING = "k2flow_creates_views"  # DuckDB's variable that is set meanwhile
AsOf = datetime | int  # a moment (with a time zone), or the id of a snapshot of any table: the moment of its commit


def connect(as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """Open a DuckDB connection with a view of each table of market_data, named as the table; times are in UTC.

    As long as the connection is open, each view reads one snapshot: the newest at the time of the call, or at `as_of`.
    A table that had no snapshot then is an empty view. Reading the view of a table is an error if its snapshots of that
    time have expired, if DuckDB cannot read it, or if another engine's equality deletes apply to it; the other views
    work. The table macro `candles(interval)` gives the candles of an interval from '1m' to '1d'.

    Raises SettingsError, or CatalogError if the catalog or its storage failed. Raises QueryError if no table has the
    snapshot `as_of`.
    """
    return connect_to(open_catalog(load_settings(exchange_names())), as_of)


def connect_to(catalog: Catalog, as_of: AsOf | None = None) -> duckdb.DuckDBPyConnection:
    """Open a connection as `connect` does, on an open catalog."""
    with catalog_errors():
        try:
            names = sorted(name for _, name in catalog.list_tables(NAMESPACE))
        except NoSuchNamespaceError:
            names = []
    tables = {}
    for name in names:
        try:
            table = find_table(catalog, name)
        except DataFileError as error:
            log.warning("%s; only the other tables can be queried", error)
            continue
        if table is not None:
            tables[name] = table
    return connect_tables(tables, as_of)


def connect_tables(
    tables: Mapping[str, Table], as_of: AsOf | None = None, metadata: Mapping[str, str] = MappingProxyType({})
) -> duckdb.DuckDBPyConnection:
    """Open a connection as `connect` does, on these tables by view name; without `as_of`, each as it was loaded.

    `metadata` are the metadata files to read in place of some tables' own, see `recent_metadata`.
    """
    return _connect(tables, None if as_of is None else _moment_ms(tables, as_of), metadata)


def _connect(tables: Mapping[str, Table], moment: int | None, metadata: Mapping[str, str]) -> duckdb.DuckDBPyConnection:
    connection = duckdb.connect(config={"autoinstall_known_extensions": "false"})  # nothing is downloaded at run time
    for extension in EXTENSIONS:
        connection.load_extension(str(_extension_file(extension)))
    connection.execute("SET TimeZone = 'UTC'")
    if any(table.location().startswith(S3) for table in tables.values()):
        connection.load_extension(str(_extension_file("httpfs")))
    connection.execute(f"SET VARIABLE {CREATING} = true")
    with tempfile.TemporaryDirectory(prefix="k2flow-views-") as folder:
        for name, table in tables.items():
            try:
                if table.location().startswith(S3):
                    connection.execute(s3_secret(name, table.location(), table.io.properties))
                path = metadata.get(name, table.metadata_location)
                _create_view(connection, name, _select(table, moment, path, Path(folder)))
            except duckdb.Error as error:  # the other tables can be queried
                columns = ", ".join(f"NULL AS {identifier(field.name)}" for field in table.schema().fields)
                text = f"DuckDB cannot read {NAMESPACE}.{name}: {error_text(error)}"
                _create_view(connection, name, f"SELECT t.* FROM (SELECT {columns}) t, {_raises(text)}")
    connection.execute(f"RESET VARIABLE {CREATING}")
    if candles := tables.get(CANDLES_TABLE):
        same_view = partial(_connect, {CANDLES_TABLE: candles}, moment, metadata)
        rows = CandleRows(partial(_manifests, candles, moment), same_view)
        connection.create_function(CANDLE_ROWS, rows.sql, [], VARCHAR)
    connection.execute(candles_macro(f"{CANDLE_ROWS}()" if candles else None))
    return connection


def _manifests(table: Table, moment: int | None) -> list[ManifestFile]:
    """Return the manifests of the snapshot that a table's view reads."""
    snapshot = _snapshot_at(table, moment)
    with catalog_errors():
        return snapshot.manifests(table.io) if snapshot else []


def _snapshot_at(table: Table, moment: int | None) -> Snapshot | None:
    return table.current_snapshot() if moment is None else table.snapshot_as_of_timestamp(moment)


def _create_view(connection: duckdb.DuckDBPyConnection, name: str, select: str) -> None:
    connection.execute(f"CREATE VIEW {identifier(name)} AS {select}")


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
    return f"CREATE SECRET {identifier(name)} ({listed})"


def _moment_ms(tables: Mapping[str, Table], as_of: AsOf) -> int:
    """Return the moment in ms since 1970. Raises QueryError."""
    if isinstance(as_of, datetime):
        return math.floor(as_of.timestamp() * 1000)
    for table in tables.values():
        if snapshot := table.metadata.snapshot_by_id(as_of):
            return snapshot.timestamp_ms
    raise QueryError(f"no table has a snapshot {as_of}: it never existed, or has expired")


def _select(table: Table, moment_ms: int | None, metadata: str, folder: Path) -> str:
    """Return the SQL of a table's view, by its metadata file. Files that only its creation needs go to `folder`."""
    name = table.name()[-1]
    path = string_literal(metadata)
    if moment_ms is None:
        path = (
            f"CASE WHEN getvariable('{CREATING}') THEN {string_literal(_without_files(table, folder))} ELSE {path} END"
        )
    newest = f"SELECT t.* FROM iceberg_scan({path}"
    snapshot = _snapshot_at(table, moment_ms)
    if deletes := applied_deletes(table, snapshot, equality=True):
        # DuckDB 1.5 applies them to every partition, not only to their own.
        text = f"DuckDB does not apply equality deletes as Iceberg does: {deletes_text(name, deletes)}"
        return f"{newest}) t, {_raises(text)}"
    if moment_ms is None:
        return f"{newest}) t"
    if snapshot is not None:
        return f"{newest}, snapshot_from_id => {snapshot.snapshot_id}) t"
    oldest = min(table.metadata.snapshots, key=lambda snapshot: snapshot.timestamp_ms, default=None)
    if oldest is None or oldest.sequence_number == 1:  # its parent is unknown: PyIceberg drops it with the snapshot
        return f"{newest}) t WHERE false"
    since = datetime.fromtimestamp(oldest.timestamp_ms / 1000, UTC)
    text = f"the snapshots of that time have expired, the oldest is {oldest.snapshot_id} of {since}"
    return f"{newest}) t, {_raises(f'{name}: {text}')}"


def _without_files(table: Table, folder: Path) -> str:
    """Write a metadata file of the table without snapshots to `folder`, and return its path.

    DuckDB creates a view of it without reading all manifests of the table.
    """
    no_files: dict[str, object] = {"snapshots": [], "snapshot_log": [], "metadata_log": [], "refs": {}}
    no_files["current_snapshot_id"] = None
    path = folder / f"{table.metadata.table_uuid}.metadata.json"
    path.write_text(table.metadata.model_copy(update=no_files).model_dump_json(exclude_none=True), "utf-8")
    return str(path)


def _raises(text: str) -> str:
    """Return SQL that makes each use of a view an error, even one that needs no row of it.

    DuckDB computes the arguments of a table function first. It does so when the view is created, too.
    """
    return f"range(CASE WHEN getvariable('{CREATING}') THEN 0 ELSE error({string_literal(text)})::BIGINT END)"


def table_names(connection: duckdb.DuckDBPyConnection) -> set[str]:
    """Return the names of the tables that a connection has views of."""
    with query_errors():
        rows = connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal").fetchall()
    return {name for (name,) in rows}


def _extension_file(name: str) -> Path:
    """Return the extension's file inside its Python package: nothing is downloaded at run time."""
    spec = importlib.util.find_spec(f"duckdb_extension_{name}")
    for folder in (spec and spec.submodule_search_locations) or []:
        for path in sorted(Path(folder).rglob(f"{name}.duckdb_extension")):
            return path
    raise QueryError(
        f"DuckDB's extension {name} is not installed: pip install duckdb-extension-{name}=={duckdb.__version__}"
    )
