"""The tables of the namespace market_data: defines, creates and evolves them, and shows how an existing one differs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    BadRequestError,
    CommitFailedException,
    ForbiddenError,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema
from pyiceberg.table import Table
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER, SortField, SortOrder
from pyiceberg.transforms import IdentityTransform
from pyiceberg.types import ListType, MapType
from sqlalchemy.exc import SQLAlchemyError
from tenacity import stop_after_attempt

from k2flow.errors import CommitError, LostTableError, TableDiffersError
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors
from k2flow.iceberg.evolution import Evolution
from k2flow.iceberg.new_locations import default_location, lost_metadata, unique_location
from k2flow.iceberg.retry import retry_conflicts
from k2flow.layers import (
    CANDLES,
    CANDLES_FILE_SIZE_MB,
    CANDLES_TABLE,
    GOLD,
    GOLD_FILE_SIZE_MB,
    GOLD_TABLE,
    Field,
    Layer,
    iceberg_schema,
)

RETENTION = "k2flow.retention-days"
TARGET_FILE_SIZE = "write.target-file-size-bytes"
EVOLUTION_ATTEMPTS = 8

COMMON_PROPERTIES = {
    "write.parquet.compression-codec": "zstd",
    "write.metadata.compression-codec": "gzip",
    "commit.retry.num-retries": "5",
    "commit.manifest.min-count-to-merge": "5",
    "commit.manifest-merge.enabled": "true",
}


@dataclass(frozen=True, kw_only=True)
class TableDefinition:
    """What a table is to be: its layer, its name, and the settings of its exchange."""

    layer: Layer
    name: str
    file_size_mb: int
    retention_days: int | None = None

    @cached_property
    def repeating_columns(self) -> list[str]:
        """The Parquet columns whose values repeat within a file, so that a dictionary makes them small."""
        inside = {ListType: (".list.element",), MapType: (".key_value.key", ".key_value.value")}
        fields = [field for field in self.layer.fields if field.repeats]
        return [field.name + path for field in fields for path in inside.get(type(field.type), ("",))]

    @cached_property
    def schema(self) -> Schema:
        """The Iceberg schema, see `layers.iceberg_schema`."""
        return iceberg_schema(self.layer.fields)

    @property
    def arrow_schema(self) -> pa.Schema:
        """The one Arrow schema of its rows, see `layers.arrow_schema`."""
        return self.layer.arrow_schema

    def as_in(self, table: Table) -> "TableDefinition":
        """Return this definition with exactly the columns that `table` has now, for rewriting its rows."""
        repeats = {field.name: field.repeats for field in self.layer.fields}
        columns = table.schema().fields
        fields = tuple(Field(each.name, each.field_type, repeats.get(each.name, False)) for each in columns)
        return replace(self, layer=replace(self.layer, fields=fields))

    @property
    def spec(self) -> PartitionSpec:
        """The partition spec."""
        columns = [(self.schema.find_field(by.column).field_id, by) for by in self.layer.partitioned_by]
        return PartitionSpec(
            *(PartitionField(id_, 1000 + i, by.transform, by.name) for i, (id_, by) in enumerate(columns))
        )

    @property
    def sort_order(self) -> SortOrder:
        """The sort order."""
        ids = [self.schema.find_field(column).field_id for column in self.layer.sorted_by]
        return SortOrder(*(SortField(id_, IdentityTransform()) for id_ in ids)) if ids else UNSORTED_SORT_ORDER

    @property
    def properties(self) -> dict[str, str]:
        """The table properties."""
        retention = {} if self.retention_days is None else {RETENTION: str(self.retention_days)}
        size = {TARGET_FILE_SIZE: str(self.file_size_mb << 20)}
        return {**COMMON_PROPERTIES, **size, **retention, **dict(self.layer.properties)}


def gold_definition() -> TableDefinition:
    """Return the definition of Gold, one table for all exchanges."""
    return TableDefinition(layer=GOLD, name=GOLD_TABLE, file_size_mb=GOLD_FILE_SIZE_MB)


def candles_definition() -> TableDefinition:
    """Return the definition of the candles, one table for all exchanges."""
    return TableDefinition(layer=CANDLES, name=CANDLES_TABLE, file_size_mb=CANDLES_FILE_SIZE_MB)


def definitions(exchange: Exchange) -> dict[str, TableDefinition]:
    """Return the definitions of the tables that the flow of `exchange` writes, by name."""
    found = {}
    for name, layer in exchange.layer_by_table.items():
        size, days = layer.file_size_mb(exchange.settings), layer.retention_days(exchange.settings)
        found[name] = TableDefinition(layer=layer, name=name, file_size_mb=size, retention_days=days)
    return found


def retention_days(table: Table) -> int | None:
    """Return the days that a table keeps; None: all. Raises TableDiffersError."""
    return number_property(table, RETENTION) if RETENTION in table.properties else None


def number_property(table: Table, key: str) -> int:
    """Return a table property that must be 1 or more: other programs may set it too. Raises TableDiffersError."""
    text = table.properties.get(key, "absent")
    if not text.isdecimal() or int(text) < 1:
        raise TableDiffersError(
            f"table {NAMESPACE}.{table.name()[-1]} differs: property {key} is {text}, not 1 or more: alter the table"
        )
    return int(text)


def create(catalog: Catalog, wanted: Iterable[TableDefinition], accept_lost: bool = False) -> dict[str, str]:
    """Create missing tables, evolve those with former columns, check the rest; never drop anything.

    Return, by table name, "created", "evolved: ..." or, for a table that is up to date, an empty text. Several
    processes may call it at once, beside flows. Raises TableDiffersError if evolution cannot resolve a difference,
    CommitError if other commits came first each time, CatalogError. Raises LostTableError if the storage has a table of
    the name of a missing one, unless `accept_lost`.
    """
    with catalog_errors():
        _create_namespace(catalog)
        return {definition.name: _create_one(catalog, definition, accept_lost) for definition in wanted}


def _create_namespace(catalog: Catalog) -> None:
    try:
        catalog.create_namespace(NAMESPACE)
    except NamespaceAlreadyExistsError:
        pass
    except SQLAlchemyError:  # two at once: SQL catalogs refuse the slower one's row
        if not catalog.namespace_exists(NAMESPACE):
            raise


def _create_one(catalog: Catalog, definition: TableDefinition, accept_lost: bool) -> str:
    try:
        return _evolve(catalog, definition)
    except NoSuchTableError:
        pass
    try:
        default = default_location(catalog, definition.name, definition.schema)
        lost = None if accept_lost else lost_metadata(catalog, definition.name, default)
        if lost is None or catalog.table_exists((NAMESPACE, definition.name)):
            _create_at(catalog, definition, unique_location(default))
            return "created"
    except TableAlreadyExistsError:  # another process was faster
        return _evolve(catalog, definition)
    raise LostTableError(
        f"table {NAMESPACE}.{definition.name} is not in the catalog, but the storage has it: {lost} is its newest "
        "metadata file. Was the catalog lost? Register the table with this file, as docs/operations.md says under "
        "Disasters. To begin with an empty table beside the old files, set K2FLOW_ACCEPT_LOST_TABLES=1 for one start"
    )


def _create_at(catalog: Catalog, definition: TableDefinition, location: str | None) -> None:
    try:
        catalog.create_table(
            (NAMESPACE, definition.name),
            definition.schema,
            location=location,
            partition_spec=definition.spec,
            sort_order=definition.sort_order,
            properties={"format-version": "2", **definition.properties},
        )
    except (BadRequestError, ForbiddenError):  # a REST catalog may allow only locations of its own
        if location is None:
            raise
        _create_at(catalog, definition, None)


def _evolve(catalog: Catalog, definition: TableDefinition) -> str:
    """Check an existing table and bring its columns up to date. Return what was done, or an empty text."""
    try:
        return retry_conflicts(lambda: _evolve_once(catalog, definition), stop_after_attempt(EVOLUTION_ATTEMPTS))
    except CommitFailedException as error:
        raise CommitError(
            f"{definition.name}: other commits came before each of {EVOLUTION_ATTEMPTS} attempts to evolve it "
            f"({error}): try again"
        ) from error


def _evolve_once(catalog: Catalog, definition: TableDefinition) -> str:
    table = catalog.load_table((NAMESPACE, definition.name))
    evolution = Evolution(table.schema(), definition.schema, dict(definition.layer.former_names))
    found = [*evolution.conflicts, *differences(table, definition, evolution.renamed)]
    if found:
        raise TableDiffersError(
            f"table {NAMESPACE}.{definition.name} differs: {'; '.join(found)}. "
            "Change the setting back, alter the table, or rename it and let k2flow create a new one"
        )
    if not evolution.changes:
        return ""
    with table.update_schema() as update:
        evolution.apply(update)
    return f"evolved: {evolution}"


def differences(table: Table, definition: TableDefinition, renamed: Mapping[str, str]) -> list[str]:
    """Return the differences of `table` other than its columns, a line each; `renamed` columns will get a new name."""
    found, layer = [], definition.layer
    if table.metadata.format_version != 2:
        found.append(f"format version {table.metadata.format_version}, not 2")
    names = {f.field_id: renamed.get(f.name, f.name) for f in table.schema().fields}
    partitioning = [f"{f.transform}({names.get(f.source_id)})" for f in table.spec().fields]
    wanted = [f"{transform}({column})" for column, transform, _ in layer.partitioned_by]
    found += _compare("partitioning", partitioning, wanted)
    sorted_by = [f"{names.get(f.source_id)} {f.direction.name.lower()}" for f in table.sort_order().fields]
    found += _compare("sort order", sorted_by, [f"{column} asc" for column in layer.sorted_by])
    for key, value in definition.properties.items():
        if table.properties.get(key) != value:
            found.append(f"property {key} is {table.properties.get(key, 'absent')}, not {value}")
    if definition.retention_days is None and RETENTION in table.properties:
        found.append(f"property {RETENTION} is {table.properties[RETENTION]}, not absent")
    return found


def _compare(what: str, found: list[str], wanted: list[str]) -> list[str]:
    if found == wanted:
        return []
    extra = [item for item in found if item not in wanted]
    missing = [item for item in wanted if item not in found]
    parts = [f"has {', '.join(extra)}"] * bool(extra) + [f"lacks {', '.join(missing)}"] * bool(missing)
    return [f"{what}: {' and '.join(parts) if parts else 'another order: ' + ', '.join(found)}"]
