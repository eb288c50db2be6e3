"""The decoder against fastavro, and against a plain decoder of one record that also locates each defect."""

import io
import json
import random
import struct
from contextlib import contextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from unittest import mock
from uuid import UUID

import fastavro
import numpy as np
import pyarrow as pa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2flow.avro import blocks, decoder
from k2flow.avro.blocks import MAX_EMPTY_ITEMS
from k2flow.avro.decoder import AvroDecoder
from k2flow.records import Defect
from k2flow.trades.schema import trade_schema
from tests.property import examples

PROFILE = settings(suppress_health_check=list(HealthCheck))


# One record at a time: a plain implementation of the specification


class BadRecordError(Exception):
    def __init__(self, defect: Defect, position: int, lax: bool = False) -> None:
        """`lax`: fastavro accepts it, or its verdict does not matter."""
        super().__init__(defect, position)
        self.defect, self.position, self.lax = defect, position, lax


@dataclass
class Chosen:
    """A union's value: the branch, and the value in it."""

    branch: int
    value: Any


@dataclass
class Reader:
    data: bytes
    at: int
    names: dict[str, Any] = field(default_factory=dict)

    def varint(self, bits: int = 64) -> int:
        start, number = self.at, 0
        for i in range(10):
            if self.at >= len(self.data):
                raise BadRecordError(Defect.TRUNCATED, start)
            byte = self.data[self.at]
            self.at += 1
            number |= (byte & 127) << 7 * i
            if byte < 128:
                break
        else:
            raise BadRecordError(Defect.MALFORMED, start, lax=True)
        value = (number >> 1) ^ -(number & 1)
        if number >= 2**64 or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise BadRecordError(Defect.MALFORMED, start, lax=True)
        return value

    def take(self, size: int) -> bytes:
        if size > len(self.data) - self.at:
            raise BadRecordError(Defect.TRUNCATED, self.at)
        self.at += size
        return self.data[self.at - size : self.at]

    def prefixed(self) -> bytes:
        start = self.at
        size = self.varint()
        if size < 0:
            raise BadRecordError(Defect.MALFORMED, start)
        return self.take(size)

    def text(self) -> str:
        raw = self.prefixed()
        try:
            return raw.decode()
        except UnicodeDecodeError as error:
            raise BadRecordError(Defect.INVALID_UTF8, self.at - len(raw) + error.start) from None

    def items(self, width: int, read: Any) -> list[Any]:
        found: list[Any] = []
        while True:
            start = self.at
            count = self.varint()
            if abs(count) > 2**31 - 1:
                raise BadRecordError(Defect.MALFORMED, start, lax=True)
            if count < 0:
                self.varint()
                count = -count
            if width and count > (len(self.data) - self.at) // width:
                raise BadRecordError(Defect.TRUNCATED, self.at)
            if not width and len(found) + count > MAX_EMPTY_ITEMS:
                raise BadRecordError(Defect.MALFORMED, start, lax=True)
            if not count:
                return found
            found += [read() for _ in range(count)]

    def value(self, schema: Any) -> Any:
        schema = self.names.get(schema, schema) if isinstance(schema, str) else schema
        start = self.at
        if isinstance(schema, list):
            branch = self.varint()
            if not 0 <= branch < len(schema):
                raise BadRecordError(Defect.MALFORMED, start, lax=branch < 0)
            return Chosen(branch, self.value(schema[branch]))
        kind = schema["type"] if isinstance(schema, dict) else schema
        if kind == "null":
            return None
        if kind == "boolean":
            (byte,) = self.take(1)
            if byte > 1:
                raise BadRecordError(Defect.MALFORMED, start, lax=True)
            return bool(byte)
        if kind in ("int", "long"):
            number = self.varint(32 if kind == "int" else 64)
            day = day_of(schema)
            if day and not 0 <= number < day:
                raise BadRecordError(Defect.MALFORMED, start, lax=True)
            return number
        if kind in ("float", "double"):
            return struct.unpack("<f" if kind == "float" else "<d", self.take(4 if kind == "float" else 8))[0]
        if kind == "string":
            text = self.text()
            if is_logical(schema, "uuid") and (len(text) != 36 or text.lower() != str_of_uuid(text)):
                raise BadRecordError(Defect.MALFORMED, self.at - len(text.encode()), lax=True)
            return text
        if kind in ("bytes", "fixed"):
            raw = self.prefixed() if kind == "bytes" else self.take(schema["size"])
            if (
                is_logical(schema, "decimal")
                and abs(int.from_bytes(raw, "big", signed=True)) >= 10 ** schema["precision"]
            ):
                raise BadRecordError(Defect.MALFORMED, self.at - len(raw), lax=True)
            return raw
        if kind == "enum":
            index = self.varint()
            if not 0 <= index < len(schema["symbols"]):
                raise BadRecordError(Defect.INVALID_ENUM, start, lax=index < 0)
            return schema["symbols"][index]
        if kind == "array":
            return self.items(width_of(schema["items"]), lambda: self.value(schema["items"]))
        if kind == "map":
            return self.items(1 + width_of(schema["values"]), lambda: (self.text(), self.value(schema["values"])))
        return {part["name"]: self.value(part["type"]) for part in schema["fields"]}


