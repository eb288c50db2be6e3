"""The tables of the namespace market_data: their definitions, how they are made and evolve, how a found one differs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import (
    CommitFailedException,
    NamespaceAlreadyExistsError,
    NoSuchTableError,
    TableAlreadyExistsError,
)
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.partitioning import PartitionField, PartitionSpec
from pyiceberg.schema import Schema, assign_fresh_schema_ids
from pyiceberg.table import Table
from pyiceberg.table.sorting import UNSORTED_SORT_ORDER, SortField, SortOrder
from pyiceberg.transforms import DayTransform, IdentityTransform, Transform
from pyiceberg.types import (
    BinaryType,
    DateType,
    DecimalType,
    IcebergType,
    IntegerType,
    ListType,
    LongType,
    MapType,
    NestedField,
    StringType,
    TimestamptzType,
)
from sqlalchemy.exc import SQLAlchemyError
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_random_exponential

from k2flow.errors import CommitError, TableDiffersError
from k2flow.exchange import GOLD, Exchange
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors
from k2flow.iceberg.evolution import Evolution

MIB = 1 << 20
RETENTION = "k2flow.retention-days"
GOLD_FILE_SIZE_MB = 256
EVOLUTION_ATTEMPTS = 8

COMMON_PROPERTIES = {
    "write.parquet.compression-codec": "zstd",
    "write.metadata.compression-codec": "gzip",
    "commit.retry.num-retries": "5",
    "commit.manifest.min-count-to-merge": "5",
    "commit.manifest-merge.enabled": "true",
}

Fields = tuple[tuple[str, IcebergType], ...]

_STRING, _LONG, _INT, _TIME, _DATE = StringType(), LongType(), IntegerType(), TimestamptzType(), DateType()
_AMOUNT = DecimalType(18, 8)

BRONZE_FIELDS: Fields = (
    ("message_key", _STRING),
    ("avro_payload", BinaryType()),
    ("topic", _STRING),
    ("partition", _INT),
    ("offset", _LONG),
    ("kafka_timestamp", _TIME),
    ("ingestion_timestamp", _TIME),
    ("ingestion_date", _DATE),
)
SILVER_FIELDS: Fields = (
    ("message_id", _STRING),
    ("trade_id", _STRING),
    ("symbol", _STRING),
    ("exchange", _STRING),
    ("asset_class", _STRING),
    ("timestamp", _TIME),
    ("price", _AMOUNT),
    ("quantity", _AMOUNT),
    ("currency", _STRING),
    ("side", _STRING),
    ("trade_conditions", ListType(element_id=-1, element=StringType(), element_required=False)),
    ("source_sequence", _LONG),
    ("ingestion_timestamp", _TIME),
    ("platform_sequence", _LONG),
    (
        "vendor_data",
        MapType(key_id=-1, key_type=StringType(), value_id=-1, value_type=StringType(), value_required=False),
    ),
    ("exchange_date", _DATE),
)
GOLD_FIELDS: Fields = (*SILVER_FIELDS, ("exchange_hour", _INT))
DLQ_FIELDS: Fields = (
    ("topic", _STRING),
    ("partition", _INT),
    ("offset", _LONG),
    ("kafka_timestamp", _TIME),
    ("payload", BinaryType()),
    ("schema_id", _INT),
    ("reason", _STRING),
    ("detail", _STRING),
    ("failed_at", _TIME),
    ("failed_date", _DATE),
)

_REPEATING = {
    *("message_key", "topic", "partition", "schema_id", "reason", "failed_at", "failed_date"),
    *("symbol", "exchange", "asset_class", "currency", "side", "trade_conditions", "vendor_data"),
    *("ingestion_date", "exchange_date", "exchange_hour"),
}


@dataclass(frozen=True)
class TableDefinition:
    """One table as it must be.

    `partitioned_by`: (column, transform, name of the partition field); `former_names`: (column, what it was called in
    tables made before).
    """

    name: str
    fields: Fields
    partitioned_by: tuple[tuple[str, Transform[Any, Any], str], ...]
    file_size_mb: int
    retention_days: int | None = None
    sorted_by: str | None = None
    extra_properties: tuple[tuple[str, str], ...] = ()
    former_names: tuple[tuple[str, str], ...] = ()

    @cached_property
    def repeating_columns(self) -> list[str]:
        """The Parquet columns whose values repeat within a file, which a dictionary makes small."""
        inside = {"trade_conditions": (".list.element",), "vendor_data": (".key_value.key", ".key_value.value")}
        names = [name for name, _ in self.fields if name in _REPEATING]
        return [name + path for name in names for path in inside.get(name, ("",))]

    @cached_property
    def schema(self) -> Schema:
        """Every column optional, with the ids 1, 2, ... in order, those inside lists and maps after them."""
        return _schema(self.fields)

    @cached_property
    def arrow_schema(self) -> pa.Schema:
        """The one Arrow schema that is written, see `arrow_schema`."""
        return arrow_schema(self.fields)

    def as_in(self, table: Table) -> "TableDefinition":
        """This definition with exactly the columns that `table` has now, for who writes its rows anew."""
        return replace(self, fields=tuple((field.name, field.field_type) for field in table.schema().fields))

    @property
    def time_column(self) -> str:
        """The column by which rows have their place in time: what the table is sorted by, or else Kafka's time."""
        names = {name for name, _ in self.fields}
        return self.sorted_by or ("timestamp" if "timestamp" in names else "kafka_timestamp")

    @property
    def spec(self) -> PartitionSpec:
        return PartitionSpec(
            *(
                PartitionField(self.schema.find_field(column).field_id, 1000 + i, transform, name)
                for i, (column, transform, name) in enumerate(self.partitioned_by)
            )
        )

    @property
    def sort_order(self) -> SortOrder:
        if self.sorted_by is None:
            return UNSORTED_SORT_ORDER
        return SortOrder(SortField(self.schema.find_field(self.sorted_by).field_id, IdentityTransform()))

    @property
    def properties(self) -> dict[str, str]:
        retention = {} if self.retention_days is None else {RETENTION: str(self.retention_days)}
        size = {"write.target-file-size-bytes": str(self.file_size_mb * MIB)}
        return {**COMMON_PROPERTIES, **size, **retention, **dict(self.extra_properties)}


