"""Tables with former columns in a real catalog: they evolve, or an error says why not; old files stay readable."""

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.typedef import Record
from pyiceberg.types import (
    DecimalType,
    DoubleType,
    FloatType,
    IcebergType,
    IntegerType,
    ListType,
    LongType,
    MapType,
    NestedField,
    StringType,
    StructType,
)

from k2flow.audit.file_checks import FileChecks
from k2flow.config.settings import load_settings
from k2flow.errors import DataFileError, TableDiffersError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import NAMESPACE, load_table, open_catalog
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition, create, definitions, gold_definition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.inspection import files
from k2flow.inspection.files import ReadPlan
from k2flow.layers import GOLD, GOLD_TABLE, Field
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.plans import live_files
from k2flow.query.connection import connect_to
from k2flow.trades.gold_ids import GoldIds

NOON = datetime(2026, 3, 14, 12, tzinfo=UTC)
HOUR = int(NOON.timestamp()) // 3600
STRUCT = StructType(NestedField(1, "s", StringType(), required=False))
VALUES: dict[str, Any] = {
    "timestamp": NOON,
    "exchange": "BINANCE",
    "price": Decimal("1.5"),
    "trade_conditions": ["x"],
    "source_sequence": 7,
    "platform_sequence": 8,
    "vendor_data": [("k", "v")],
    "exchange_date": NOON.date(),
    "exchange_hour": 12,
    "fee": 0.5,
    "details": {"s": "t"},
    "venue": "spot",
    "market": "spot",
}


def with_layer(definition: TableDefinition, **changes: Any) -> TableDefinition:
    return replace(definition, layer=replace(definition.layer, **changes))


def changed(
    definition: TableDefinition, types: Mapping[str, IcebergType | None], *more: tuple[str, IcebergType], **changes: Any
) -> TableDefinition:
    """Return the definition with some types changed (None removes the field) and with more fields at the end."""
    kept = [field._replace(type=types.get(field.name, field.type)) for field in definition.layer.fields]
    fields = (*(field for field in kept if field.type is not None), *(Field(*each) for each in more))
    return with_layer(definition, fields=fields, **changes)


def columns(table: Table) -> list[str]:
    return [f"{f.name} {f.field_type}{' required' * f.required}" for f in table.schema().fields]


def row(definition: TableDefinition, message_id: str, **values: Any) -> pa.RecordBatch:
    given = {**VALUES, "message_id": message_id, **values}
    arrays = [pa.array([given.get(field.name)], field.type) for field in definition.arrow_schema]
    return pa.RecordBatch.from_arrays(arrays, schema=definition.arrow_schema)


