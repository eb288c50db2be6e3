"""Fields that TradeV2 lacks, of random types at random places: vendor_data holds the values of fastavro as text."""

import io
import json
import math
import random
import struct
from datetime import date, datetime, timedelta
from decimal import Decimal
from typing import Any

import fastavro
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from k2flow.avro.decoder import AvroDecoder
from k2flow.exchange import Exchange, find_exchange
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.registry import Schemas
from k2flow.trades.schema import trade_schema
from tests.messages import messages
from tests.property import examples
from tests.property.test_avro_decoder import (
    PROFILE,
    as_fastavro,
    damage,
    is_logical,
    read_one,
    schemas,
    small_blocks,
    trade,
    without_logical,
    write_random,
)

KEEP = find_exchange("binance")
IGNORE = Exchange("binance", "BINANCE", {**KEEP.declared, "unknown_fields": "ignore"})
TRADE_FIELDS = trade_schema()["fields"]


class OneSchema(Schemas):
    """Every schema id maps to one schema."""

    def __init__(self, decoder: RecordDecoder) -> None:
        self._decoder = decoder

    def decoder(self, schema_id: int) -> RecordDecoder:
        return self._decoder


def with_fields(extra: list[Any], rng: random.Random) -> Any:
    """Insert fields into TradeV2; some have the name of a key that a trade's own vendor_data may have."""
    names = rng.sample(["a", "ключ", "buyer_is_maker", *(f"x{i}" for i in range(len(extra)))], len(extra))
    fields = list(TRADE_FIELDS)
    for name, field in zip(names, extra, strict=True):
        fields.insert(rng.randrange(len(fields) + 1), {"name": name, "type": field["type"]})
    return {**trade_schema(), "fields": fields}


def message(schema: Any, rng: random.Random) -> bytes:
    """Encode a valid trade with random values of its unknown fields."""
    own = fastavro.schemaless_reader(io.BytesIO(trade(rng)[5:]), KNOWN)
    own["asset_class"] = "crypto"
    own["price"], own["quantity"] = own["price"] + Decimal("0.00000001"), own["quantity"] + Decimal("0.00000001")
    own["timestamp"] = own["ingestion_timestamp"]
    written = b""
    for field in schema["fields"]:
        if field in TRADE_FIELDS:
            stream = io.BytesIO()
            fastavro.schemaless_writer(stream, field["type"], own[field["name"]])
            written += stream.getvalue()
        else:
            written += write_random(field["type"], rng)
    return b"\0\0\0\0\x01" + written


KNOWN = fastavro.parse_schema(json.loads(json.dumps(trade_schema())))


def expected(schema: Any, value: Any) -> Any:
    """Convert a value to text, or to its JSON form inside another value, in plain Python."""
    if isinstance(schema, list):
        return expected(schema[value.branch], value.value)
    kind = schema["type"] if isinstance(schema, dict) else schema
    if kind == "array":
        return [expected(schema["items"], item) for item in value]
    if kind == "map":
        return {key: expected(schema["values"], item) for key, item in value}
    if kind == "record":
        return {part["name"]: expected(part["type"], value[part["name"]]) for part in schema["fields"]}
    if is_logical(schema, "decimal"):
        unscaled, scale = int.from_bytes(value, "big", signed=True), schema.get("scale", 0)
        return f"{Decimal(f'{unscaled}E-{scale}'):f}"
    if kind in ("bytes", "fixed"):
        return value.hex()
    if kind in ("int", "long") and isinstance(schema, dict):
        return time_text(schema["logicalType"], value)
    return Float(kind, value) if kind in ("float", "double") else value


class Float:
    """A float or double, equal to any text that parses to the same number."""

    def __init__(self, kind: str, value: float) -> None:
        self.code, self.value = "<f" if kind == "float" else "<d", value

    def __eq__(self, other: object) -> bool:
        number = float(other) if isinstance(other, str | float | int) else math.nan
        return struct.pack(self.code, number) == struct.pack(self.code, self.value)


