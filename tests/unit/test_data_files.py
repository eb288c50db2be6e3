"""Data files in a real catalog: partitions, sizes, order, ids and statistics, read back by two readers."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.tables import TableDefinition, create, definitions
from k2flow.iceberg.writer import FIELD_ID, DataFileWriter
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import connect_to

BINANCE = find_exchange("binance")
TABLES = BINANCE.tables
SORTED = (GOLD_TABLE,)
NOON = datetime(2026, 3, 14, 12, 0, tzinfo=UTC)
MIB = 1 << 20
STATISTICS = ("record_count", "value_counts", "null_value_counts", "nan_value_counts", "lower_bounds", "upper_bounds")


@pytest.fixture
def wanted() -> dict[str, TableDefinition]:
    return definitions(BINANCE)


@pytest.fixture
def tables(catalog: Catalog, wanted: dict[str, TableDefinition]) -> dict[str, Table]:
    create(catalog, wanted.values())
    return {name: load_table(catalog, name) for name in wanted}


def values(i: int, time: datetime) -> dict[str, Any]:
    """Return a value for each column of all tables in row i: also nulls, empty values and extremes."""
    third = i % 3
    return {
        "message_key": (None, "", "ключ" * 10)[third],
        "avro_payload": (None, b"", b"\xff" * 40)[third],
        "payload": (None, b"", b"\0\xff" * 20)[third],
        "topic": "market.crypto.trades.binance",
        "partition": third,
        "offset": 2**62 + i,
        "kafka_timestamp": None if third == 0 else time,
        "ingestion_timestamp": time + timedelta(microseconds=1),
        "ingestion_date": time.date(),
        "message_id": f"id-{i:06}",
        "trade_id": f"BINANCE-{i}",
        "symbol": ("BTCUSDT", "ETHUSDT", "₿" * 20)[third],
        "exchange": "BINANCE",
        "asset_class": "crypto",
        "timestamp": time,
        "price": (Decimal("0.00000001"), Decimal("9999999999.99999999"), Decimal("64000.5"))[third],
        "quantity": Decimal(i) / 8 + 1,
        "currency": "USDT",
        "side": ("BUY", "SELL")[i % 2],
        "trade_conditions": ([], ["T"], ["", "é", "T"])[third],
        "source_sequence": None if third == 1 else -i,
        "platform_sequence": None,
        "vendor_data": (None, {}, {"b": "1", "a": ""})[third],
        "exchange_date": time.date(),
        "exchange_hour": time.hour,
        "schema_id": (None, -1, 1)[third],
        "reason": ("null_payload", "truncated", "invalid_utf8")[third],
        "detail": f"row {i}",
        "failed_at": time,
        "failed_date": time.date(),
    }


def batch(definition: TableDefinition, times: list[datetime]) -> pa.RecordBatch:
    rows = [values(i, time) for i, time in enumerate(times)]
    columns = [pa.array([row[field.name] for row in rows], field.type) for field in definition.arrow_schema]
    return pa.RecordBatch.from_arrays(columns, schema=definition.arrow_schema)


def scattered(count: int = 60) -> list[datetime]:
    """Return times of several days and hours, unordered, some equal, some before 1970."""
    spread = [timedelta(hours=(7 * i % 5) * 13, seconds=(11 * i) % 17) for i in range(count)]
    return [(datetime(1969, 12, 30, 23, 59, 50, tzinfo=UTC) if i % 4 == 0 else NOON) + spread[i] for i in range(count)]


def local(file: DataFile) -> Path:
    return Path(file.file_path.removeprefix("file://"))


def stored(file: DataFile) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.ParquetFile(local(file)).read().to_pylist()
    return rows


def append(table: Table, files: list[DataFile]) -> None:
    with table.transaction() as transaction, transaction.update_snapshot().fast_append() as update:
        for file in files:
            update.append_data_file(file)


def comparable(rows: list[dict[str, Any]]) -> list[str]:
    """Return rows in an order that does not depend on the reader."""
    return sorted(repr(sorted(row.items())) for row in rows)


@pytest.mark.parametrize("name", TABLES)
def test_each_file_holds_one_partition(tables: dict[str, Table], wanted: dict[str, TableDefinition], name: str) -> None:
    """The rows of a file have the partition values of its metadata; each value has one file; no row is lost."""
    rows = batch(wanted[name], scattered())
    files = DataFileWriter(tables[name], wanted[name]).write(rows)
    found = []
    for file in files:
        own = stored(file)
        columns = [by.column for by in wanted[name].layer.partitioned_by]
        keys = {tuple(row[column] for column in columns) for row in own}
        assert len(keys) == 1
        key = [(v - date(1970, 1, 1)).days if isinstance(v, date) else v for v in keys.pop()]
        assert [file.partition[i] for i in range(len(columns))] == key
        assert file.record_count == len(own)
        assert file.file_size_in_bytes == local(file).stat().st_size
        assert file.spec_id == tables[name].spec().spec_id
        found += own
    partitions = [tuple(file.partition[i] for i in range(len(columns))) for file in files]
    assert len(set(partitions)) == len(partitions) > 4
    assert comparable(found) == comparable(rows.to_pylist())


@pytest.mark.parametrize("name", TABLES)
def test_metadata_equals_that_of_pyicebergs_append(
    tables: dict[str, Table],
    wanted: dict[str, TableDefinition],
    name: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The same rows give the same partitions, and the same counts and bounds of the columns that have them."""
    monkeypatch.setenv("K2FLOW_HOME", str(tmp_path / "other"))
    other = open_catalog(load_settings(exchange_names()))
    create(other, wanted.values())
    theirs = load_table(other, name)
    rows = batch(wanted[name], scattered())
    theirs.append(pa.Table.from_batches([rows]))

    pruned_by = wanted[name].layer.pruned_by
    kept = None if pruned_by is None else {theirs.schema().find_field(column).field_id for column in pruned_by}

    def of_kept(value: Any) -> Any:
        by_column = isinstance(value, Mapping) and kept is not None
        return {column: of for column, of in value.items() if column in kept} if by_column else value

    def described(files: list[DataFile]) -> dict[str, list[Any]]:
        return {repr(file.partition): [of_kept(getattr(file, column)) for column in STATISTICS] for file in files}

    files = DataFileWriter(tables[name], wanted[name]).write(rows)
    append(tables[name], files)
    committed = [task.file for task in tables[name].refresh().scan().plan_files()]
    assert described(committed) == described([task.file for task in theirs.scan().plan_files()])
    assert len(committed) == len(files)
    sizes = {column for file in committed for column in file.column_sizes}
    assert sizes == {column for task in theirs.scan().plan_files() for column in of_kept(task.file.column_sizes)}