class Lake:
    """Gold, written with one definition after another, a file each."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self._offset = 0

    def write(self, definition: TableDefinition, message_id: str, **values: Any) -> None:
        committer = Committer(self.catalog, GOLD_TABLE, "binance", "topic")
        committer.fence("id")
        rows = row(definition, message_id, **values)
        ranges = [OffsetRange(0, self._offset, self._offset + 1, 1)]
        committer.commit(DataFileWriter(load_table(self.catalog, GOLD_TABLE), definition).write(rows), ranges)
        self._offset += 1

    def evolve(self, definition: TableDefinition) -> str:
        return create(self.catalog, [definition])[GOLD_TABLE]


@pytest.fixture
def lake(catalog: Catalog) -> Lake:
    return Lake(catalog)


def test_former_columns_evolve_in_one_commit(lake: Lake) -> None:
    """They keep their ids. A second evolution changes nothing."""
    today = gold_definition()
    former = {"price": DecimalType(9, 8), "source_sequence": IntegerType(), "platform_sequence": None}
    old = changed(today, former)
    assert lake.evolve(old) == "created"
    before = load_table(lake.catalog, GOLD_TABLE)
    ids = {field.name: field.field_id for field in before.schema().fields}
    assert lake.evolve(today) == (
        "evolved: column price is decimal(18, 8), was decimal(9, 8); column source_sequence is long, was int; "
        "column platform_sequence long is new"
    )
    after = load_table(lake.catalog, GOLD_TABLE)
    assert [field.name for field in after.schema().fields] == list(today.layer.columns)
    assert ids.items() <= {field.name: field.field_id for field in after.schema().fields}.items()
    assert len(after.metadata.metadata_log) == len(before.metadata.metadata_log) + 1
    assert lake.evolve(today) == ""


@pytest.mark.parametrize(
    ("former", "wanted", "text"),
    [
        (("x", FloatType()), None, ""),
        (("vendor_data", MapType(1, StringType(), 2, IntegerType())), MapType(1, StringType(), 2, LongType()),
         "column vendor_data.value is long, was int"),
        (("trade_conditions", ListType(1, FloatType(), True)), ListType(1, DoubleType(), False),
         "column trade_conditions.element is optional; column trade_conditions.element is double, was float"),
    ],
)  # fmt: skip
def test_extra_columns_stay_and_nested_types_evolve(
    lake: Lake, former: tuple[str, IcebergType], wanted: IcebergType | None, text: str
) -> None:
    today = gold_definition()
    name, kind = former
    more = () if wanted else (former,)
    lake.evolve(changed(today, {name: kind}, *more))
    today = changed(today, {name: wanted} if wanted else {})
    assert lake.evolve(today) == (f"evolved: {text}" if text else "")
    assert columns(load_table(lake.catalog, GOLD_TABLE))[len(today.layer.fields) :] == (["x float"] if more else [])
    assert lake.evolve(today) == ""


def test_nothing_evolves_if_more_than_columns_differs(lake: Lake) -> None:
    today = gold_definition()
    lake.evolve(changed(today, {"timestamp": None}, sorted_by=("message_id",)))
    with pytest.raises(TableDiffersError, match="sort order: has message_id asc and lacks timestamp asc"):
        lake.evolve(today)
    assert "timestamp" not in load_table(lake.catalog, GOLD_TABLE).schema().column_names


def test_required_columns_become_optional_and_move(lake: Lake) -> None:
    today = definitions(find_exchange("binance"))["bronze_binance_trades"]
    schema = today.schema
    fields = [replace_field(schema.fields[i], required=i < 3) for i in (4, 0, 1, 2, 3, 5, 6, 7)]
    lake.catalog.create_namespace(NAMESPACE)
    created = lake.catalog.create_table(
        (NAMESPACE, today.name),
        schema=schema.model_copy(update={"fields": (*fields, NestedField(9, "extra", LongType(), required=True))}),
        partition_spec=today.spec,
        properties={"format-version": "2", **today.properties},
    )
    assert columns(created)[:3] == ["offset long", "message_key string required", "avro_payload binary required"]
    (done,) = create(lake.catalog, [today]).values()
    assert done == (
        "evolved: column message_key is optional; column avro_payload is optional; column topic is optional; "
        "column extra is optional; columns are in the order of the definition"
    )
    names = [f"{field.name} {field.field_type}" for field in schema.fields]
    assert columns(load_table(lake.catalog, today.name)) == [*names, "extra long"]


def replace_field(field: NestedField, required: bool) -> NestedField:
    return NestedField(field.field_id, field.name, field.field_type, required=required)


@pytest.mark.parametrize(
    ("former", "found", "wanted", "why"),
    [
        (StringType(), "string", "long", "Iceberg cannot turn one into the other"),
        (FloatType(), "float", "long", "Iceberg cannot turn one into the other"),
        (DecimalType(18, 0), "decimal(18, 0)", "long", "Iceberg cannot turn one into the other"),
        (ListType(1, LongType()), "list<long>", "long", "Iceberg cannot turn one into the other"),
        (STRUCT, "struct<s string>", "long", "Iceberg cannot turn one into the other"),
    ],
)
def test_conflict_says_what_to_do(lake: Lake, former: IcebergType, found: str, wanted: str, why: str) -> None:
    """The error names the column, both types and the remedy. Nothing else evolves either."""
    today = gold_definition()
    lake.evolve(changed(today, {"source_sequence": former, "platform_sequence": None}))
    with pytest.raises(TableDiffersError) as error:
        lake.evolve(today)
    text = f"table market_data.{GOLD_TABLE} differs: column source_sequence is {found}, not {wanted} ({why})"
    assert str(error.value).startswith(text)
    assert "rename it and let k2flow create a new one" in str(error.value)
    assert "platform_sequence" not in load_table(lake.catalog, GOLD_TABLE).schema().column_names


def test_wider_table_needs_a_newer_k2flow(lake: Lake) -> None:
    today = gold_definition()
    lake.evolve(changed(today, {"exchange_hour": LongType(), "price": DecimalType(30, 8)}))
    with pytest.raises(TableDiffersError) as error:
        lake.evolve(today)
    assert "column exchange_hour is long, not int (a newer k2flow has widened it" in str(error.value)
    assert "column price is decimal(30, 8), not decimal(18, 8)" in str(error.value)


def test_renamed_column_keeps_its_values(lake: Lake) -> None:
    today = gold_definition()
    old = changed(today, {}, ("venue", StringType()))
    new = changed(today, {}, ("market", StringType()), former_names=(("market", "venue"),))
    lake.evolve(old)
    lake.write(old, "1")
    assert lake.evolve(new) == "evolved: column market was venue"
    lake.write(new, "2", market="margin")
    assert lake.evolve(new) == ""
    assert connect_to(lake.catalog).sql(f"SELECT market FROM {GOLD_TABLE} ORDER BY message_id").fetchall() == [
        ("spot",),
        ("margin",),
    ]


def test_renamed_column_widens_and_moves(lake: Lake) -> None:
    """PyIceberg's union by name must find it by its former name."""
    today = gold_definition()
    old = changed(today, {}, ("venue", IntegerType()))
    fields = (today.layer.fields[0], Field("market", LongType()), *today.layer.fields[1:], Field("new", LongType()))
    new = with_layer(today, fields=fields, former_names=(("market", "venue"),))
    lake.evolve(old)
    before = load_table(lake.catalog, GOLD_TABLE).schema().find_field("venue").field_id
    assert lake.evolve(new) == (
        "evolved: column market was venue; column market is long, was int; column new long is new; "
        "columns are in the order of the definition"
    )
    schema = load_table(lake.catalog, GOLD_TABLE).schema()
    assert [field.name for field in schema.fields] == list(new.layer.columns)
    assert schema.find_field("market").field_id == before
    assert lake.evolve(new) == ""