def time_text(name: str, value: int) -> Any:
    digits = {"millis": 3, "micros": 6, "nanos": 9}.get(name.rpartition("-")[2], 0)
    seconds, rest = divmod(value, 10**digits)
    fraction = f"{rest:0{digits}}"
    if name == "date":
        day = value + date(1970, 1, 1).toordinal()
        return date.fromordinal(day).isoformat() if 1 <= day <= date.max.toordinal() else str(value)
    if name.startswith("time-"):
        return f"{datetime(1970, 1, 1) + timedelta(seconds=seconds):%H:%M:%S}.{fraction}"
    if "timestamp" not in name:
        return value
    if not -62_135_596_800 <= seconds < 253_402_300_800:
        return str(value)
    moment = datetime(1970, 1, 1) + timedelta(seconds=seconds)
    return f"{moment.isoformat()}.{fraction}{'' if name.startswith('local') else 'Z'}"


def check_text(value: Any, text: str | None) -> None:
    """Check a text against the value of `expected`."""
    if isinstance(value, list | dict):
        assert json.loads(text or "") == value
    elif isinstance(value, bool):
        assert text == ("true" if value else "false")
    else:
        assert (str(value) if isinstance(value, int) else value) == text


def fields_of(schema: Any, payload: bytes) -> dict[str, Any]:
    """Read the fields of one record with the branches of its unions, and check that fastavro reads the same."""
    value: dict[str, Any] = read_one(schema, payload, 5)
    plain = without_logical(schema)
    read = fastavro.schemaless_reader(io.BytesIO(payload[5:]), fastavro.parse_schema(json.loads(json.dumps(plain))))
    assert repr(read) == repr(as_fastavro(plain, value))
    return value


@settings(PROFILE, max_examples=examples(60))
@given(schemas(), st.integers(0, 2**32))
def test_unknown_fields_are_kept_as_text(extra: Any, seed: int) -> None:
    rng = random.Random(seed)
    schema = with_fields(extra["fields"], rng)
    payloads = [message(schema, rng) for _ in range(9)]
    decoder = AvroDecoder(schema, trade_schema(), keep_unknown=True)
    unknown = [field for field in schema["fields"] if field not in TRADE_FIELDS]
    assert [field.name for field in decoder.unknown_fields] == [field["name"] for field in unknown]
    with small_blocks(rng.choice((2, 100)), 64):
        kept = TradeDecoder(KEEP, OneSchema(decoder)).decode(messages(payloads, [None] * 9)).trades
        ignored = TradeDecoder(IGNORE, OneSchema(decoder)).decode(messages(payloads, [None] * 9)).trades
    kept.rows.validate(full=True)
    assert kept.offset.tolist() == ignored.offset.tolist()
    assert len(kept.offset) == 9
    pairs = (kept.rows["vendor_data"].to_pylist(), ignored.rows["vendor_data"].to_pylist())
    for offset, found, own in zip(kept.offset.tolist(), *pairs, strict=True):
        record = fields_of(schema, payloads[offset - 100])
        written = {field["name"]: expected(field["type"], record[field["name"]]) for field in unknown}
        wanted = {k: v for k, v in written.items() if v is not None and k not in dict(own or ())}
        own_entries, more = (found or [])[: len(own or ())], (found or [])[len(own or ()) :]
        assert own_entries == (own or [])
        assert [key for key, _ in more] == list(wanted)
        for key, text in more:
            check_text(wanted[key], text)
        assert (found is None) == (own is None and not wanted)


@settings(PROFILE, max_examples=examples(50))
@given(schemas(), st.integers(0, 2**32))
def test_keeping_unknown_fields_changes_no_verdict(extra: Any, seed: int) -> None:
    """Every record, damaged or not, has the same defect at the same byte, and the same values of known fields."""
    rng = random.Random(seed)
    schema = with_fields(extra["fields"], rng)
    valid = [message(schema, rng) for _ in range(12)]
    payloads = pa.array([damage(one, rng.choice(valid), rng) if rng.random() < 0.5 else one for one in valid])
    dropped = AvroDecoder(schema, trade_schema()).decode(payloads, 5)
    kept = AvroDecoder(schema, trade_schema(), keep_unknown=True).decode(payloads, 5)
    assert kept.defect.tolist() == dropped.defect.tolist()
    assert kept.position.tolist() == dropped.position.tolist()
    assert [kept.detail(i) for i in range(12)] == [dropped.detail(i) for i in range(12)]
    good = pa.array([i for i in range(12) if not kept.defect[i]], pa.int64())
    assert kept.batch.take(good) == dropped.batch.take(good)
    for column in kept.unknown:
        column.validate(full=True)