def is_logical(schema: Any, name: str) -> bool:
    return isinstance(schema, dict) and schema.get("logicalType") == name


def day_of(schema: Any) -> int:
    """A day in the unit of a time of day; 0 for other types."""
    if is_logical(schema, "time-millis"):
        return 86_400_000
    return 86_400_000_000 if is_logical(schema, "time-micros") else 0


def str_of_uuid(text: str) -> str:
    try:
        return str(UUID(text))
    except ValueError:
        return ""


def width_of(schema: Any) -> int:
    if isinstance(schema, list):
        return 1 + min(map(width_of, schema))
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind in ("fixed", "record"):
        return schema["size"] if kind == "fixed" else sum(width_of(part["type"]) for part in schema["fields"])
    return {"null": 0, "float": 4, "double": 8}.get(kind, 1)


def read_one(schema: Any, payload: bytes, skip: int) -> Any:
    reader = Reader(payload, min(skip, len(payload)))
    value = reader.value(schema)
    if reader.at < len(payload):
        raise BadRecordError(Defect.TRAILING_BYTES, reader.at)
    return value


def verdict(schema: Any, payload: bytes, skip: int) -> tuple[Any, BadRecordError | None]:
    """Return the value of a good record, or the error of a bad one."""
    try:
        return read_one(schema, payload, skip), None
    except BadRecordError as error:
        return None, error


def as_arrow(schema: Any, value: Any) -> Any:
    """Convert a value of `Reader` to the input of pyarrow."""
    if isinstance(schema, list):
        inner = as_arrow(schema[value.branch], value.value)
        members = [i for i, branch in enumerate(schema) if branch != "null"]
        if value.branch not in members or len(members) == 1:
            return inner
        return {f"member{members.index(value.branch)}": inner}
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "array":
        return [as_arrow(schema["items"], item) for item in value]
    if kind == "map":
        last = {key: i for i, (key, _) in enumerate(value)}
        return [(key, as_arrow(schema["values"], item)) for i, (key, item) in enumerate(value) if last[key] == i]
    if kind == "record":
        return {part["name"]: as_arrow(part["type"], value[part["name"]]) for part in schema["fields"]}
    if is_logical(schema, "decimal"):
        number = Decimal(f"{int.from_bytes(value, 'big', signed=True)}E-{schema.get('scale', 0)}")
        return number if schema["precision"] <= 76 else f"{number:f}"
    return value


def as_fastavro(schema: Any, value: Any) -> Any:
    """Convert a value of `Reader` to the value that fastavro reads, without logical types."""
    if isinstance(schema, list):
        return as_fastavro(schema[value.branch], value.value)
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "array":
        return [as_fastavro(schema["items"], item) for item in value]
    if kind == "map":
        return {key: as_fastavro(schema["values"], item) for key, item in value}
    if kind == "record":
        return {part["name"]: as_fastavro(part["type"], value[part["name"]]) for part in schema["fields"]}
    return value


def without_logical(schema: Any) -> Any:
    if isinstance(schema, list):
        return [without_logical(branch) for branch in schema]
    if isinstance(schema, dict):
        return {key: without_logical(part) for key, part in schema.items() if key != "logicalType"}
    return schema


