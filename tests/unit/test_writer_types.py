"""Types of a writer's schema: which ones price, quantity and both times accept, and that others refuse no schema."""

import json
import logging
import re
import struct
from decimal import Decimal
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.avro.decimals import parse_decimal
from k2flow.exchange import Exchange
from k2flow.trades.decode import DecodedBatch
from k2flow.trades.record_decoder import RecordDecoder
from k2flow.trades.registry import Schemas, trade_decoder
from tests.messages import BINANCE, NOW_US, TRADE, decode, details, encoded, evolved, reasons

DECIMAL = {"logicalType": "decimal", "precision": 18, "scale": 8}
AMOUNT = {"type": "bytes", **DECIMAL}
LIMIT = "does not fit into decimal(18, 8): the limit is 9999999999.99999999"
NUMBERS = "bytes or fixed with decimal(18, 8) inside the type, int, long, string with a decimal number"
TIMES = "long with timestamp-micros or timestamp-millis inside the type, long in microseconds"


class OneSchema(Schemas):
    """Every schema id means one schema."""

    def __init__(self, schema: Any) -> None:
        self._schema = json.dumps(schema)

    def decoder(self, schema_id: int) -> RecordDecoder:
        return trade_decoder(schema_id, self._schema)


def zigzag(number: int) -> bytes:
    number = (number << 1) ^ (number >> 63)
    out = b""
    while number > 127:
        out, number = out + bytes([number & 127 | 128]), number >> 7
    return out + bytes([number])


def sized(data: bytes) -> bytes:
    return zigzag(len(data)) + data


def text(number: str) -> bytes:
    return sized(number.encode())


def unscaled(number: int) -> bytes:
    return sized(number.to_bytes(8, "big", signed=True))


def payloads(schema: Any, **given_: list[bytes]) -> list[bytes]:
    """Return trades of a writer's schema; the bytes of some fields are given, one value for each trade."""
    known = {field["name"]: encoded(field["type"], TRADE[field["name"]]) for field in evolved()["fields"]}
    found = []
    for values in zip(*given_.values(), strict=True):
        by_name = {**known, **dict(zip(given_, values, strict=True))}
        found.append(b"\0\0\0\0\x01" + b"".join(by_name[field["name"]] for field in schema["fields"]))
    return found


def decoded_by(schema: Any, values: list[bytes], exchange: Exchange = BINANCE) -> DecodedBatch:
    return decode(values, OneSchema(schema), exchange)


def refused(schema: Any) -> str:
    """Return the one detail of messages whose schema is unknown."""
    decoded = decoded_by(schema, [b"\0\0\0\0\x01", b"\0\0\0\0\x01\0"])
    assert reasons(decoded) == {0: "unknown_schema", 1: "unknown_schema"}
    first, second = details(decoded)
    assert first == second
    return first


# Types with a certain meaning


@pytest.mark.parametrize("name", ["price", "quantity"])
@pytest.mark.parametrize(
    ("field", "values", "wanted"),
    [
        ({"type": AMOUNT}, [unscaled(6712345000000)], ["67123.45"]),
        ({"type": {**AMOUNT, "connect.name": "org.apache.kafka.connect.data.Decimal"}}, [unscaled(1)], ["0.00000001"]),
        ({"type": AMOUNT, **DECIMAL}, [unscaled(1)], ["0.00000001"]),
        (
            {"type": {"type": "fixed", "name": "Money", "size": 8, **DECIMAL}},
            [(10**18 - 1).to_bytes(8, "big")],
            ["9999999999.99999999"],
        ),
        ({"type": "int"}, [zigzag(67123), zigzag(2**31 - 1)], ["67123", "2147483647"]),
        ({"type": "long"}, [zigzag(1), zigzag(10**10 - 1)], ["1", "9999999999"]),
        (
            {"type": {"type": "string", "avro.java.string": "String"}},
            [text(each) for each in ("1.25", "67123.45", "1E-8", "0.10", "+2", ".5", "3.", "12e3", "1.50000000000")],
            ["1.25", "67123.45", "0.00000001", "0.1", "2", "0.5", "3", "12000", "1.5"],
        ),
        ({"type": ["null", "string"]}, [b"\x02" + text("9999999999.99999999")], ["9999999999.99999999"]),
        ({"type": ["long", AMOUNT, "string"]}, [b"\0" + zigzag(3), b"\x02" + unscaled(1), b"\x04" + text("0.3")],
         ["3", "0.00000001", "0.3"]),
    ],
)  # fmt: skip
def test_amounts_are_converted_exactly(
    name: str, field: dict[str, Any], values: list[bytes], wanted: list[str]
) -> None:
    schema = evolved(**{name: field})
    decoded = decoded_by(schema, payloads(schema, **{name: values}))
    assert reasons(decoded) == {}
    assert decoded.trades.rows[name].to_pylist() == [Decimal(each) for each in wanted]