@pytest.mark.parametrize("name", TABLES)
def test_types_and_field_ids(tables: dict[str, Table], wanted: dict[str, TableDefinition], name: str) -> None:
    """A file has string, binary, list and map, never large or dictionary types, and each column's field id."""
    (file, *_) = DataFileWriter(tables[name], wanted[name]).write(batch(wanted[name], [NOON] * 5))
    parquet = pq.ParquetFile(local(file))
    assert parquet.schema_arrow.names == wanted[name].arrow_schema.names
    for found, meant in zip(parquet.schema_arrow, wanted[name].arrow_schema, strict=True):
        assert found.type.equals(meant.type), (found, meant)
        assert "large" not in str(found.type)
        assert not pa.types.is_dictionary(found.type)
    schema = tables[name].schema()
    inside = {"trade_conditions": [("element",)], "vendor_data": [("key",), ("value",)]}
    for field in parquet.schema_arrow:
        assert field.metadata[FIELD_ID] == str(schema.find_field(field.name).field_id).encode()
        for (part,) in inside.get(field.name, []):
            own = {"element": "value_field", "key": "key_field", "value": "item_field"}[part]
            wanted_id = schema.find_field(f"{field.name}.{part}").field_id
            assert getattr(field.type, own).metadata[FIELD_ID] == str(wanted_id).encode()
    chunks = [parquet.metadata.row_group(0).column(i) for i in range(parquet.metadata.num_columns)]
    assert {chunk.compression for chunk in chunks} == {"ZSTD"}
    assert {chunk.path_in_schema for chunk in chunks if chunk.has_dictionary_page} <= set(
        wanted[name].repeating_columns
    )


@pytest.mark.parametrize("name", TABLES)
def test_only_files_of_a_sorted_table_name_a_sort_order(
    tables: dict[str, Table], wanted: dict[str, TableDefinition], name: str
) -> None:
    """Gold's files are sorted by `timestamp`. Other files name no sort order and keep their order."""
    rows = batch(wanted[name], scattered())
    files = DataFileWriter(tables[name], wanted[name]).write(rows)
    order = tables[name].metadata.default_sort_order_id if name in SORTED else None
    assert {file.sort_order_id for file in files} == {order}
    place = {repr(row): i for i, row in enumerate(rows.to_pylist())}
    for file in files:
        own = stored(file)
        places = [place[repr(row)] for row in own]
        if name in SORTED:
            assert [(row["timestamp"], at) for row, at in zip(own, places, strict=True)] == sorted(
                (row["timestamp"], at) for row, at in zip(own, places, strict=True)
            )
        else:
            assert places == sorted(places)