def arrow_schema(fields: Fields) -> pa.Schema:
    """Rows of these fields in Arrow: string, binary, timestamp[us, UTC], decimal128; no field ids."""
    arrow = schema_to_pyarrow(_schema(fields), include_field_ids=False)
    return pa.schema([pa.field(f.name, _small(f.type)) for f in arrow])


def _schema(fields: Fields) -> Schema:
    columns = [NestedField(i, name, kind, required=False) for i, (name, kind) in enumerate(fields, 1)]
    return assign_fresh_schema_ids(Schema(*columns))


def _small(kind: pa.DataType) -> pa.DataType:
    """`kind` with 32-bit offsets: PyIceberg maps to large types, which would leak into what readers see."""
    if pa.types.is_large_string(kind):
        return pa.string()
    if pa.types.is_large_binary(kind):
        return pa.binary()
    if pa.types.is_large_list(kind) or pa.types.is_list(kind):
        return pa.list_(pa.field("element", _small(kind.value_type)))
    if pa.types.is_map(kind):
        return pa.map_(_small(kind.key_type), _small(kind.item_type))
    if pa.types.is_struct(kind):
        return pa.struct([pa.field(field.name, _small(field.type)) for field in kind])
    return kind


def gold_definition() -> TableDefinition:
    """Gold, one table for all exchanges."""
    by_hour: tuple[tuple[str, Transform[Any, Any], str], ...] = (
        ("exchange_date", IdentityTransform(), "exchange_date"),
        ("exchange_hour", IdentityTransform(), "exchange_hour"),
    )
    hashed = (("write.distribution-mode", "hash"),)
    return TableDefinition(
        GOLD, GOLD_FIELDS, by_hour, GOLD_FILE_SIZE_MB, sorted_by="timestamp", extra_properties=hashed
    )


