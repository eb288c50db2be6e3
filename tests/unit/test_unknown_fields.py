"""Unknown fields: values as text by type, new entries of maps, log lines."""

import io
import logging
from typing import Any

import fastavro
import pyarrow as pa
import pytest

from k2flow.avro.decoder import AvroDecoder
from k2flow.errors import SchemaError, SettingsError
from k2flow.exchange import Exchange, find_exchange
from k2flow.trades import unknown_fields as vendor_data
from k2flow.trades.unknown_fields import UnknownFields, with_texts

BINANCE = find_exchange("binance")
KNOWN = {"type": "record", "name": "R", "fields": [{"name": "known", "type": "int"}]}
POINT = {"type": "record", "name": "Point", "fields": [{"name": "x", "type": "int"}, {"name": "s", "type": "string"}]}
LAST_US, FIRST_US = 253_402_300_799_999_999, -62_135_596_800_000_000


def with_unknown_field(kind: Any) -> dict[str, Any]:
    return {**KNOWN, "fields": [{"name": "extra", "type": kind}, *KNOWN["fields"]]}


def logical(kind: str, name: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "logicalType": name, **more}


def texts(kind: Any, *payloads: bytes) -> list[str | None]:
    """Return the texts of an unknown field's values from their bytes; also as slices of a longer array."""
    decoder = AvroDecoder(with_unknown_field(kind), KNOWN, keep_unknown=True)
    decoded = decoder.decode(pa.array([payload + b"\x02" for payload in payloads], pa.binary()))
    assert not decoded.defect.any(), [decoded.detail(i) for i in range(len(payloads))]
    assert decoded.batch.to_pydict() == {"known": [1] * len(payloads)}
    (field,), column = decoder.unknown_fields, decoded.unknown[0]
    found = field.to_texts(column)
    found.validate(full=True)
    assert found.type == pa.string()
    for start in range(len(payloads)):
        assert field.to_texts(column.slice(start, 2)).to_pylist() == found.to_pylist()[start : start + 2]
    return found.to_pylist()  # type: ignore[no-any-return]


def written(kind: Any, *values: Any) -> list[bytes]:
    found = []
    for value in values:
        stream = io.BytesIO()
        fastavro.schemaless_writer(stream, fastavro.parse_schema(kind), value)
        found.append(stream.getvalue())
    return found


def long(*numbers: int) -> list[bytes]:
    return written("long", *numbers)


