"""The bounds of data files: no value lies outside them, whatever the values are, and readers find every row by them."""

import random
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog
from pyiceberg.conversions import from_bytes
from pyiceberg.expressions import EqualTo
from pyiceberg.table import Table
from pyiceberg.types import BinaryType, StringType

from k2flow.compat.pyiceberg.statistics import upper_bound_text
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import MAX_TIME_US, MIN_TIME_US
from k2flow.query.connection import connect_tables
from tests.integration.damage import add_file
from tests.property.test_avro_decoder import PROFILE

BINANCE = find_exchange("binance")
BORDERS = "\0\x01\x7f\x80\u07ff\u0800\ud7ff\ue000\ufffd\uffff\U00010000\U0010fffe\U0010ffff a"
TEXTS = st.text(st.one_of(st.sampled_from(BORDERS), st.characters(exclude_categories=["Cs"])), max_size=40)
BYTES = st.binary(max_size=40) | st.lists(st.sampled_from((0, 1, 127, 128, 254, 255)), max_size=40).map(bytes)
LONG = 5_000  # characters: Parquet keeps no bounds of so long a value


@given(TEXTS, st.integers(1, 20))
@example("\ufffd" * 15 + "\ud7ff", 16)
@example("\ufffd" * 15 + "\ud7ff" + "a", 16)
@example("\U0010ffff" * 17, 16)
@example("a" + "\U0010ffff" * 20, 16)
def test_upper_bound_of_a_text_is_the_least_short_one(text: str, length: int) -> None:
    """Bytes of UTF-8 order texts as Iceberg does."""
    bound = upper_bound_text(text, length)
    if bound is None:
        assert len(text) > length
        assert set(text[:length]) == {"\U0010ffff"}
        return
    assert len(bound) <= length
    assert bound.encode() >= text.encode()
    assert bound == text or bound[:-1] == text[: len(bound) - 1]


@pytest.fixture
def bronze(catalog: Catalog) -> Table:
    create(catalog, definitions(BINANCE).values())
    return load_table(catalog, BINANCE.bronze)


def rows(keys: list[str | None], payloads: list[bytes | None]) -> pa.RecordBatch:
    schema = definitions(BINANCE)[BINANCE.bronze].arrow_schema
    base = {"topic": "t", "partition": 0, "ingestion_date": 20_000, "ingestion_timestamp": 20_000 * 86_400_000_000}
    values: list[dict[str, Any]] = [
        {**base, "message_key": key, "avro_payload": payload, "offset": i}
        for i, (key, payload) in enumerate(zip(keys, payloads, strict=True))
    ]
    return pa.RecordBatch.from_pylist(values, schema=schema)


def assert_bounded(table: Table, groups: list[pa.RecordBatch]) -> None:
    """Write a file with a row group for each batch, and compare its bounds with the rows."""
    file = DataFileWriter(table, definitions(BINANCE)[BINANCE.bronze]).write_stream(iter(groups))
    for name, kind in (("message_key", StringType()), ("avro_payload", BinaryType())):
        column = table.schema().find_field(name).field_id
        held = [value for group in groups for value in group.column(name).to_pylist() if value is not None]
        as_bytes = sorted(value.encode() if isinstance(value, str) else value for value in held)
        lower, upper = (file.lower_bounds or {}).get(column), (file.upper_bounds or {}).get(column)
        assert lower is None or (from_bytes(kind, lower) is not None and lower <= as_bytes[0])
        assert upper is None or (from_bytes(kind, upper) is not None and as_bytes[-1] <= upper)
        if held and max(map(len, as_bytes)) < 100:
            assert lower is not None
            first = as_bytes[-1][:16] if isinstance(held[0], bytes) else as_bytes[-1].decode()[:16]
            assert upper is not None or set(first) in ({255}, {"\U0010ffff"})


@given(data=st.data())
@PROFILE
def test_bounds_hold_for_any_text_and_bytes(bronze: Table, data: st.DataObject) -> None:
    """Also in files of several row groups, as compaction writes them; some have no bounds."""
    groups = []
    for _ in range(data.draw(st.integers(1, 3))):
        n = data.draw(st.integers(1, 4))
        keys = data.draw(st.lists(TEXTS | st.none() | st.just("\ud7ff" * LONG), min_size=n, max_size=n))
        payloads = data.draw(st.lists(BYTES | st.none() | st.just(b"\xff" * LONG), min_size=n, max_size=n))
        groups.append(rows(keys, payloads))
    assert_bounded(bronze, groups)


def test_row_group_without_bounds_leaves_the_file_without_them(bronze: Table) -> None:
    """The bounds of the other groups would exclude its rows."""
    assert_bounded(bronze, [rows(["z" * LONG, None], [b"z" * LONG, b""]), rows(["b"], [b"b"])])


def test_two_readers_find_every_row_by_its_value(bronze: Table, seed: int) -> None:
    chance = random.Random(seed)
    keys = ["\ufffd" * 15 + "\ud7ff", "\ufffd" * 15 + "\ud7ff" + "a", "\U0010ffff" * 17, "z" * LONG, "", "\0", "a\0b"]
    keys += ["".join(chance.choices(BORDERS, k=chance.randrange(40))) for _ in range(18)]
    writer = DataFileWriter(bronze, definitions(BINANCE)[BINANCE.bronze])
    for i in range(0, len(keys), 5):
        add_file(bronze, writer.write_stream(iter([rows([key], [key.encode()]) for key in keys[i : i + 5]])))
        bronze.refresh()
    connection = connect_tables({BINANCE.bronze: bronze})
    for key in set(keys):
        wanted = keys.count(key)
        assert bronze.scan(EqualTo("message_key", key)).to_arrow().num_rows == wanted
        for column, value in (("message_key", key), ("avro_payload", key.encode())):
            found = connection.execute(f"SELECT count(*) FROM {BINANCE.bronze} WHERE {column} = ?", [value]).fetchone()
            assert found == (wanted,)


@pytest.mark.parametrize("microseconds", [MAX_TIME_US + 1, MIN_TIME_US - 1, 2**63 - 1, -(2**63)])
def test_time_that_python_cannot_express_has_no_bounds(bronze: Table, microseconds: int) -> None:
    """Compaction may meet it in another engine's file. The other columns keep their bounds."""
    batch = rows(["a", "b"], [b"a", b"b"])
    times = pa.array([0, microseconds]).cast(pa.timestamp("us", "UTC"))
    at = batch.schema.get_field_index("kafka_timestamp")
    batch = batch.set_column(at, batch.schema.field(at), times)
    file = DataFileWriter(bronze, definitions(BINANCE)[BINANCE.bronze]).write_stream(iter([batch]))
    ids = {name: bronze.schema().find_field(name).field_id for name in ("kafka_timestamp", "message_key")}
    assert file.upper_bounds is not None
    assert ids["kafka_timestamp"] not in {*file.lower_bounds, *file.upper_bounds}
    assert file.upper_bounds[ids["message_key"]] == b"b"
    assert file.null_value_counts[ids["kafka_timestamp"]] == 0