def definitions(exchange: Exchange) -> dict[str, TableDefinition]:
    """The four tables that the flow of `exchange` writes, by name."""

    def by_day(column: str) -> tuple[tuple[str, Transform[Any, Any], str], ...]:
        return ((column, DayTransform(), f"{column}_day"),)

    s = exchange.settings
    bronze, dlq, silver = by_day("ingestion_date"), by_day("failed_date"), by_day("exchange_date")
    made = (
        TableDefinition(exchange.bronze, BRONZE_FIELDS, bronze, s.bronze_file_size_mb, s.bronze_retention_days),
        TableDefinition(exchange.dlq, DLQ_FIELDS, dlq, s.dlq_file_size_mb, s.dlq_retention_days),
        TableDefinition(exchange.silver, SILVER_FIELDS, silver, s.silver_file_size_mb, s.silver_retention_days),
        gold_definition(),
    )
    return {definition.name: definition for definition in made}


def create(catalog: Catalog, wanted: Iterable[TableDefinition]) -> dict[str, str]:
    """Makes what is missing, evolves what has former columns, checks the rest; never drops.

    The result says in words what was done to each table, and is empty for one that was as it must be. Safe to call from
    several processes at once, and beside flows. Raises TableDiffersError, CatalogError, CommitError.
    """
    made = {}
    with catalog_errors():
        _create_namespace(catalog)
        for definition in wanted:
            made[definition.name] = _create_one(catalog, definition)
    return made


def _create_namespace(catalog: Catalog) -> None:
    try:
        catalog.create_namespace(NAMESPACE)
    except NamespaceAlreadyExistsError:
        pass
    except SQLAlchemyError:  # two at once: SQL catalogs tell the slower one of the row that is there
        if not catalog.namespace_exists(NAMESPACE):
            raise


def _create_one(catalog: Catalog, definition: TableDefinition) -> str:
    identifier = (NAMESPACE, definition.name)
    try:
        return _evolve(catalog, definition)
    except NoSuchTableError:
        pass
    try:
        catalog.create_table(
            identifier,
            schema=definition.schema,
            partition_spec=definition.spec,
            sort_order=definition.sort_order,
            properties={"format-version": "2", **definition.properties},
        )
        return "made"
    except TableAlreadyExistsError:  # another process was faster
        return _evolve(catalog, definition)


def _evolve(catalog: Catalog, definition: TableDefinition) -> str:
    """Checks a table that is there, and brings its columns up to date; what was done, or nothing."""
    retrying = Retrying(
        retry=retry_if_exception_type(CommitFailedException),
        wait=wait_random_exponential(multiplier=0.05, max=1),
        stop=stop_after_attempt(EVOLUTION_ATTEMPTS),
        reraise=True,
    )
    try:
        return retrying(_evolve_once, catalog, definition)
    except CommitFailedException as error:
        raise CommitError(
            f"{definition.name}: others committed before each of {EVOLUTION_ATTEMPTS} attempts to evolve it ({error}): "
            "try again"
        ) from error


def _evolve_once(catalog: Catalog, definition: TableDefinition) -> str:
    table = catalog.load_table((NAMESPACE, definition.name))
    evolution = Evolution(table.schema(), definition.schema, dict(definition.former_names))
    found = [*evolution.conflicts, *differences(table, definition, evolution.renamed)]
    if found:
        raise TableDiffersError(
            f"table {NAMESPACE}.{definition.name} differs: {'; '.join(found)}. "
            "Change the setting back, alter the table, or rename it and let k2flow make a new one"
        )
    if not evolution.changes:
        return ""
    with table.update_schema() as update:
        evolution.apply(update)
    return f"evolved: {evolution}"


def differences(table: Table, definition: TableDefinition, renamed: Mapping[str, str]) -> list[str]:
    """What is different in `table` beside its columns, a line each; `renamed` columns are to get a new name."""
    found = []
    if table.metadata.format_version != 2:
        found.append(f"format version {table.metadata.format_version}, not 2")
    names = {f.field_id: renamed.get(f.name, f.name) for f in table.schema().fields}
    partitioning = [f"{f.transform}({names.get(f.source_id)})" for f in table.spec().fields]
    wanted = [f"{transform}({column})" for column, transform, _ in definition.partitioned_by]
    found += _compare("partitioning", partitioning, wanted)
    sorted_by = [f"{names.get(f.source_id)} {f.direction.name.lower()}" for f in table.sort_order().fields]
    found += _compare("sort order", sorted_by, [f"{definition.sorted_by} asc"] if definition.sorted_by else [])
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