@pytest.mark.parametrize(
    ("kind", "payloads", "expected"),
    [
        ("null", [b""], [None]),
        ("boolean", [b"\x01", b"\x00"], ["true", "false"]),
        ("int", written("int", -(2**31), 7), ["-2147483648", "7"]),
        ("long", long(2**63 - 1), ["9223372036854775807"]),
        ("float", written("float", 0.1, 3.4e38, -0.0), ["0.1", "3.4e+38", "-0"]),
        ("double", written("double", 0.1, 1e20, 5e-324, float("-inf"), float("nan")),
         ["0.1", "1e+20", "5e-324", "-inf", "nan"]),
        ("bytes", [b"\x04\x00\xff", b"\x00"], ["00ff", ""]),
        ("string", ["\x0a€ab".encode(), b"\x00"], ["€ab", ""]),
        ({"type": "fixed", "name": "F", "size": 2}, [b"\x0a\xbc"], ["0abc"]),
        ({"type": "fixed", "name": "F", "size": 0}, [b""], [""]),
        ({"type": "enum", "name": "E", "symbols": ["A", "B"]}, [b"\x02"], ["B"]),
        (logical("string", "uuid"), written("string", "0" * 8 + "-0000" * 3 + "-" + "0" * 12),
         ["00000000-0000-0000-0000-000000000000"]),
        (logical("bytes", "decimal", precision=18, scale=8), written("bytes", b"\x01", b"\xff", b"", b"\x01\0\0\0\0"),
         ["0.00000001", "-0.00000001", "0.00000000", "42.94967296"]),
        (logical("bytes", "decimal", precision=60, scale=1), [b"\x02\xf6"], ["-1.0"]),
        (logical("bytes", "decimal", precision=5, scale=5), [b"\x02\xfe"], ["-0.00002"]),
        (logical("bytes", "decimal", precision=30), [b"\x02\xfe"], ["-2"]),
        (logical("int", "date"), written("int", 0, -719_162, 2_932_896, -719_163, 2**31 - 1),
         ["1970-01-01", "0001-01-01", "9999-12-31", "-719163", "2147483647"]),
        (logical("int", "time-millis"), written("int", 1), ["00:00:00.001"]),
        (logical("long", "time-micros"), long(86_399_999_999), ["23:59:59.999999"]),
        (logical("long", "timestamp-millis"), long(-1), ["1969-12-31T23:59:59.999Z"]),
        (logical("long", "timestamp-micros"), long(0, FIRST_US, LAST_US, FIRST_US - 1, LAST_US + 1, 2**63 - 1),
         ["1970-01-01T00:00:00.000000Z", "0001-01-01T00:00:00.000000Z", "9999-12-31T23:59:59.999999Z",
          str(FIRST_US - 1), str(LAST_US + 1), str(2**63 - 1)]),
        (logical("long", "timestamp-nanos"), long(1, -(2**63)),
         ["1970-01-01T00:00:00.000000001Z", "1677-09-21T00:12:43.145224192Z"]),
        (logical("long", "local-timestamp-micros"), long(1), ["1970-01-01T00:00:00.000001"]),
        (["null", "long"], [b"\x00", b"\x02\x06"], [None, "3"]),
        (["null"], [b"\x00"], [None]),
        (["null", "long", "string", "boolean"], [b"\x02\x06", b"\x04\x02x", b"\x00", b"\x06\x01"],
         ["3", "x", None, "true"]),
        (POINT, written(POINT, {"x": 1, "s": 'q"\n€'}), ['{"x":1,"s":"q\\"\\n€"}']),
        ({"type": "record", "name": "Empty", "fields": []}, [b"", b""], ["{}", "{}"]),
        (["null", POINT], [b"\x00", b"\x02\x02\x00"], [None, '{"x":1,"s":""}']),
        ({"type": "array", "items": ["null", "boolean"]}, [b"\x00", b"\x04\x00\x02\x01\x00"], ["[]", "[null,true]"]),
        ({"type": "array", "items": "float"}, [b"\x04" + b"".join(written("float", 0.1, float("inf"))) + b"\x00"],
         ['[0.1,"inf"]']),
        ({"type": "map", "values": {"type": "array", "items": "bytes"}}, [b"\x02\x02k\x02\x02\xff\x00\x00", b"\x00"],
         ['{"k":["ff"]}', "{}"]),
        ({"type": "array", "items": ["int", "string", POINT]}, [b"\x06\x00\x02\x02\x02a\x04\x04\x00\x00"],
         ['[1,"a",{"x":2,"s":""}]']),
    ],
)  # fmt: skip
def test_values_are_converted_to_text(kind: Any, payloads: list[bytes], expected: list[str | None]) -> None:
    assert texts(kind, *payloads) == expected


def test_unknown_field_may_use_a_named_type_again() -> None:
    """Another field defines the type, or TradeV2 has a type of that name."""
    side = {"type": "enum", "name": "Side", "symbols": ["BUY", "SELL"]}
    writer = {**KNOWN, "fields": [{"name": "a", "type": side}, *KNOWN["fields"], {"name": "b", "type": "Side"}]}
    reader = {**KNOWN, "fields": [*KNOWN["fields"], {"name": "a", "type": {**side, "symbols": ["SELL", "BUY"]}}]}
    decoder = AvroDecoder(writer, reader, keep_unknown=True)
    decoded = decoder.decode(pa.array([b"\x00\x02\x02"]))
    (field,) = decoder.unknown_fields
    assert (field.name, field.to_texts(decoded.unknown[0]).to_pylist()) == ("b", ["SELL"])
    assert decoded.batch.to_pylist() == [{"known": 1, "a": "BUY"}]


def test_unknown_fields_are_dropped_by_default() -> None:
    dropping, knowing = AvroDecoder(with_unknown_field("int"), KNOWN), AvroDecoder(KNOWN, KNOWN, keep_unknown=True)
    for decoder, payload in ((dropping, b"\x04\x02"), (knowing, b"\x02")):
        assert decoder.unknown_fields == ()
        decoded = decoder.decode(pa.array([payload]))
        assert (decoded.batch.to_pylist(), len(decoded.unknown)) == ([{"known": 1}], 0)