def test_columns_of_the_partitioning_and_sort_order_are_renamed(lake: Lake) -> None:
    """Iceberg partitions and sorts by their ids."""
    today = gold_definition()
    renamed = {"timestamp": "time", "exchange_hour": "hour"}
    fields = tuple(each._replace(name=renamed.get(each.name, each.name)) for each in today.layer.fields)
    by = tuple(each._replace(column=renamed.get(each.column, each.column)) for each in today.layer.partitioned_by)
    lake.evolve(with_layer(today, fields=fields, partitioned_by=by, sorted_by=("time",)))
    new = with_layer(today, former_names=tuple((name, former) for name, former in renamed.items()))
    assert lake.evolve(new) == "evolved: column timestamp was time; column exchange_hour was hour"
    assert lake.evolve(today) == ""


def test_several_processes_evolve_a_table_at_once() -> None:
    today = gold_definition()
    catalog = open_catalog(load_settings(exchange_names()))
    Lake(catalog).evolve(changed(today, {"price": DecimalType(9, 8), "symbol": None}))
    with ThreadPoolExecutor(6) as pool:
        catalogs = [open_catalog(load_settings(exchange_names())) for _ in range(6)]
        done = list(pool.map(lambda own: Lake(own).evolve(today), catalogs))
    assert sorted(done)[:5] == [""] * 5
    assert "column symbol string is new" in max(done)
    assert [f.name for f in load_table(catalog, GOLD_TABLE).schema().fields] == list(today.layer.columns)


# Files written before and after an evolution


@pytest.fixture
def evolved(lake: Lake) -> Lake:
    """Gold with a file of each of three definitions. The first two have columns that today's lacks."""
    today = gold_definition()
    former = {"price": DecimalType(9, 8), "source_sequence": IntegerType(), "platform_sequence": None}
    first = changed(today, former, ("fee", FloatType()), ("details", STRUCT))
    second = changed(today, {}, ("fee", DoubleType()), ("details", STRUCT))
    lake.evolve(first)
    lake.write(first, "1", details={"s": "first"})
    lake.evolve(second)
    lake.write(second, "2", fee=0.1, details=None)
    assert lake.evolve(today) == ""
    lake.write(today, "3", price=Decimal("9999999999.5"), source_sequence=2**40)
    return lake


EXPECTED = [
    ("1", Decimal("1.5"), 7, None, 0.5, {"s": "first"}),
    ("2", Decimal("1.5"), 7, 8, 0.1, None),
    ("3", Decimal("9999999999.5"), 2**40, 8, None, None),
]
SHOWN = ("message_id", "price", "source_sequence", "platform_sequence", "fee", "details")


