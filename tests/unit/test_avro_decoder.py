"""The Avro decoder: types, defects with their position and detail, blocks, resolution and hostile records."""

import io
import re
from datetime import UTC, date, datetime, time
from decimal import Decimal
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest

from k2flow.avro.blocks import MAX_EMPTY_ITEMS
from k2flow.avro.decoder import AvroDecoder
from k2flow.errors import SchemaError
from k2flow.records import DecodedRecords, Defect
from k2flow.trades.schema import trade_schema

SIDE = {"type": "enum", "name": "Side", "symbols": ["BUY", "SELL", "SELL_SHORT", "UNKNOWN"]}


def record(*types: Any, **named: Any) -> dict[str, Any]:
    """Create a record schema with the fields a, b, ... or the named fields."""
    fields = [{"name": name, "type": kind} for name, kind in zip("abcdefgh", types, strict=False)]
    return {"type": "record", "name": "R", "fields": fields + [{"name": n, "type": kind} for n, kind in named.items()]}


def logical(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


def decode(schema: Any, *payloads: bytes, reader: Any = None, skip: int = 0) -> DecodedRecords:
    decoded = AvroDecoder(schema, reader).decode(pa.array(payloads, pa.binary()), skip)
    decoded.batch.validate(full=True)
    assert decoded.batch.num_rows == len(payloads)
    return decoded


def values(schema: Any, *payloads: bytes, reader: Any = None) -> list[Any]:
    """Decode good payloads of a schema that is not a record."""
    decoded = decode(schema, *payloads, reader=reader)
    assert not decoded.defect.any(), [decoded.detail(row) for row in range(len(payloads))]
    return list(decoded.batch.column("value").to_pylist())


def write(schema: Any, *records: Any) -> list[bytes]:
    parsed, out = fastavro.parse_schema(schema), []
    for one in records:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, parsed, one)
        out.append(stream.getvalue())
    return out


def fastavro_reads(schema: Any, payload: bytes, reader: Any = None) -> Any:
    return fastavro.schemaless_reader(io.BytesIO(payload), schema, reader)


def first_defect(decoded: DecodedRecords, row: int = 0) -> tuple[Defect, int, str]:
    return Defect(decoded.defect[row]), int(decoded.position[row]), decoded.detail(row)


# Types


@pytest.mark.parametrize(
    ("schema", "payload", "value", "kind"),
    [
        ("null", b"", None, pa.null()),
        ("boolean", b"\x01", True, pa.bool_()),
        ("int", b"\xff\xff\xff\xff\x0f", -(2**31), pa.int32()),
        ("int", b"\x80\x00", 0, pa.int32()),
        ("long", b"\xfe" + b"\xff" * 8 + b"\x01", 2**63 - 1, pa.int64()),
        ("long", b"\xff" * 9 + b"\x01", -(2**63), pa.int64()),
        ("long", b"\x80" * 9 + b"\x00", 0, pa.int64()),
        ("float", b"\x00\x00\xc0\x3f", 1.5, pa.float32()),
        ("double", b"\x00" * 6 + b"\xf8\xbf", -1.5, pa.float64()),
        ("bytes", b"\x04\xff\x00", b"\xff\x00", pa.binary()),
        ("string", b"\x0a\xe2\x82\xacab", "€ab", pa.string()),
        ({"type": "fixed", "name": "F", "size": 3}, b"abc", b"abc", pa.binary(3)),
        ({"type": "fixed", "name": "F", "size": 0}, b"", b"", pa.binary(0)),
        (SIDE, b"\x04", "SELL_SHORT", pa.string()),
        ({"type": "array", "items": "int"}, b"\x04\x02\x04\x00", [1, 2], pa.list_(pa.int32())),
        ({"type": "map", "values": "int"}, b"\x02\x02k\x04\x00", [("k", 2)], pa.map_(pa.string(), pa.int32())),
        (["null", "long"], b"\x00", None, pa.int64()),
        (["long", "null"], b"\x00\x06", 3, pa.int64()),
        (["null"], b"\x00", None, pa.null()),
        (logical("int", "date"), b"\x02", date(1970, 1, 2), pa.date32()),
        (logical("int", "time-millis"), b"\xd0\x0f", time(0, 0, 1), pa.time32("ms")),
        (logical("long", "time-micros"), b"\x02", time(0, 0, 0, 1), pa.time64("us")),
        (logical("long", "timestamp-millis"), b"\x04", datetime(1970, 1, 1, 0, 0, 0, 2000, UTC),
         pa.timestamp("ms", "UTC")),
        (logical("long", "timestamp-micros"), b"\x03", datetime(1969, 12, 31, 23, 59, 59, 999998, UTC),
         pa.timestamp("us", "UTC")),
        (logical("long", "local-timestamp-millis"), b"\x04", datetime(1970, 1, 1, 0, 0, 0, 2000), pa.timestamp("ms")),
        (logical("long", "local-timestamp-micros"), b"\x04", datetime(1970, 1, 1, 0, 0, 0, 2), pa.timestamp("us")),
        (logical("string", "uuid"), b"\x48" + b"0" * 8 + (b"-" + b"a" * 4) * 3 + b"-" + b"F" * 12,
         "00000000-aaaa-aaaa-aaaa-FFFFFFFFFFFF", pa.string()),
        (logical("string", "no-such-type"), b"\x02x", "x", pa.string()),
        (logical("int", "timestamp-micros"), b"\x02", 1, pa.int32()),
        (logical("bytes", "decimal"), b"\x02x", b"x", pa.binary()),
    ],
)  # fmt: skip
def test_each_type_has_its_arrow_type_and_value(schema: Any, payload: bytes, value: Any, kind: pa.DataType) -> None:
    assert AvroDecoder(schema).schema == pa.schema([("value", kind)])
    assert values(schema, payload, payload) == [value, value]