def test_types_may_be_named_and_used_again() -> None:
    money = {"type": "fixed", "name": "Money", "size": 9, **DECIMAL}
    schema = evolved(price={"type": money}, quantity={"type": {"type": "Money"}})
    values = payloads(schema, price=[(10**8).to_bytes(9, "big")], quantity=[(5).to_bytes(9, "big")])
    (row,) = decoded_by(schema, values).trades.rows.to_pylist()
    assert (row["price"], row["quantity"]) == (1, Decimal("0.00000005"))


@pytest.mark.parametrize("name", ["timestamp", "ingestion_timestamp"])
@pytest.mark.parametrize(
    ("field", "raw"),
    [
        ({"type": {"type": "long", "logicalType": "timestamp-millis"}}, NOW_US // 1000),
        ({"type": {"type": "long", "logicalType": "timestamp-micros"}, "logicalType": "timestamp-micros"}, NOW_US),
        ({"type": "long"}, NOW_US),
    ],
)
def test_times_are_converted_exactly(name: str, field: dict[str, Any], raw: int) -> None:
    schema = evolved(**{name: field})
    decoded = decoded_by(schema, payloads(schema, **{name: [zigzag(raw)]}))
    assert reasons(decoded) == {}
    assert decoded.trades.rows[name].cast("int64").to_pylist() == [NOW_US]


def test_milliseconds_beyond_any_date_are_out_of_range() -> None:
    schema = evolved(timestamp={"type": {"type": "long", "logicalType": "timestamp-millis"}})
    raw = [zigzag(each) for each in (2**63 - 1, -(2**63), 2**63 // 1000, 253_402_300_800_000)]
    assert set(reasons(decoded_by(schema, payloads(schema, timestamp=raw))).values()) == {"timestamp_out_of_range"}


def test_milliseconds_in_a_plain_long_never_land() -> None:
    """A plain long is in TradeV2's microseconds. The rules find another unit."""
    schema = evolved(timestamp={"type": "long"}, ingestion_timestamp={"type": "long"})
    raw = [zigzag(NOW_US // 1000)]
    assert decoded_by(schema, payloads(schema, timestamp=raw, ingestion_timestamp=raw)).trades.rows.num_rows == 0


# Types without one


@pytest.mark.parametrize("name", ["price", "quantity"])
@pytest.mark.parametrize(
    ("field", "found"),
    [
        ({"type": "bytes"}, "bytes"),
        ({"type": "bytes", **DECIMAL},
         'bytes, and beside the type "logicalType": "decimal", "precision": 18, "scale": 8'),
        ({"type": "long", **DECIMAL},
         'long, and beside the type "logicalType": "decimal", "precision": 18, "scale": 8'),
        ({"type": "string", "scale": 8}, 'string, and beside the type "scale": 8'),
        ({"type": {**AMOUNT, "scale": 2}, "scale": 8},
         'bytes with "logicalType": "decimal", "precision": 18, "scale": 2, and beside the type "scale": 8'),
        ({"type": ["null", "bytes"], "logicalType": "decimal"}, 'bytes, and beside the type "logicalType": "decimal"'),
        ({"type": {"type": "bytes", "logicalType": "decimal", "scale": 8}},
         'bytes with "logicalType": "decimal", "scale": 8'),
        ({"type": {"type": "bytes", "logicalType": "decimal", "precision": 18}},
         'bytes with "logicalType": "decimal", "precision": 18'),
        ({"type": {"type": "bytes", "precision": 18, "scale": 8}}, 'bytes with "precision": 18, "scale": 8'),
        ({"type": {**AMOUNT, "precision": "18"}}, 'bytes with "logicalType": "decimal", "precision": "18", "scale": 8'),
        ({"type": {**AMOUNT, "precision": 18.0}}, 'bytes with "logicalType": "decimal", "precision": 18.0, "scale": 8'),
        ({"type": {**AMOUNT, "precision": True, "scale": 0}},
         'bytes with "logicalType": "decimal", "precision": true, "scale": 0'),
        ({"type": {**AMOUNT, "scale": -8}}, 'bytes with "logicalType": "decimal", "precision": 18, "scale": -8'),
        ({"type": {**AMOUNT, "scale": 19}}, 'bytes with "logicalType": "decimal", "precision": 18, "scale": 19'),
        ({"type": {**AMOUNT, "precision": 20}}, 'bytes with "logicalType": "decimal", "precision": 20, "scale": 8'),
        ({"type": {**AMOUNT, "logicalType": "big-decimal"}},
         'bytes with "logicalType": "big-decimal", "precision": 18, "scale": 8'),
        ({"type": {**AMOUNT, "logicalType": ["decimal"]}},
         'bytes with "logicalType": ["decimal"], "precision": 18, "scale": 8'),
        ({"type": {"type": "fixed", "name": "F", "size": 7, **DECIMAL}},
         'fixed with "size": 7, "logicalType": "decimal", "precision": 18, "scale": 8'),
        ({"type": {"type": "fixed", "name": "F", "size": 8}}, 'fixed with "size": 8'),
        ({"type": {"type": "long", **DECIMAL}}, 'long with "logicalType": "decimal", "precision": 18, "scale": 8'),
        ({"type": {"type": "string", **DECIMAL}}, 'string with "logicalType": "decimal", "precision": 18, "scale": 8'),
        ({"type": {"type": "int", "logicalType": "date"}}, 'int with "logicalType": "date"'),
        ({"type": "double"}, "double"),
        ({"type": "float"}, "float"),
        ({"type": "boolean"}, "boolean"),
        ({"type": "null"}, "null"),
        ({"type": ["null", "double"]}, "double"),
        ({"type": {"type": "array", "items": "int"}}, "array"),
        ({"type": {"type": "record", "name": "VariableScaleDecimal", "fields": [{"name": "scale", "type": "int"}]}},
         "record"),
    ],
)  # fmt: skip
def test_uncertain_amounts_are_an_unknown_schema(name: str, field: dict[str, Any], found: str) -> None:
    assert refused(evolved(**{name: field})) == (
        f"schema id 1 does not resolve to TradeV2: field `{name}`: the writer's {found} cannot be read as "
        f"bytes (decimal(18, 8)); accepted are {NUMBERS}"
    )


@pytest.mark.parametrize("name", ["timestamp", "ingestion_timestamp"])
@pytest.mark.parametrize(
    ("field", "found"),
    [
        *(
            ({"type": "long", "logicalType": logical}, f'long, and beside the type "logicalType": "{logical}"')
            for logical in ("timestamp-millis", "timestamp-micros")
        ),
        *(
            ({"type": {"type": "long", "logicalType": logical}}, f'long with "logicalType": "{logical}"')
            for logical in ("timestamp-nanos", "local-timestamp-micros", "local-timestamp-millis", "time-micros",
                            "timestamp_micros", "Timestamp-Micros", "")
        ),
        ({"type": {"type": "int", "logicalType": "timestamp-millis"}}, 'int with "logicalType": "timestamp-millis"'),
        ({"type": {"type": "string", "logicalType": "timestamp-micros"}},
         'string with "logicalType": "timestamp-micros"'),
        ({"type": "int"}, "int"),
        ({"type": "string"}, "string"),
        ({"type": "double"}, "double"),
    ],
)  # fmt: skip
def test_uncertain_times_are_an_unknown_schema(name: str, field: dict[str, Any], found: str) -> None:
    assert refused(evolved(**{name: field})) == (
        f"schema id 1 does not resolve to TradeV2: field `{name}`: the writer's {found} cannot be read as "
        f"long (timestamp-micros); accepted are {TIMES}"
    )


def test_number_in_bytes_is_no_text() -> None:
    for name, field in (
        ("symbol", {"type": AMOUNT}),
        ("trade_conditions", {"type": {"type": "array", "items": AMOUNT}}),
    ):
        assert "cannot be read as string" in refused(evolved(**{name: field}))


def test_field_that_a_record_has_twice_is_refused() -> None:
    schema = evolved()
    schema["fields"].append({"name": "price", "type": AMOUNT})
    assert "field `price`: the writer's record has two fields with this name" in refused(schema)


# Values that cannot be stored


@pytest.mark.parametrize(
    ("kind", "value", "detail"),
    [
        (AMOUNT, sized((10**18).to_bytes(8, "big")), f"10000000000.00000000 at byte {{at}} {LIMIT}"),
        (AMOUNT, sized((-(10**20)).to_bytes(9, "big", signed=True)), f"-1000000000000.00000000 at byte {{at}} {LIMIT}"),
        (AMOUNT, sized(b"\x7f" * 65), f"a number of 65 bytes at byte {{at}} {LIMIT}"),
        ({"type": "fixed", "name": "F", "size": 8, **DECIMAL}, b"\x7f" + b"\xff" * 7,
         f"92233720368.54775807 at byte {{at}} {LIMIT}"),
        ("long", zigzag(10**10), f"10000000000 at byte {{at}} {LIMIT}"),
        ("long", zigzag(-(2**63)), f"-9223372036854775808 at byte {{at}} {LIMIT}"),
        ("string", text("10000000000"), f"'10000000000' at byte {{at}} {LIMIT}"),
        ("string", text("1e400"), f"'1e400' at byte {{at}} {LIMIT}"),
        ("string", text("1e999999999"), f"'1e999999999' at byte {{at}} {LIMIT}"),
        ("string", text("9" * 5000), f"'{'9' * 100}'... (5000 characters) at byte {{at}} {LIMIT}"),
        ("string", text("0.123456789"),
         "'0.123456789' at byte {at} has more than 8 digits after the point, and is never rounded"),
        ("string", text("1e-9"), "'1e-9' at byte {at} has more than 8 digits after the point, and is never rounded"),
        *(
            ("string", text(bad), f"{bad!r} at byte {{at}} is not a decimal number")
            for bad in ("", "abc", "NaN", "Infinity", " 1", "1 ", "1\n", "1,5", "1_0", "0x10", "--1", "1e", ".", "+",
                        "٣", "１", "1.2.3", "1e1.5")
        ),
    ],
)  # fmt: skip
def test_value_that_does_not_fit_is_malformed(kind: Any, value: bytes, detail: str) -> None:
    """The dead letter names the field, the value and the limit. The trades beside it are whole."""
    schema = evolved(price={"type": kind})
    good = {"long": zigzag(7), "string": text("7.5")}
    fine = good[kind] if isinstance(kind, str) else unscaled(7) if kind is AMOUNT else (7).to_bytes(8, "big")
    values = payloads(schema, price=[fine, value, fine])
    decoded = decoded_by(schema, values)
    assert reasons(decoded) == {1: "malformed"}
    at = re.fullmatch(re.escape(f"field `price`: {detail}").replace(r"\{at\}", r"(\d+)"), details(decoded)[0])
    assert at is not None, details(decoded)
    begin = payloads(schema, price=[b"<>"])[0].index(b"<>")
    assert int(at[1]) - begin in (0, 1, 2)  # of the number, or of its first byte after the length
    assert decoded.trades.rows.num_rows == 2


def test_text_that_is_not_unicode() -> None:
    schema = evolved(price={"type": "string"})
    decoded = decoded_by(schema, payloads(schema, price=[sized(b"1\xff"), text("1")]))
    assert reasons(decoded) == {0: "invalid_utf8"}


@given(st.from_regex(r"[+-]?[0-9]{0,12}(\.[0-9]{0,10})?([eE][+-]?[0-9]{1,2})?", fullmatch=True) | st.text(max_size=4))
def test_texts_equal_exact_fractions(number: str) -> None:
    """The oracle knows numbers as Python's fractions do, which round nothing."""
    found = parse_decimal(number, 18, 8)
    try:
        if set(number) - set("+-.eE0123456789"):
            raise ValueError(number)
        exact = Fraction(Decimal(number))
    except (ValueError, ArithmeticError):
        assert found == "{0} at byte {at} is not a decimal number"
        return
    scaled = exact * 10**8
    if abs(exact) >= 10**10:
        assert isinstance(found, str)
        assert "the limit is" in found
    elif scaled.denominator != 1:
        assert isinstance(found, str)
        assert "never rounded" in found
    else:
        assert found == scaled


# Fields that TradeV2 does not need


NODE = {
    "type": "record",
    "name": "Node",
    "fields": [{"name": "v", "type": "long"}, {"name": "next", "type": ["null", "Node"]}],
}
TREE = {"type": "record", "name": "Tree", "fields": [
    {"name": "s", "type": "string"}, {"name": "sub", "type": {"type": "array", "items": "Tree"}},
    {"name": "by", "type": {"type": "map", "values": ["Tree", "null"]}}]}  # fmt: skip
LEAF = text("x") + b"\0\0"


def nested(levels: int) -> Any:
    return {"type": "array", "items": nested(levels - 1)} if levels else "int"


def doubling(levels: int, leaf: str) -> Any:
    schema: Any = {"type": "record", "name": "L0", "fields": [{"name": "a", "type": leaf}]}
    for i in range(1, levels):
        fields = [{"name": "a", "type": schema}, {"name": "b", "type": f"L{i - 1}"}]
        schema = {"type": "record", "name": f"L{i}", "fields": fields}
    return schema


@pytest.mark.parametrize(
    ("field", "raw", "kept"),
    [
        ({"type": {"type": "bytes", "logicalType": "decimal", "precision": 78, "scale": 0}}, sized(b"\x07"), "7"),
        ({"type": {"type": "bytes", "logicalType": "decimal", "precision": 78, "scale": 4}},
         sized((-(10**77) - 5).to_bytes(33, "big", signed=True)), f"-1{'0' * 73}.0005"),
        ({"type": {"type": "fixed", "name": "F", "size": 40, "logicalType": "decimal", "precision": 90}},
         (10**80).to_bytes(40, "big"), "1" + "0" * 80),
        ({"type": {"type": "bytes", "logicalType": "decimal", "precision": 5, "scale": 9}}, sized(b"\x07"), "07"),
        ({"type": {"type": "bytes", "logicalType": "decimal", "precision": "x"}}, sized(b"\x07"), "07"),
        ({"type": {"type": "fixed", "name": "F", "size": 1, "logicalType": "decimal", "precision": 9}}, b"\x07", "07"),
        ({"type": {"type": "fixed", "name": "F", "size": 12, "logicalType": "duration"}}, b"\x01" * 12, "01" * 12),
        ({"type": {"type": "long", "logicalType": "timestamp-nanos"}}, zigzag(1), "1970-01-01T00:00:00.000000001Z"),
        ({"type": {"type": "long", "logicalType": "unheard-of"}}, zigzag(5), "5"),
        ({"type": "int", "default": "not a number"}, zigzag(5), "5"),
        ({"type": ["null", "double"], "default": 1e400}, b"\0", None),
        ({"type": "int", "aliases": "no list"}, zigzag(5), "5"),
        ({"type": {"type": "enum", "name": "an-odd name", "symbols": ["1st", "a b"]}}, b"\x02", "a b"),
        ({"type": {"type": "enum", "name": "Big", "symbols": [f"S{i}" for i in range(20_000)]}}, zigzag(19_999),
         "S19999"),
        ({"type": "TradeSide"}, b"\x02", "SELL"),
        ({"type": {"type": "TradeSide"}}, b"\x02", "SELL"),
    ],
)  # fmt: skip
def test_unneeded_fields_of_odd_types_are_kept_as_text(field: dict[str, Any], raw: bytes, kept: str | None) -> None:
    schema = evolved()
    schema["fields"].insert(12, {"name": "odd", **field})
    decoded = decoded_by(schema, payloads(schema, odd=[raw, raw]))
    assert reasons(decoded) == {}, details(decoded)
    assert [dict(row).get("odd") for row in decoded.trades.rows["vendor_data"].to_pylist()] == [kept, kept]


@pytest.mark.parametrize("setting", ["keep", "ignore"])
@pytest.mark.parametrize(
    ("kind", "raw", "reason"),
    [
        (NODE, [zigzag(1) + b"\0", (zigzag(-7) + b"\x02") * 3000 + zigzag(300) + b"\0"], "contains itself"),
        (TREE, [LEAF, text("é") + zigzag(2) + LEAF * 2 + b"\0" + zigzag(-1) + zigzag(9) + text("k") + b"\0" + LEAF
                + b"\0"], "contains itself"),
        (["null", TREE], [b"\0", b"\x02" + LEAF], "contains itself"),
        (nested(200), [b"\0", zigzag(1) * 199 + zigzag(2) + zigzag(300) * 2 + b"\0" * 200], "nested more than 64 deep"),
        (doubling(40, "null"), [b"", b""], "more than 10000 types"),
        ({"type": "array", "items": doubling(40, "null")}, [b"\0", zigzag(2**31 - 1) + b"\0"],
         "more than 10000 types"),
        ({"type": "fixed", "name": "F", "size": 1_048_577}, [b"x" * 1_048_577] * 2, "a fixed of 1048577 bytes"),
        (["int", "int"], [b"\0\x02", b"\x02\x04"], "each of a different type"),
        ({"type": "record", "name": "Twice",
          "fields": [{"name": "a", "type": "int"}, {"name": "a", "type": "double"}]},
         [b"\x02" + struct.pack("<d", 1), b"\x02" + struct.pack("<d", 2)], "two fields with the same name"),
    ],
)  # fmt: skip
def test_unneeded_fields_that_can_be_no_column_are_left_out(
    caplog: pytest.LogCaptureFixture, kind: Any, raw: list[bytes], reason: str, setting: str
) -> None:
    """One warning names them, whatever the setting. The fields before and after are whole."""
    schema = evolved()
    schema["fields"].insert(2, {"name": "fee", "type": "long"})
    schema["fields"].insert(6, {"name": "odd", "type": kind})
    exchange = Exchange("binance", "BINANCE", {**BINANCE.declared, "unknown_fields": setting})
    values = payloads(schema, odd=raw, fee=[zigzag(1), zigzag(2)])
    with caplog.at_level(logging.WARNING):
        decoded = decoded_by(schema, [*values, values[1][:-1]], exchange)
    assert reasons(decoded) == {2: "truncated"}
    fees = [[("fee", "1")], [("fee", "2")]] if setting == "keep" else [[], []]
    own = list(TRADE["vendor_data"].items())
    for row, fee in zip(decoded.trades.rows.to_pylist(), fees, strict=True):
        assert row["vendor_data"] == own + fee
        assert {name: row[name] for name in ("message_id", "price", "currency", "side", "source_sequence")} == {
            name: TRADE[name] for name in ("message_id", "price", "currency", "side", "source_sequence")
        }
    (warning,) = [each.message for each in caplog.records if "left out" in each.message]
    assert "schema id 1 has fields that are left out of vendor_data: field `odd" in warning
    assert reason in warning


@pytest.mark.parametrize(
    ("kind", "raw", "reason", "detail"),
    [
        (NODE, zigzag(1) + b"\x04", "malformed", "union branch 2 of 2"),
        (NODE, zigzag(1) + b"\x02", "truncated", "expected"),
        (TREE, sized(b"x")[:1], "truncated", "expected 1 bytes, 0 left,"),
        (TREE, zigzag(-4), "malformed", "length -4"),
        (TREE, b"\xff" * 11, "malformed", "a length of more than 64 bits"),
        (TREE, text("x") + zigzag(2**40) + b"\0", "malformed", "a block of 1099511627776 items"),
        (TREE, text("x") + zigzag(2**30) + b"\0", "truncated", "expected 1073741824 bytes"),
        ({"type": "record", "name": "Endless", "fields": [{"name": "a", "type": "Endless"}]}, b"", "malformed",
         "a record that contains itself without end"),
    ],
)  # fmt: skip
def test_bytes_of_a_field_that_is_left_out_are_passed_over_exactly(
    kind: Any, raw: bytes, reason: str, detail: str
) -> None:
    schema = evolved()
    schema["fields"].append({"name": "odd", "type": kind})
    decoded = decoded_by(schema, payloads(schema, odd=[raw]))
    assert reasons(decoded) == {0: reason}
    assert details(decoded)[0].startswith(f"field `odd`: {detail}")


def test_names_do_not_refuse_a_schema() -> None:
    """Neither those of types, nor those of fields that TradeV2 does not have, nor one that is there twice."""
    schema = evolved()
    side = next(field for field in schema["fields"] if field["name"] == "side")
    side["type"]["name"] = "Direction"
    schema["name"], schema["namespace"] = "Trade", "org.other"
    for name in ("\ud800", "", "a.b", "odd", "odd"):
        schema["fields"].append({"name": name, "type": "int"})
    values = payloads(schema, **{"odd": [zigzag(3)], "": [zigzag(1)], "a.b": [zigzag(2)], "\ud800": [zigzag(4)]})
    decoded = decoded_by(schema, values)
    assert reasons(decoded) == {}, details(decoded)
    (row,) = decoded.trades.rows["vendor_data"].to_pylist()
    assert row == [*TRADE["vendor_data"].items(), ("", "1"), ("a.b", "2"), ("odd", "3")]


def test_number_of_fields_does_not_refuse_a_schema() -> None:
    """Those beyond the limit of types are left out, whatever their place."""
    schema = evolved()
    schema["fields"][:0] = [{"name": f"f{i}", "type": "int"} for i in range(10_050)]
    values = payloads(schema, **{f"f{i}": [zigzag(i)] for i in range(10_050)})
    decoded = decoded_by(schema, values)
    assert reasons(decoded) == {}
    (row,) = decoded.trades.rows["vendor_data"].to_pylist()
    assert 9_900 < len(row) < 10_000
    assert dict(row)["f5000"] == "5000"