def assert_all_readers_agree(lake: Lake) -> None:
    """PyIceberg and DuckDB, with filters on widened and new columns, and the ids of an hour."""
    table = load_table(lake.catalog, GOLD_TABLE)
    found = table.scan(selected_fields=SHOWN).to_arrow().sort_by("message_id").select(SHOWN).to_pylist()
    assert [tuple(each.values()) for each in found] == EXPECTED
    sql = connect_to(lake.catalog)
    assert sql.sql(f"SELECT {', '.join(SHOWN)} FROM {GOLD_TABLE} ORDER BY 1").fetchall() == EXPECTED
    for condition, ids in (
        ("source_sequence = 7", ["1", "2"]),
        ("source_sequence > 7", ["3"]),
        ("price > 2", ["3"]),
        ("platform_sequence is null", ["1"]),
        ("platform_sequence = 8", ["2", "3"]),
        ("fee is null", ["3"]),
    ):
        by_pyiceberg = table.scan(condition, selected_fields=("message_id",)).to_arrow()["message_id"].to_pylist()
        by_duckdb = sql.sql(f"SELECT message_id FROM {GOLD_TABLE} WHERE {condition} ORDER BY 1").fetchall()
        assert (sorted(by_pyiceberg), [each for (each,) in by_duckdb]) == (ids, ids), condition
    ids = GoldIds(lake.catalog, "BINANCE")
    assert ids.newest_hours([HOUR + 5]) == [HOUR]
    loaded = {hour: sorted(pa.chunked_array(list(keys)).to_pylist()) for hour, keys in ids.load([HOUR])}
    assert loaded == {HOUR: ["1", "2", "3"]}


def test_old_and_new_files_are_read(evolved: Lake) -> None:
    assert_all_readers_agree(evolved)


def test_audit_reads_them_with_todays_columns(evolved: Lake) -> None:
    """Missing columns are null, narrower ones are cast, extra ones are not read."""
    table = load_table(evolved.catalog, GOLD_TABLE)
    own = gold_definition().arrow_schema
    plan = ReadPlan(GOLD, table, list(table.scan().plan_files()), 0)
    checks = FileChecks(plan)
    batches = list(files.read(plan, own.names, checks, lambda _: None))
    assert {batch.schema for batch in batches} == {own}
    rows = pa.Table.from_batches(batches).select(SHOWN[:4]).sort_by("message_id").to_pylist()
    assert [tuple(each.values()) for each in rows] == [each[:4] for each in EXPECTED]
    assert not any(checks._wrong.values())


def test_compaction_merges_them_and_loses_nothing(evolved: Lake) -> None:
    """Not even the values of columns that today's definition lacks."""
    table = load_table(evolved.catalog, GOLD_TABLE)
    old = live_files(table, "timestamp")
    assert len(old) == 3
    (new,) = Compactor(table, gold_definition()).compact(old)
    written = pq.read_schema(new.file_path.removeprefix("file://"))
    assert written.names == [field.name for field in table.schema().fields]
    with table.transaction() as transaction, transaction.update_snapshot().overwrite() as overwrite:
        for live in old:
            overwrite.delete_data_file(next(t.file for t in table.scan().plan_files() if t.file == live.file))
        overwrite.append_data_file(new)
    assert len(list(load_table(evolved.catalog, GOLD_TABLE).scan().plan_files())) == 1
    assert_all_readers_agree(evolved)


def test_file_without_ids_is_read_by_its_names(lake: Lake, tmp_path: Path) -> None:
    """Another engine may have added it. Only the audit may guess its columns by their names."""
    today = gold_definition()
    lake.evolve(today)
    schema = pa.schema([pa.field("price", pa.decimal128(9, 8)), pa.field("exchange_date", pa.date32())])
    path = tmp_path / "file.parquet"
    pq.write_table(pa.Table.from_pylist([{"price": Decimal(1), "exchange_date": date(2026, 1, 1)}], schema), path)
    file = DataFile.from_args(file_path=f"file://{path}", record_count=1, partition=Record(None, None))
    file.spec_id = 0
    wanted = pa.schema([today.arrow_schema.field(name) for name in ("exchange_date", "symbol", "price")])
    table = load_table(lake.catalog, GOLD_TABLE)
    (batch,) = FileReader(table, wanted, find_by_name=True).read(file)
    assert batch.schema == wanted
    assert batch.to_pylist() == [{"exchange_date": date(2026, 1, 1), "symbol": None, "price": Decimal(1)}]
    with pytest.raises(DataFileError, match="does not have field-ids"):
        list(FileReader(table, wanted).read(file))


def test_rows_of_an_unsorted_file_are_sorted(lake: Lake) -> None:
    """Another engine wrote it: it names no sort order."""
    today = gold_definition()
    lake.evolve(today)
    table = load_table(lake.catalog, GOLD_TABLE)
    times = [NOON.replace(second=second) for second in (5, 1, 3)]
    rows = pa.concat_batches([row(today, str(time), timestamp=time) for time in times])
    (file,) = DataFileWriter(table, replace(today, layer=replace(today.layer, sorted_by=()))).write(rows)
    assert file.sort_order_id is None
    (batch,) = FileReader.of_table(table, today).read(file)
    assert batch["timestamp"].to_pylist() == sorted(times)