@pytest.mark.parametrize("unit", ["nanos", "micros", "millis"])
def test_timestamps_hold_any_int64(unit: str) -> None:
    for prefix in ("timestamp", "local-timestamp"):
        extremes = (b"\xff" * 9 + b"\x01", b"\xfe" + b"\xff" * 8 + b"\x01")
        decoded = decode(logical("long", f"{prefix}-{unit}"), *extremes)
        assert decoded.batch.column(0).cast(pa.int64()).to_pylist() == [-(2**63), 2**63 - 1]


@pytest.mark.parametrize(
    ("precision", "kind"),
    [(4, pa.decimal128(4, 2)), (18, pa.decimal128(18, 2)), (38, pa.decimal128(38, 2)), (76, pa.decimal256(76, 2))],
)
def test_decimals_of_any_precision_and_length(precision: int, kind: pa.DataType) -> None:
    schema = logical("bytes", "decimal", precision=precision, scale=2)
    most = 10**precision - 1
    numbers = [0, 1, -1, 127, -128, 128, most, -most]
    payloads = []
    for number in numbers:
        for extra in (0, 1, 7, 8, 9, 31, 55):  # sign-extended
            raw = number.to_bytes((number.bit_length() + 8) // 8 + extra, "big", signed=True)
            payloads.append(
                bytes([2 * len(raw)]) + raw if len(raw) < 64 else bytes([2 * len(raw) % 128 + 128, 1]) + raw
            )
    found = decode(schema, *payloads, b"\x00").batch.column(0)
    assert found.type == kind
    assert [int(value.scaleb(2)) if precision < 28 else value for value in found.to_pylist()[::7]] == [
        number if precision < 28 else Decimal(f"{number}E-2") for number in [*numbers, 0]
    ]
    for number in (most + 1, -most - 1):
        size = (number.bit_length() + 8) // 8
        decoded = decode(schema, bytes([2 * size]) + number.to_bytes(size, "big", signed=True), b"\x02\x05")
        shown = f"{'-' if number < 0 else ''}1{'0' * (precision - 2)}.00 at byte 1"
        limit = f"{'9' * (precision - 2)}.99"
        text = f"value: {shown} does not fit into decimal({precision}, 2): the limit is {limit}"
        assert first_defect(decoded) == (Defect.MALFORMED, 1, text)
        assert decoded.batch.column(0)[1].as_py() == Decimal("0.05")


def test_decimals_in_fixed_bytes() -> None:
    schema = {"type": "fixed", "name": "F", "size": 9, "logicalType": "decimal", "precision": 19, "scale": 0}
    assert values(schema, (-5).to_bytes(9, "big", signed=True), (10**18).to_bytes(9, "big")) == [-5, 10**18]
    assert decode(schema, (10**19).to_bytes(9, "big")).defect[0] == Defect.MALFORMED


def test_unions_of_several_types_are_structs() -> None:
    schema = ["null", "int", {"type": "array", "items": "string"}]
    assert AvroDecoder(schema).schema.field(0).type == pa.struct(
        [("member0", pa.int32()), ("member1", pa.list_(pa.string()))]
    )
    assert values(schema, b"\x02\x04", b"\x00", b"\x04\x02\x02x\x00") == [
        {"member0": 2, "member1": None},
        None,
        {"member0": None, "member1": ["x"]},
    ]


def test_nested_records_and_reused_names() -> None:
    point = {
        "type": "record",
        "name": "Point",
        "namespace": "geo",
        "fields": [{"name": "x", "type": "int"}, {"name": "n", "type": ["null", "string"]}],
    }
    schema = record(point, {"type": "map", "values": {"type": "array", "items": "geo.Point"}}, ["null", "geo.Point"])
    rows = [
        {"a": {"x": 1, "n": None}, "b": {"k": [{"x": 2, "n": "é"}, {"x": 3, "n": None}], "l": []},
         "c": {"x": 4, "n": "y"}},
        {"a": {"x": 5, "n": ""}, "b": {}, "c": None},
    ]  # fmt: skip
    decoded = decode(schema, *write(schema, *rows))
    assert not decoded.defect.any()
    assert decoded.batch.to_pylist(maps_as_pydicts="strict") == rows


def test_record_without_fields_keeps_its_rows() -> None:
    decoded = decode(record(), b"", b"\x00", b"")
    assert decoded.batch.num_columns == 0
    assert decoded.defect.tolist() == [Defect.NONE, Defect.TRAILING_BYTES, Defect.NONE]


def test_payloads_may_be_sliced_and_large() -> None:
    payloads = [b"zz\x02a", b"zz\x04bc", b"zz\x06def"]
    for kind in (pa.binary(), pa.large_binary()):
        whole = pa.array([b"junk", *payloads, b"junk"], kind)
        assert AvroDecoder("string").decode(whole.slice(1, 3), skip=2).batch.column(0).to_pylist() == ["a", "bc", "def"]
        empty = AvroDecoder(record("string", ["null", "int"])).decode(whole.slice(2, 0))
        assert (empty.batch.num_rows, len(empty.defect)) == (0, 0)
    chunk = pa.array([], pa.binary())
    assert AvroDecoder(trade_schema()).decode(chunk, 5).batch.schema == AvroDecoder(trade_schema()).schema


def test_arrow_types_of_a_trade() -> None:
    schema = AvroDecoder(trade_schema()).schema
    assert schema.field("price").type == pa.decimal128(18, 8)
    assert schema.field("timestamp").type == pa.timestamp("us", "UTC")
    assert schema.field("side").type == pa.string()
    assert schema.field("trade_conditions").type == pa.list_(pa.string())
    assert schema.field("vendor_data").type == pa.map_(pa.string(), pa.string())


# Defects


@pytest.mark.parametrize(
    ("schema", "payload", "defect", "position", "detail"),
    [
        (record("long"), b"", "truncated", 0, "field `a`: expected a long at byte 0, 0 left"),
        (record("long", "long"), b"\x02\x80\x80", "truncated", 1, "field `b`: expected a long at byte 1, 2 left"),
        (record("string"), b"\x50" + b"x" * 12, "truncated", 1, "field `a`: expected 40 bytes at byte 1, 12 left"),
        (record("string"), b"\x80", "truncated", 0, "field `a`: expected a length at byte 0, 1 left"),
        (record("double"), b"\x00" * 7, "truncated", 0, "field `a`: expected 8 bytes at byte 0, 7 left"),
        (record("boolean"), b"", "truncated", 0, "field `a`: expected a boolean at byte 0, 0 left"),
        (record(["null", "int"]), b"\x02", "truncated", 1, "field `a`: expected an int at byte 1, 0 left"),
        (record({"type": "array", "items": "int"}), b"\x06\x02\x02", "truncated", 1,
         "field `a`: expected 3 items of at least 1 bytes at byte 1, 2 left"),
        (record({"type": "array", "items": "int"}), b"\x02\x02", "truncated", 2,
         "field `a`: expected a block count at byte 2, 0 left"),
        (record("long"), b"\x80" * 10 + b"\x00", "malformed", 0, "field `a`: a long of more than 64 bits at byte 0"),
        (record("string"), b"\x03ab", "malformed", 0, "field `a`: length -2 at byte 0"),
        (record(["null", "int"]), b"\x04", "malformed", 0, "field `a`: union branch 2 of 2 at byte 0"),
        (record({"type": "array", "items": "int"}), b"\xfe\xff\xff\xff\x7f\x00", "malformed", 0,
         "field `a`: a block of 17179869183 items at byte 0"),
        (record({"type": "array", "items": "int"}), b"\xff" * 9 + b"\x01\x00", "malformed", 0,
         "field `a`: a block of -9223372036854775808 items at byte 0"),
        (record(side=SIDE), b"\x0e", "invalid_enum", 0, "field `side`: enum index 7 of 4 symbols at byte 0"),
        (record("string"), b"\x06a\xffb", "invalid_utf8", 2, "field `a`: invalid UTF-8 at byte 2"),
        (record("string"), b"\x06a\xe2\x82", "invalid_utf8", 2, "field `a`: invalid UTF-8 at byte 2"),
        (record({"type": "map", "values": "int"}), b"\x02\x02\xff\x00\x00", "invalid_utf8", 2,
         "field `a.key`: invalid UTF-8 at byte 2"),
        (record({"type": "array", "items": record("string") | {"name": "I"}}), b"\x02\x02\xff\x00", "invalid_utf8", 2,
         "field `a.item.a`: invalid UTF-8 at byte 2"),
        (record("int"), b"\x02\x00\x00", "trailing_bytes", 1, "record: 2 trailing bytes from byte 1"),
    ],
)  # fmt: skip
def test_each_defect_has_its_position_and_detail(
    schema: Any, payload: bytes, defect: str, position: int, detail: str
) -> None:
    assert first_defect(decode(schema, payload)) == (Defect[defect.upper()], position, detail)


@pytest.mark.parametrize(
    ("schema", "payload"),
    [
        ("boolean", b"\x02"),
        ("long", b"\xff" * 9 + b"\x03"),
        ("long", b"\x80" * 10 + b"\x00"),
        ("int", b"\x80\x80\x80\x80\x10"),
        (SIDE, b"\x01"),
        (["null", "int"], b"\x03"),
        (logical("bytes", "decimal", precision=2), b"\x02\x64"),
        (logical("string", "uuid"), b"\x40" + b"a" * 32),
        (logical("int", "time-millis"), b"\x01"),
        ({"type": "array", "items": "null"}, b"\x82\x10\x00"),
        ({"type": "array", "items": "int"}, b"\xff" * 9 + b"\x01" + b"\x00\x00"),
    ],
    ids=["boolean 2", "65 bits", "11 bytes", "33 bits", "enum -1", "branch -2", "3 digits of 2", "uuid without dashes",
         "time before midnight", "1025 items of no bytes", "block of -2^63"],
)  # fmt: skip
def test_decoder_rejects_defects_that_fastavro_accepts(schema: Any, payload: bytes) -> None:
    """All such cases; in all others the property tests require the same verdict of both."""
    fastavro_reads(schema, payload)
    assert decode(schema, payload).defect[0] in (Defect.MALFORMED, Defect.INVALID_ENUM)


def test_last_entry_of_a_duplicate_key_wins() -> None:
    """Readers of Parquet reject a whole file because of one such map."""
    schema, payload = {"type": "map", "values": "int"}, b"\x06\x02k\x02\x02j\x06\x02k\x04\x00"
    other = b"\x04\x02j\x02\x02k\x02\x00"
    assert values(schema, payload, other, b"\x00") == [[("j", 3), ("k", 2)], [("j", 1), ("k", 1)], []]
    assert fastavro_reads(schema, payload) == {"j": 3, "k": 2}


def test_duplicate_key_among_200_keys() -> None:
    keys = [f"{i:03}" for i in range(200)]
    entries = b"".join(b"\x06" + key.encode() + b"\x02" for key in keys)
    last = b"\x06000\x04"
    payload = b"\x92\x03" + entries + last + b"\x00"
    (found,) = values({"type": "map", "values": "int"}, payload)
    assert found == [*((key, 1) for key in keys[1:]), ("000", 2)]


def test_invalid_times_and_uuids_are_rejected_as_by_fastavro() -> None:
    for schema, payload in (
        (logical("int", "time-millis"), b"\x80\xb0\xb3\x52"),
        (logical("string", "uuid"), b"\x02x"),
    ):
        with pytest.raises(ValueError, match=r"hour|UUID"):
            fastavro_reads(schema, payload)
        assert decode(schema, payload).defect[0] == Defect.MALFORMED


def test_first_defect_in_the_bytes_wins() -> None:
    schema = record("string", "string", SIDE, "long")
    decoded = decode(
        schema,
        b"\x02\xff" + b"\x02\xfe" + b"\x0e",  # UTF-8, UTF-8, enum, and cut off
        b"\x02x" + b"\x02\xfe" + b"\x0e",
        b"\x02x" + b"\x02x" + b"\x0e",
        b"\x02x" + b"\x02x" + b"\x00",
    )
    assert [Defect(code).name for code in decoded.defect] == [
        "INVALID_UTF8",
        "INVALID_UTF8",
        "INVALID_ENUM",
        "TRUNCATED",
    ]
    assert decoded.position.tolist() == [1, 3, 4, 5]
    assert [decoded.detail(row).split(":")[0] for row in range(4)] == [
        "field `a`",
        "field `b`",
        "field `c`",
        "field `d`",
    ]


def test_bad_record_does_not_affect_its_neighbours() -> None:
    schema = record("string", {"type": "map", "values": "string"}, ["null", "long"])
    rows = [{"a": f"text {i}", "b": {"k": "v" * i, "€": str(i)}, "c": i or None} for i in range(50)]
    payloads = write(schema, *rows)
    mixed = [
        payload for good in payloads for payload in (good, good[:-2], b"", b"\xff" * 12, good[:3] + b"\xff" + good[4:])
    ]
    decoded = decode(schema, *mixed)
    assert not decoded.defect[::5].any()
    assert decoded.defect.reshape(50, 5)[:, 1:].all()
    assert decoded.batch.take(pa.array(range(0, 250, 5))).to_pylist(maps_as_pydicts="strict") == rows


def test_positions_include_the_skipped_bytes() -> None:
    assert first_defect(decode("int", b"12345", skip=5))[:2] == (Defect.TRUNCATED, 5)
    assert first_defect(decode("int", b"123", skip=5))[:2] == (Defect.TRUNCATED, 3)
    assert first_defect(decode(SIDE, b"12345\x0e", skip=5))[1:] == (5, "value: enum index 7 of 4 symbols at byte 5")


# Blocks of arrays and maps


def test_any_number_of_blocks_with_and_without_size() -> None:
    schema = {"type": "array", "items": "string"}
    assert values(
        schema,
        b"\x02\x02a\x04\x02b\x02c\x00",
        b"\x03\x08\x02a\x02b\x00",
        b"\x00",
        b"\x01\x04\x02a" + b"\x02\x02b" + b"\x03\x00\x02c\x02d\x00",  # the size of the last block is not checked
    ) == [["a", "b", "c"], ["a", "b"], [], ["a", "b", "c", "d"]]
    assert fastavro_reads(schema, b"\x03\x00\x02c\x02d\x00") == ["c", "d"]


@pytest.mark.parametrize("one_by_one", [False, True])
def test_very_long_arrays_and_maps(one_by_one: bool) -> None:
    schema = record({"type": "array", "items": "string"}, {"type": "map", "values": ["null", "long"]})
    n = 20_000
    if one_by_one:
        array = b"".join(b"\x02\x02" + bytes([97 + i % 26]) for i in range(n)) + b"\0"
    else:
        array = b"\xc0\xb8\x02" + b"".join(b"\x02" + bytes([97 + i % 26]) for i in range(n)) + b"\0"
    long = array + b"\x02\x02k\x02\x08\0"
    decoded = decode(schema, b"\0\0", long, long[:-1] + b"\x02", b"\x02\x02x\0\0")
    assert decoded.defect.tolist() == [0, 0, Defect.TRUNCATED, 0]
    assert decoded.batch.column("a")[1].as_py() == [chr(97 + i % 26) for i in range(n)]
    assert decoded.batch.column("a")[3].as_py() == ["x"]
    assert decoded.batch.column("b")[1].as_py() == [("k", 4)]


def test_defect_deep_in_a_long_array_has_its_position() -> None:
    items = b"".join(b"\x02x" for _ in range(30_000))
    damaged = items[:40_001] + b"\xff" + items[40_002:]
    head = b"\xe0\xd4\x03"
    decoded = decode({"type": "array", "items": "string"}, head + items + b"\0", head + damaged + b"\0")
    assert first_defect(decoded, 1)[:2] == (Defect.INVALID_UTF8, 40_001 + 3)
    assert len(decoded.batch.column(0)[0]) == 30_000


# Length and count bombs


@pytest.mark.parametrize(
    ("schema", "payload", "defect"),
    [
        ("bytes", b"\xfe" + b"\xff" * 8 + b"\x01", Defect.TRUNCATED),
        ("string", b"\x80\x80\x80\x80\x80\x80\x80\x80\x40", Defect.TRUNCATED),
        ({"type": "array", "items": "null"}, b"\x80\x80\x80\x80\x80\x80\x80\x80\x20\x00", Defect.MALFORMED),
        ({"type": "array", "items": record() | {"name": "Empty"}}, b"\x80\x80\x40\x00", Defect.MALFORMED),
        ({"type": "array", "items": {"type": "array", "items": "null"}}, b"\x04\x02\x00\x82\x10\x00", Defect.MALFORMED),
        ({"type": "array", "items": "long"}, b"\x80\x80\x80\x80\x80\x80\x80\x80\x20\x00", Defect.MALFORMED),
        ({"type": "map", "values": "string"}, b"\x80\xa8\xd6\xb9\x07\x00", Defect.TRUNCATED),
        ({"type": "map", "values": "null"}, b"\x80\xa8\xd6\xb9\x07\x00\x00", Defect.TRUNCATED),
    ],
)
def test_bombs_allocate_no_memory_for_claimed_sizes(schema: Any, payload: bytes, defect: Defect) -> None:
    before = pa.total_allocated_bytes()
    decoded = decode(schema, *[payload] * 100)
    assert set(decoded.defect.tolist()) == {defect}
    assert pa.total_allocated_bytes() - before < 1 << 20


def test_items_without_bytes_have_a_limit() -> None:
    schema = {"type": "array", "items": "null"}
    assert values(schema, b"\x06\x02\x00", b"\x00") == [[None] * 4, []]
    assert values(schema, b"\x80\x10\x00") == [[None] * MAX_EMPTY_ITEMS]
    assert first_defect(decode(schema, b"\x80\x10\x02\x00"))[:2] == (Defect.MALFORMED, 2)


# Resolution


def with_fields(*fields: Any, **more: Any) -> dict[str, Any]:
    return {
        "type": "record",
        "name": "R",
        "fields": [{"name": name, "type": kind, **rest} for name, kind, rest in fields],
        **more,
    }


def resolved(writer: Any, reader: Any, *rows: Any) -> list[Any]:
    """Decode rows by a reader's schema, and check that fastavro reads the same."""
    payloads = write(writer, *rows)
    decoded = decode(writer, *payloads, reader=reader)
    assert not decoded.defect.any(), decoded.detail(0)
    found = list(decoded.batch.to_pylist(maps_as_pydicts="strict"))
    assert found == [fastavro_reads(writer, payload, reader) for payload in payloads]
    return found


def test_fields_are_matched_by_name_or_alias_dropped_or_added() -> None:
    writer = with_fields(("a", "int", {}), ("gone", "string", {}), ("old", "string", {}))
    reader = with_fields(
        ("new", "string", {"aliases": ["old"]}),
        ("n", ["null", "int"], {"default": None}),
        ("a", "int", {}),
        ("s", "string", {"default": "é"}),
        ("l", {"type": "array", "items": "long"}, {"default": [1, 2]}),
    )
    assert resolved(writer, reader, {"a": 1, "gone": "x", "old": "y"}, {"a": 2, "gone": "", "old": ""}) == [
        {"new": "y", "n": None, "a": 1, "s": "é", "l": [1, 2]},
        {"new": "", "n": None, "a": 2, "s": "é", "l": [1, 2]},
    ]


def test_dropped_fields_are_checked() -> None:
    decoded = decode(record("int", "string"), b"\x02\x02\xff", b"\x02\x08ab", b"\x02\x02x", reader=record("int"))
    assert decoded.defect.tolist() == [Defect.INVALID_UTF8, Defect.TRUNCATED, Defect.NONE]
    assert decoded.detail(0) == "field `b`: invalid UTF-8 at byte 2"
    assert decoded.batch.column("a")[2].as_py() == 1


@pytest.mark.parametrize(
    ("schema", "default", "value"),
    [
        ("boolean", True, True),
        ("double", 1, 1.0),
        ("bytes", "\xff\x00", b"\xff\x00"),
        ({"type": "fixed", "name": "F", "size": 2}, "ab", b"ab"),
        (logical("bytes", "decimal", precision=38, scale=2), "\x01", Decimal("0.01")),
        (logical("long", "timestamp-micros"), 1, datetime(1970, 1, 1, 0, 0, 0, 1, UTC)),
        (SIDE, "SELL", "SELL"),
        ({"type": "map", "values": "int"}, {"k": 1}, [("k", 1)]),
        (record("int") | {"name": "I"}, {"a": 3}, {"a": 3}),
        (["int", "null"], 5, 5),
        (["null", "int", "string"], "x", {"member0": None, "member1": "x"}),
        (["null", "int", "string"], None, None),
    ],
)
def test_added_fields_have_their_default(schema: Any, default: Any, value: Any) -> None:
    reader = with_fields(("a", "int", {}), ("added", schema, {"default": default}))
    decoded = decode(record("int"), b"\x02", b"\x04", reader=reader)
    assert decoded.batch.schema == AvroDecoder(reader).schema
    assert decoded.batch.column("added").to_pylist() == [value, value]


@pytest.mark.parametrize(
    ("writer", "reader", "payload", "value"),
    [
        ("int", "long", b"\x03", -2),
        ("int", "float", b"\x03", -2.0),
        ("int", "double", b"\x03", -2.0),
        ("long", "float", b"\x03", -2.0),
        ("long", "double", b"\x03", -2.0),
        ("float", "double", b"\x00\x00\xc0\x3f", 1.5),
        ("string", "bytes", b"\x02x", b"x"),
        ("bytes", "string", b"\x02x", "x"),
        ("int", ["null", "long"], b"\x03", -2),
        ("null", ["null", "long"], b"", None),
        (["null", "int"], ["long", "null"], b"\x02\x03", -2),
        (["int", "long"], "long", b"\x00\x03", -2),
        (["int", "long"], ["null", "double"], b"\x02\x03", -2.0),
        (["int", "null"], "int", b"\x00\x03", -2),
        (["bytes", "string"], ["string", "null"], b"\x00\x02x", "x"),
    ],
)
def test_promoted_types_have_the_readers_type(writer: Any, reader: Any, payload: bytes, value: Any) -> None:
    assert AvroDecoder(writer, reader).schema == AvroDecoder(reader).schema
    assert values(writer, payload, payload, reader=reader) == [value, value]
    assert fastavro_reads(writer, payload, reader) == value


def test_promoted_texts_are_checked() -> None:
    for writer, reader in (("string", "bytes"), ("bytes", "string")):
        assert decode(writer, b"\x02\xff", b"\x02x", reader=reader).defect.tolist() == [Defect.INVALID_UTF8, 0]


def test_branches_merged_into_one_type_keep_their_order() -> None:
    writer = ["null", "int", "long", "float"]
    payloads = [b"\x02\x02", b"\x00", b"\x04\x04", b"\x06\x00\x00\xc0\x3f", b"\x02\x06"]
    assert values(writer, *payloads, reader=["null", "double"]) == [1.0, None, 2.0, 1.5, 3.0]
    items = b"\x0a" + b"".join(payloads) + b"\0"
    found = values({"type": "array", "items": writer}, items, reader={"type": "array", "items": ["null", "double"]})
    assert found == [[1.0, None, 2.0, 1.5, 3.0]]


def test_branches_without_match_in_the_reader_are_malformed() -> None:
    decoded = decode(record(["null", "string", "int"]), b"\x02\x02x", b"\x00", b"\x04\x04", reader=record("string"))
    assert decoded.defect.tolist() == [0, Defect.MALFORMED, Defect.MALFORMED]
    assert decoded.detail(1) == "field `a`: union branch 0 at byte 0 matches no type of the reader's schema"
    assert decoded.batch.column("a")[0].as_py() == "x"


def test_enums_are_matched_by_symbol() -> None:
    reader = {"type": "enum", "name": "Side", "symbols": ["SELL", "BUY"]}
    decoded = decode(SIDE, b"\x00", b"\x02", b"\x04", reader=reader)
    assert decoded.defect.tolist() == [0, 0, Defect.INVALID_ENUM]
    assert decoded.batch.column(0).to_pylist()[:2] == ["BUY", "SELL"]
    assert decoded.detail(2) == "value: enum symbol SELL_SHORT at byte 0 is not in the reader's schema"
    assert values(SIDE, b"\x00", b"\x04", reader={**reader, "default": "SELL"}) == ["BUY", "SELL"]


def test_named_branches_are_matched_by_full_name_first() -> None:
    schema = [record("int") | {"name": "x.R"}, record("string") | {"name": "y.R"}]
    for reader in (None, schema):
        assert values(schema, b"\x00\x02", b"\x02\x02s", reader=reader) == [
            {"member0": {"a": 1}, "member1": None},
            {"member0": None, "member1": {"a": "s"}},
        ]


def test_inner_records_are_resolved() -> None:
    writer = record({"type": "array", "items": with_fields(("x", "int", {}), ("gone", "string", {})) | {"name": "I"}})
    inner = with_fields(("x", "long", {}), ("y", ["null", "string"], {"default": None})) | {"name": "I"}
    reader = record({"type": "array", "items": inner})
    rows = [{"a": [{"x": 1, "gone": "g"}, {"x": 2, "gone": ""}]}, {"a": []}]
    assert resolved(writer, reader, *rows) == [{"a": [{"x": 1, "y": None}, {"x": 2, "y": None}]}, {"a": []}]


def test_resolution_at_every_depth() -> None:
    """A reader's schema two versions later: fields added, removed, renamed and promoted, also in inner records."""
    leg = with_fields(("n", "int", {}), ("gone", "string", {}), ("qty", "float", {})) | {"name": "Leg"}
    writer = with_fields(
        ("id", "string", {}),
        ("old", "int", {}),
        ("legs", {"type": "array", "items": leg}, {}),
        ("by_key", {"type": "map", "values": "Leg"}, {}),
        ("maybe", ["null", "Leg"], {}),
        ("gone", {"type": "map", "values": "Leg"}, {}),
    )
    new_leg = with_fields(
        ("quantity", "double", {"aliases": ["amount", "qty"]}),
        ("venue", "string", {"default": "spot"}),
        ("n", "long", {}),
    ) | {"name": "TradeLeg", "aliases": ["Leg"]}
    reader = with_fields(
        ("maybe", ["null", new_leg], {"default": None}),
        ("by_key", {"type": "map", "values": "TradeLeg"}, {}),
        ("tags", {"type": "array", "items": "string"}, {"default": []}),
        ("new", ["null", "long"], {"default": None, "aliases": ["old"]}),
        ("legs", {"type": "array", "items": "TradeLeg"}, {}),
        ("id", "bytes", {}),
        name="Renamed",
        aliases=["R"],
    )
    one, two = {"n": 1, "gone": "g", "qty": 0.5}, {"n": 2, "gone": "", "qty": 1.5}
    rows = [
        {"id": "a", "old": 7, "legs": [one, two], "by_key": {"k": one}, "maybe": two, "gone": {"x": one}},
        {"id": "", "old": -1, "legs": [], "by_key": {}, "maybe": None, "gone": {}},
    ]
    first, second = resolved(writer, reader, *rows)
    assert first["maybe"] == {"quantity": 1.5, "venue": "spot", "n": 2}
    assert first["legs"] == [{"quantity": 0.5, "venue": "spot", "n": 1}, first["maybe"]]
    assert first["by_key"] == {"k": first["legs"][0]}
    assert (first["id"], first["new"], first["tags"]) == (b"a", 7, [])
    assert second == {"maybe": None, "by_key": {}, "tags": [], "new": -1, "legs": [], "id": b""}


def test_equal_reader_and_writer_schemas_change_no_plan() -> None:
    alone, both = AvroDecoder(trade_schema()), AvroDecoder(trade_schema(), trade_schema())
    plans = [re.sub(r" at 0x\w+", "", repr(one._plan)) for one in (alone, both)]
    assert plans[0] == plans[1]


@pytest.mark.parametrize(
    ("writer", "reader", "message"),
    [
        (record("int"), record("string"), "field `a`: the writer's int cannot be read as string"),
        (record("long"), record("int"), "field `a`: the writer's long cannot be read as int"),
        (record("int"), record("int", "int"),
         "field `b`: missing in the writer's schema, and without a default in the reader's"),
        (record(["null", "int"]), record("string"), "field `a`: the writer's int cannot be read as string"),
        (record("int"), record(["null", "string"]), "field `a`: the writer's int cannot be read as null, string"),
        (record({"type": "array", "items": "int"}), record({"type": "array", "items": "string"}),
         "field `a.item`: the writer's int cannot be read as string"),
        (record({"type": "fixed", "name": "F", "size": 2}), record({"type": "fixed", "name": "F", "size": 3}),
         "field `a`: the writer's fixed with \"size\": 2 cannot be read as F"),
        (record(logical("long", "timestamp-micros")), record(logical("long", "timestamp-millis")),
         "field `a`: the writer's long with \"logicalType\": \"timestamp-micros\" cannot be read as "
         "long (timestamp-millis)"),
        (record(logical("bytes", "decimal", precision=4, scale=2)), record("string"),
         "field `a`: the writer's bytes with \"logicalType\": \"decimal\", \"precision\": 4, \"scale\": 2 cannot be "
         "read as string"),
        (record("int"), with_fields(("a", "int", {}), ("b", SIDE, {"default": "HOLD"})),
         "field `b`: default 'HOLD' is not a value of its type"),
    ],
)  # fmt: skip
def test_incompatible_schemas_are_errors(writer: Any, reader: Any, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        AvroDecoder(writer, reader)
    assert str(caught.value) == message


def test_logical_type_may_exist_in_only_one_schema() -> None:
    micros = logical("long", "timestamp-micros")
    assert values("long", b"\x02", reader=micros) == [datetime(1970, 1, 1, 0, 0, 0, 1, UTC)]
    assert values(micros, b"\x02", reader="long") == [1]


# Schemas


def test_schemas_may_be_json_text() -> None:
    assert AvroDecoder('{"type": "array", "items": "int"}').schema.field(0).type == pa.list_(pa.int32())
    assert AvroDecoder('"string"').schema == AvroDecoder("string").schema


def doubling(levels: int) -> dict[str, Any]:
    """Create a schema in which each level contains the one below it twice."""
    schema: dict[str, Any] = record("int") | {"name": "L0"}
    for i in range(1, levels):
        schema = record(schema, f"L{i - 1}") | {"name": f"L{i}"}
    return schema


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else "int"


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ("{", "not an Avro schema: JSONDecodeError"),
        ("[]", "value: a union needs branches, each of a different type"),
        (None, "not an Avro schema: TypeError"),
        ("no.such.Type", "not an Avro schema"),
        (
            {"type": "record", "name": "R", "fields": [{"name": "a", "type": "Missing"}]},
            "not an Avro schema: ValueError: type Missing is not defined",
        ),
        (record(["null", "R"]), "field `a`: type R contains itself; recursive types have no Arrow type"),
        (record({"type": "map", "values": ["int", "int"]}), "field `a.value`: a union needs branches"),
        (record(["null", ["int"]]), "field `a`: a union directly inside a union"),
        (record({"type": "enum", "name": "E", "symbols": []}), "field `a`: an enum without symbols"),
        (with_fields(("a", "int", {}), ("a", "int", {})), "value: record R has two fields with the same name"),
        (record({"type": "fixed", "name": "F", "size": -1}), "not an Avro schema: ValueError: fixed F has -1 bytes"),
        (record({"type": "fixed", "name": "F", "size": "8"}), "not an Avro schema: ValueError: fixed F has '8' bytes"),
        (record({"type": {"type": "int"}}), "not an Avro schema: ValueError: type {'type': 'int'} is not a name"),
        (record(SIDE, {**SIDE, "symbols": ["BUY"]}), "not an Avro schema: ValueError: type Side is defined twice"),
        (record({"type": "fixed", "name": "F", "size": 1 << 30}), "field `a`: a fixed of 1073741824 bytes"),
        (doubling(40), "more than 10000 types"),
        (nested(80), "types nested more than 64 deep"),
    ],
)
def test_unusable_schemas_are_errors(schema: Any, message: str) -> None:
    with pytest.raises(SchemaError) as caught:
        AvroDecoder(schema)
    assert message in str(caught.value)


def test_many_rows_are_decoded_in_several_blocks() -> None:
    schema = record("string", ["null", "int"], {"type": "array", "items": "int"})
    rows = [{"a": str(i), "b": i if i % 3 else None, "c": [i] * (i % 2)} for i in range(40_000)]
    decoded = decode(schema, *write(schema, *rows))
    assert decoded.batch.to_pylist() == rows
    assert (decoded.position == -1).all()
    assert decoded.defect.dtype == np.uint8
    assert decoded.position.dtype == np.int64