# Random schemas, values and damage


def plain_schemas() -> st.SearchStrategy[Any]:
    def logical(kind: str, *names: str) -> list[Any]:
        return [{"type": kind, "logicalType": name} for name in names]

    kinds: list[Any] = ["null", "boolean", "int", "long", "float", "double", "bytes", "string"]
    kinds += logical("int", "date", "time-millis", "unknown-type")
    kinds += logical("long", "time-micros", "timestamp-millis", "timestamp-micros", "timestamp-nanos")
    kinds += logical("long", "local-timestamp-millis", "local-timestamp-micros", "local-timestamp-nanos")
    kinds += logical("string", "uuid")
    digits = st.integers(1, 60) | st.integers(77, 120)
    decimals = digits.flatmap(lambda p: st.tuples(st.just(p), st.integers(0, p))).map(
        lambda ps: {"type": "bytes", "logicalType": "decimal", "precision": ps[0], "scale": ps[1]}
    )
    fixed_decimals = st.integers(1, 45).map(
        lambda size: {
            "type": "fixed",
            "size": size,
            "logicalType": "decimal",
            "precision": max(1, (8 * size - 1) * 3 // 10),
        }
    )
    fixed = st.integers(0, 20).map(lambda size: {"type": "fixed", "size": size})
    enums = st.integers(1, 4).map(lambda k: {"type": "enum", "symbols": ["A", "BB", "CCC", "DD"][:k]})
    return st.one_of(st.sampled_from(kinds), decimals, fixed_decimals, fixed, enums)


def union_of(branches: list[Any]) -> list[Any]:
    """Create a valid union: at most one branch of each unnamed type, and no inner unions."""
    found: dict[str, Any] = {}
    for i, branch in enumerate(branches):
        if not isinstance(branch, list):
            kind = branch["type"] if isinstance(branch, dict) else branch
            found.setdefault(f"{kind}{i}" if kind in ("record", "enum", "fixed") else kind, branch)
    return list(found.values()) or ["null"]


def schemas() -> st.SearchStrategy[Any]:
    def composite(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
        return st.one_of(
            inner.map(lambda items: {"type": "array", "items": items}),
            inner.map(lambda values: {"type": "map", "values": values}),
            inner.map(lambda other: union_of(["null", other])),
            inner.map(lambda other: union_of([other, "null"])),
            st.lists(inner, min_size=1, max_size=4).map(union_of),
            st.lists(inner, max_size=4).map(record_of),
        )

    return st.lists(st.recursive(plain_schemas(), composite, max_leaves=6), max_size=6).map(record_of).map(named)


def record_of(types: list[Any]) -> Any:
    return {"type": "record", "fields": [{"name": f"f{i}", "type": kind} for i, kind in enumerate(types)]}


def named(schema: Any) -> Any:
    """Add a name to each type that needs one."""
    count = 0

    def walk(part: Any) -> Any:
        nonlocal count
        if isinstance(part, list):
            return [walk(branch) for branch in part]
        if not isinstance(part, dict):
            return part
        copy = {
            key: walk(inner) if key in ("type", "items", "values", "fields") else inner for key, inner in part.items()
        }
        if copy.get("type") in ("record", "enum", "fixed"):
            count += 1
            copy["name"] = f"N{count}"
        return copy

    return walk(schema)


def zigzag(value: int) -> bytes:
    number = (value << 1) ^ (value >> 63)
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    out.append(number)
    return bytes(out)


TEXTS = ["", "a", "BTCUSDT", "ünï", "12345678", "x" * 12, "y" * 13, "€" * 30, "\U0001f600", "z" * 70]


def write_random(schema: Any, rng: random.Random) -> bytes:
    """Encode a random value of a schema; arrays and maps have any number of blocks."""
    if isinstance(schema, list):
        branch = rng.randrange(len(schema))
        return zigzag(branch) + write_random(schema[branch], rng)
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "null":
        return b""
    if kind == "boolean":
        return bytes([rng.randrange(2)])
    if kind in ("int", "long"):
        if day_of(schema):
            return zigzag(rng.randrange(day_of(schema)))
        bits = rng.randrange(32 if kind == "int" else 64)
        return zigzag(rng.choice((-1, 1)) * rng.getrandbits(bits) - rng.randrange(2))
    if kind in ("float", "double"):
        return struct.pack("<f" if kind == "float" else "<d", rng.choice((0.0, -1.5, rng.random(), float("inf"))))
    if is_logical(schema, "decimal"):
        number = rng.choice((-1, 1)) * rng.randrange(10 ** rng.randint(1, schema["precision"]))
        size = schema["size"] if kind == "fixed" else (number.bit_length() + 8) // 8 + rng.choice((0, 0, 0, 1, 9, 40))
        if kind == "bytes" and number == 0:
            size = rng.randrange(3)
        raw = number.to_bytes(size, "big", signed=True)
        return raw if kind == "fixed" else zigzag(size) + raw
    if kind == "bytes":
        raw = rng.randbytes(rng.choice((0, 1, 7, 30)))
        return zigzag(len(raw)) + raw
    if kind == "string":
        raw = (str(UUID(int=rng.getrandbits(128))) if is_logical(schema, "uuid") else rng.choice(TEXTS)).encode()
        return zigzag(len(raw)) + raw
    if kind == "fixed":
        return rng.randbytes(schema["size"])
    if kind == "enum":
        return zigzag(rng.randrange(len(schema["symbols"])))
    if kind == "record":
        return b"".join(write_random(part["type"], rng) for part in schema["fields"])
    out = b""
    for _ in range(rng.choice((0, 1, 1, 2))):
        n = rng.choice((1, 2, 3, 9))
        if kind == "array":
            content = b"".join(write_random(schema["items"], rng) for _ in range(n))
        else:
            content = b"".join(write_random("string", rng) + write_random(schema["values"], rng) for _ in range(n))
        out += (zigzag(-n) + zigzag(len(content)) if rng.random() < 0.4 else zigzag(n)) + content
    return out + b"\0"


def damage(payload: bytes, other: bytes, rng: random.Random) -> bytes:
    if not payload:
        return payload + rng.randbytes(rng.randrange(3))
    data, at = bytearray(payload), rng.randrange(len(payload))
    match rng.randrange(7):
        case 0:
            data[at] ^= 1 << rng.randrange(8)
        case 1:
            data = data[:at]
        case 2:
            data = data[:at] + other[rng.randrange(len(other) + 1) :]
        case 3:
            data += rng.randbytes(rng.randint(1, 3))
        case 4:
            data[at] = rng.choice((0, 1, 2, 3, 127, 128, 255))
        case 5:
            data[at:at] = rng.choice((b"\xff" * 9 + b"\x01", b"\x80" * 11, b"\xfe\xff\xff\xff\x1f", rng.randbytes(2)))
        case 6:
            data[at : at + rng.randrange(4)] = b""
    return bytes(data)


@contextmanager
def small_blocks(rows: int, steps: int) -> Any:
    """Use several blocks for few records, and speculative decoding for few items."""
    with mock.patch.object(decoder, "_BLOCK_ROWS", rows), mock.patch.object(blocks, "_STEPS_BEFORE_SPECULATION", steps):
        yield


def as_payloads(payloads: list[bytes], rng: random.Random) -> pa.Array:
    kind = rng.choice((pa.binary(), pa.large_binary()))
    before = rng.randrange(3)
    return pa.array([b"\xff" * 9] * before + payloads + [b"\xff"], kind).slice(before, len(payloads))


# Checks


def check(schema: Any, payloads: list[bytes], skip: int, rng: random.Random) -> None:
    own = AvroDecoder(schema)
    with small_blocks(rng.choice((2, 7, 1 << 14)), rng.choice((0, 2, 64))):
        decoded = own.decode(as_payloads(payloads, rng), skip)
    assert decoded.batch.num_rows == len(payloads)
    assert decoded.batch.schema == own.schema
    decoded.batch.validate(full=True)
    expected, good = [], []
    oracle = fastavro.parse_schema(without_logical(schema))
    for row, payload in enumerate(payloads):
        value, bad = verdict(schema, payload, skip)
        found = (decoded.defect[row], decoded.position[row])
        accepted, read = fastavro_reads(oracle, payload[skip:]) if bad is None or not bad.lax else (False, None)
        if bad is not None:
            assert found == (bad.defect, bad.position), (payload, decoded.detail(row))
            assert "`" in decoded.detail(row) or bad.defect == Defect.TRAILING_BYTES
            assert not accepted
        else:
            assert (*found, decoded.detail(row)) == (0, -1, "")
            assert accepted
            assert repr(read) == repr(as_fastavro(schema, value))
            good.append(row)
            expected.append(as_arrow(schema, value))
    rows = decoded.batch.take(pa.array(good, pa.int64()))
    wanted = pa.array(expected, pa.struct(list(own.schema)))
    for name, column in zip(own.schema.names, rows.columns, strict=True):
        assert_equal(column, wanted.field(name))


def assert_equal(column: pa.Array, wanted: pa.Array) -> None:
    """Check equality; NaN equals NaN."""
    assert (column.type, len(column)) == (wanted.type, len(wanted))
    assert column.is_null().equals(wanted.is_null())
    if pa.types.is_floating(column.type):
        floats = column.to_numpy(zero_copy_only=False), wanted.to_numpy(zero_copy_only=False)
        assert np.array_equal(*floats, equal_nan=True)
    elif pa.types.is_struct(column.type):
        for pair in zip(column.flatten(), wanted.flatten(), strict=True):
            assert_equal(*pair)
    elif pa.types.is_list(column.type):
        assert np.array_equal(np.diff(column.offsets), np.diff(wanted.offsets))
        assert_equal(column.flatten(), wanted.flatten())
    elif pa.types.is_map(column.type):
        assert np.array_equal(np.diff(column.offsets), np.diff(wanted.offsets))
        assert_equal(column.keys, wanted.keys)
        assert_equal(column.items, wanted.items)
    else:
        assert column.equals(wanted)


def fastavro_reads(schema: Any, data: bytes) -> tuple[bool, Any]:
    stream = io.BytesIO(data)
    try:
        value = fastavro.schemaless_reader(stream, schema)
    except (EOFError, IndexError, ValueError):
        return False, None
    return stream.tell() == len(data), value


@settings(PROFILE, max_examples=examples(500))
@given(schemas(), st.integers(0, 2**32))
def test_random_schemas_and_damaged_records(schema: Any, seed: int) -> None:
    rng = random.Random(seed)
    skip = rng.choice((0, 5))
    valid = [rng.randbytes(skip) + write_random(schema, rng) for _ in range(12)]
    payloads = [damage(one, rng.choice(valid), rng) if rng.random() < 0.4 else one for one in valid]
    check(schema, payloads, skip, rng)


def trade(rng: random.Random) -> bytes:
    symbol = rng.choice(("BTCUSDT", "ETHUSDT", "1000PEPEUSDT"))
    number = rng.randrange(10**10)
    vendor = rng.choice((None, {}, {"buyer_is_maker": "true"}, {"a": "1", "ключ": "значение", "c": ""}))
    record = {
        "message_id": str(UUID(int=rng.getrandbits(128))),
        "trade_id": f"BINANCE-{number}",
        "symbol": symbol,
        "exchange": "BINANCE",
        "asset_class": rng.choice(("crypto", "equities")),
        "timestamp": 1_760_000_000_000_000 + rng.randrange(10**12),
        "price": Decimal(rng.randrange(10**18)).scaleb(-8),
        "quantity": Decimal(rng.randrange(10 ** rng.randint(1, 18))).scaleb(-8),
        "currency": "USDT",
        "side": rng.choice(("BUY", "SELL")),
        "trade_conditions": rng.choice(([], [], ["x"], ["", "ü" * 20])),
        "source_sequence": rng.choice((None, number)),
        "ingestion_timestamp": 1_760_000_000_000_000,
        "platform_sequence": rng.choice((None, -number)),
        "vendor_data": vendor,
    }
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, TRADE, record)
    return b"\0\0\0\0\x01" + stream.getvalue()


TRADE = fastavro.parse_schema(json.loads(json.dumps(trade_schema())))


@settings(PROFILE, max_examples=examples(60))
@given(st.integers(0, 2**32))
def test_random_and_damaged_trades(seed: int) -> None:
    rng = random.Random(seed)
    valid = [trade(rng) for _ in range(60)]
    payloads = [damage(one, rng.choice(valid), rng) if rng.random() < 0.3 else one for one in valid]
    check(trade_schema(), payloads, 5, rng)


@settings(PROFILE, max_examples=examples(20))
@given(st.integers(0, 2**32))
def test_trades_equal_those_of_fastavro_with_logical_types(seed: int) -> None:
    rng = random.Random(seed)
    payloads = [trade(rng) for _ in range(50)]
    rows = AvroDecoder(trade_schema()).decode(pa.array(payloads), 5).batch.to_pylist(maps_as_pydicts="strict")
    assert rows == [fastavro.schemaless_reader(io.BytesIO(one[5:]), TRADE) for one in payloads]


@settings(PROFILE, max_examples=examples(10))
@given(st.integers(0, 2**32))
def test_trade_cut_at_any_byte_does_not_affect_its_neighbours(seed: int) -> None:
    rng = random.Random(seed)
    whole, neighbour = trade(rng), trade(rng)
    cuts = [whole[:size] for size in range(len(whole))]
    payloads = [payload for cut in cuts for payload in (cut, neighbour)]
    decoded = AvroDecoder(trade_schema()).decode(pa.array(payloads), 5)
    assert set(decoded.defect[0::2].tolist()) == {Defect.TRUNCATED}
    assert not decoded.defect[1::2].any()
    alone = AvroDecoder(trade_schema()).decode(pa.array([neighbour]), 5).batch
    assert (
        decoded.batch.take(pa.array(range(1, len(payloads), 2)))
        == pa.Table.from_batches([alone] * len(cuts)).combine_chunks().to_batches()[0]
    )


PROMOTED = {
    "int": ("int", "long", "float", "double"),
    "long": ("long", "float", "double"),
    "float": ("float", "double"),
}


@settings(PROFILE, max_examples=examples(150))
@given(schemas(), st.integers(0, 2**32))
def test_resolution_changes_no_defect_and_no_value(schema: Any, seed: int) -> None:
    """Drop, add, move, promote and rename fields: the remaining values equal those of the writer's schema alone."""
    rng = random.Random(seed)
    fields = [dict(part) for part in schema["fields"] if rng.random() < 0.7]
    for part in fields:
        if isinstance(part["type"], str) and part["type"] in PROMOTED:
            part["type"] = rng.choice(PROMOTED[part["type"]])
        if rng.random() < 0.3:
            part["aliases"], part["name"] = [part["name"]], f"new_{part['name']}"
    fields.append({"name": "added", "type": ["null", "string"], "default": None})
    rng.shuffle(fields)
    valid = [write_random(schema, rng) for _ in range(10)]
    payloads = pa.array([damage(one, rng.choice(valid), rng) if rng.random() < 0.3 else one for one in valid])
    alone = AvroDecoder(schema).decode(payloads)
    resolved = AvroDecoder(schema, {**schema, "fields": fields}).decode(payloads)
    np.testing.assert_array_equal(resolved.defect, alone.defect)
    np.testing.assert_array_equal(resolved.position, alone.position)
    good = pa.array(np.flatnonzero(alone.defect == 0))
    assert resolved.batch.column("added").null_count == len(payloads)
    for part in fields:
        if part["name"] != "added":
            wanted = alone.batch.column(part.get("aliases", [part["name"]])[0]).take(good)
            found = resolved.batch.column(part["name"]).take(good)
            assert_equal(found, wanted.cast(found.type, safe=False) if isinstance(part["type"], str) else wanted)


@settings(PROFILE, max_examples=examples(200))
@given(st.lists(st.one_of(st.binary(max_size=8), st.text(max_size=5).map(str.encode)), min_size=1, max_size=20))
def test_utf8_verdicts_equal_those_of_python(texts: list[bytes]) -> None:
    check(named(record_of(["string"])), [zigzag(len(text)) + text for text in texts], 0, random.Random(0))