def test_field_read_by_an_alias_is_not_unknown() -> None:
    """A second alias, or an alias beside the field's own name, is unknown."""
    reader = {**KNOWN, "fields": [{"name": "known", "aliases": ["old", "older"], "type": "long"}]}
    for names, unknown in ((["old"], []), (["older", "old"], ["old"]), (["old", "known"], ["old"])):
        writer = {**KNOWN, "fields": [{"name": name, "type": "int"} for name in names]}
        assert [field.name for field in AvroDecoder(writer, reader, keep_unknown=True).unknown_fields] == unknown


MAPS = pa.array([[("a", "1"), ("b", "2")], None, [], [("n", "own")], None], pa.map_(pa.string(), pa.string()))
NAMES = ["n", "m"]
TEXTS = [pa.array(["v0", None, "v2", "v3", "v4"]), pa.array([None, None, "", "w3", None], pa.string())]
MERGED = [
    [("a", "1"), ("b", "2"), ("n", "v0")],
    None,
    [("n", "v2"), ("m", "")],
    [("n", "own"), ("m", "w3")],
    [("n", "v4")],
]


def test_own_entries_of_a_map_come_first_and_win() -> None:
    for start in range(6):
        for size in range(6 - start):
            found = with_texts(MAPS.slice(start, size), NAMES, [text.slice(start, size) for text in TEXTS])
            found.validate(full=True)
            assert found.type == MAPS.type
            assert found.to_pylist() == MERGED[start : start + size]


def ignoring() -> Exchange:
    return Exchange("binance", "BINANCE", {**BINANCE.declared, "unknown_fields": "ignore"})


def test_unknown_fields_are_logged_once_per_schema(caplog: pytest.LogCaptureFixture) -> None:
    unknown = AvroDecoder(with_unknown_field("int"), KNOWN, keep_unknown=True)
    many = {**KNOWN, "fields": [*KNOWN["fields"], *({"name": f"f{i}", "type": "int"} for i in range(25))]}
    with caplog.at_level(logging.INFO):
        unknown_fields = UnknownFields(BINANCE)
        unknown_fields.log_once(1, AvroDecoder(KNOWN, KNOWN, keep_unknown=True))
        for _ in range(2):
            unknown_fields.log_once(7, unknown)
        unknown_fields.log_once(8, AvroDecoder(many, KNOWN, keep_unknown=True))
        UnknownFields(ignoring()).log_once(7, unknown)
    assert [record.message.partition("TradeV2")[2] for record in caplog.records] == [
        " does not know: extra: kept in vendor_data",
        f" does not know: {', '.join(f'f{i}' for i in range(20))} and 5 more: kept in vendor_data",
        " does not know: extra: ignored, as K2FLOW_BINANCE_UNKNOWN_FIELDS says",
    ]
    assert caplog.records[0].message.startswith("binance: schema id 7 has fields")


def test_setting_keeps_or_ignores_unknown_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    keep, ignore = (Exchange("binance", "BINANCE", BINANCE.declared) for _ in range(2))
    assert keep.settings.unknown_fields == "keep"
    monkeypatch.setenv("K2FLOW_BINANCE_UNKNOWN_FIELDS", "ignore")
    decoder = AvroDecoder(with_unknown_field("int"), KNOWN, keep_unknown=True)
    decoded = decoder.decode(pa.array([b"\x02\x02"] * 5))
    assert UnknownFields(ignore).add(decoder, MAPS, decoded.unknown) is MAPS
    assert UnknownFields(keep).add(decoder, MAPS, decoded.unknown).to_pylist()[2] == [("extra", "1")]
    monkeypatch.setenv("K2FLOW_BINANCE_UNKNOWN_FIELDS", "drop")
    with pytest.raises(SettingsError, match=r"K2FLOW_BINANCE_UNKNOWN_FIELDS='drop' is wrong: .*'keep' or 'ignore'"):
        _ = Exchange("binance", "BINANCE", BINANCE.declared).settings


def test_too_long_values_are_an_error_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vendor_data, "MAX_BYTES", 40)
    decoder = AvroDecoder(with_unknown_field("int"), KNOWN, keep_unknown=True)
    decoded = decoder.decode(pa.array([b"\x02\x02"] * 5))
    with pytest.raises(SchemaError, match=r"K2FLOW_BINANCE_BATCH_ROWS lower, or K2FLOW_BINANCE_UNKNOWN_FIELDS"):
        UnknownFields(BINANCE).add(decoder, MAPS, decoded.unknown)