@pytest.mark.parametrize("name", [TABLES[0], GOLD_TABLE])
def test_large_batches_are_split_by_size(
    tables: dict[str, Table], wanted: dict[str, TableDefinition], name: str
) -> None:
    """No piece exceeds the target in memory. Together they hold all rows, each sorted if the table is."""
    definition = replace(wanted[name], file_size_mb=1)
    times = [NOON + timedelta(milliseconds=(i * 7919) % 20_000) for i in range(20_000)]
    rows = batch(definition, times)
    files = DataFileWriter(tables[name], definition).write(rows)
    assert len(files) == -(-rows.nbytes // MIB)
    assert len({file.file_path for file in files}) == len(files)
    assert sum(file.record_count for file in files) == rows.num_rows
    found = []
    for file in files:
        table = pq.read_table(local(file), partitioning=None)  # the file alone, not the values of its folders
        assert table.nbytes <= 1.1 * MIB
        found += table.column("offset" if name != GOLD_TABLE else "message_id").to_pylist()
        if name in SORTED:
            moments = table.column("timestamp").to_pylist()
            assert moments == sorted(moments)
    assert len(set(found)) == rows.num_rows


def test_row_larger_than_the_target_is_one_file(tables: dict[str, Table], wanted: dict[str, TableDefinition]) -> None:
    """A message is never split."""
    name = BINANCE.bronze
    definition = replace(wanted[name], file_size_mb=1)
    rows = batch(definition, [NOON] * 3)
    big = pa.array([b"x" * (3 * MIB)] * 3)
    rows = rows.set_column(rows.schema.get_field_index("avro_payload"), "avro_payload", big)
    files = DataFileWriter(tables[name], definition).write(rows)
    assert [file.record_count for file in files] == [1, 1, 1]


@pytest.mark.parametrize("name", TABLES)
def test_rows_are_read_back_unchanged(
    catalog: Catalog, tables: dict[str, Table], wanted: dict[str, TableDefinition], name: str
) -> None:
    """PyIceberg and DuckDB read the same rows."""
    rows = batch(wanted[name], scattered())
    append(tables[name], DataFileWriter(tables[name], wanted[name]).write(rows))
    table = load_table(catalog, name)
    by_pyiceberg = table.scan().to_arrow()
    assert comparable(by_pyiceberg.to_pylist()) == comparable(rows.to_pylist())
    by_duckdb = connect_to(catalog).sql(f"SELECT * FROM {name}").to_arrow_table()
    assert comparable(by_duckdb.to_pylist()) == comparable(rows.to_pylist())
    kinds = {"exchange_date": "1969-12-31", "failed_date": "1969-12-31", "ingestion_date": "1969-12-31"}
    for column, value in kinds.items():
        if column in rows.schema.names:
            one_day = table.scan(row_filter=f"{column} = '{value}'").to_arrow()
            day = date.fromisoformat(value)
            assert one_day.num_rows == rows[column].to_pylist().count(day) > 0


def test_no_rows_give_no_file(tables: dict[str, Table], wanted: dict[str, TableDefinition], tmp_path: Path) -> None:
    """An empty batch writes nothing."""
    for name in TABLES:
        assert DataFileWriter(tables[name], wanted[name]).write(batch(wanted[name], [])) == []
    assert not list(tmp_path.rglob("*.parquet"))


def test_slice_writes_only_its_rows(tables: dict[str, Table], wanted: dict[str, TableDefinition]) -> None:
    """A slice of a longer batch: the file has its rows, and only their statistics."""
    name = BINANCE.silver
    rows = batch(wanted[name], [NOON + timedelta(seconds=i) for i in range(30)])
    (file,) = DataFileWriter(tables[name], wanted[name]).write(rows.slice(10, 5))
    assert comparable(stored(file)) == comparable(rows.to_pylist()[10:15])
    source_sequence = tables[name].schema().find_field("source_sequence").field_id
    assert file.null_value_counts[source_sequence] == 2
    message_id = tables[name].schema().find_field("message_id").field_id
    assert (file.lower_bounds[message_id], file.upper_bounds[message_id]) == (b"id-000010", b"id-000014")


TIMES = st.lists(
    st.datetimes(datetime(1969, 12, 31, 20), datetime(1970, 1, 1, 4)).map(lambda t: t.replace(tzinfo=UTC)),
    min_size=1,
    max_size=12,
)


@given(times=TIMES)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_times_are_split_by_hour_and_sorted(
    tables: dict[str, Table], wanted: dict[str, TableDefinition], times: list[datetime]
) -> None:
    """In any order of rows: one sorted file for each hour, each row once."""
    files = DataFileWriter(tables[GOLD_TABLE], wanted[GOLD_TABLE]).write(batch(wanted[GOLD_TABLE], times))
    assert len(files) == len({(time.date(), time.hour) for time in times})
    found = [[row["timestamp"] for row in stored(file)] for file in files]
    assert all(own == sorted(own) for own in found)
    assert sorted(time for own in found for time in own) == sorted(times)


def test_storage_that_cannot_be_written_is_one_line(
    tables: dict[str, Table], wanted: dict[str, TableDefinition]
) -> None:
    """The error of an outage, for which the flow stops with one line."""
    name = BINANCE.silver
    folder = Path(tables[name].location().removeprefix("file://"))
    (folder / "data").write_text("in the way")
    with pytest.raises(CatalogError, match="storage cannot be used") as error:
        DataFileWriter(tables[name], wanted[name]).write(batch(wanted[name], [NOON]))
    assert "\n" not in str(error.value)
