"""Random types of a writer for prices, quantities and times: refused, or the values of exact fractions.

The oracle knows which types have a meaning, and computes with Python's fractions. It shares no code with k2flow.
"""

import io
import json
import random
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import fastavro
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2flow.records import Defect
from k2flow.trades.registry import trade_decoder
from k2flow.trades.registry_lookup import UnknownSchemaError
from k2flow.trades.schema import trade_schema
from tests.messages import TRADE
from tests.property import examples
from tests.property.test_avro_decoder import PROFILE, as_payloads, schemas, write_random, zigzag

AMOUNTS, TIMES = ("price", "quantity"), ("timestamp", "ingestion_timestamp")
DECIMAL = {"logicalType": "decimal", "precision": 18, "scale": 8}
LIMIT = Fraction(10**10)
Meaning = Callable[[Any], Fraction | int | None]
"""Converts a value that fastavro read without logical types; None if it cannot be stored exactly."""


def random_field(name: str, rng: random.Random) -> dict[str, Any]:
    """Create a field whose type is right, nearly right or wrong, half of the time right."""
    good: list[Any] = ["int", "long", "string"] if name in AMOUNTS else ["long"]
    good += [{"type": "bytes", **DECIMAL}, {"type": "fixed", "name": f"F{name}", "size": 8, **DECIMAL}] * (
        name in AMOUNTS
    )
    good += [{"type": "long", "logicalType": f"timestamp-{unit}"} for unit in ("millis", "micros")] * (name in TIMES)
    kinds = ("int", "long", "float", "double", "string", "bytes", "boolean", "null")
    kind: Any = rng.choice(good) if rng.random() < 0.8 else rng.choice(kinds)
    attributes: dict[str, list[Any]] = {
        "logicalType": [
            "decimal",
            "timestamp-millis",
            "timestamp-micros",
            "timestamp-nanos",
            "Decimal",
            "date",
            5,
            None,
        ],
        "precision": [18, "18", 17, 0, -18, 18.0, None],
        "scale": [8, "8", 0, -8, 19, None],
    }
    if rng.random() < 0.2:  # damage inside
        kind = {**(kind if isinstance(kind, dict) else {"type": kind})}
        key = rng.choice(list(attributes))
        if rng.random() < 0.5:
            kind.pop(key, None)
        else:
            kind[key] = rng.choice(attributes[key])
    field = {"name": name, "type": kind}
    if rng.random() < 0.1:
        field |= {key: rng.choice(values) for key, values in attributes.items() if rng.random() < 0.6}
    if rng.random() < 0.2 and (kind["type"] if isinstance(kind, dict) else kind) != "null":
        field["type"] = rng.choice((["null", kind], [kind, "null"]))
    return field


def branch_meaning(name: str, kind: Any, beside: dict[str, Any]) -> Meaning | None:
    """Return how to read the values of a type that is no union; None for one without a certain meaning."""
    inside = kind if isinstance(kind, dict) else {"type": kind}
    own = {key: inside[key] for key in DECIMAL if key in inside}
    if any(json.dumps(own.get(key, "absent")) != json.dumps(value) for key, value in beside.items()):
        return None
    if name in TIMES:
        if inside["type"] != "long":
            return None
        if not own or own.get("logicalType") == "timestamp-micros":
            return lambda value: int(value)
        return (lambda value: value * 1000) if own.get("logicalType") == "timestamp-millis" else None
    if inside["type"] in ("bytes", "fixed"):
        return (
            (lambda value: fits(Fraction(int.from_bytes(value, "big", signed=True), 10**8))) if is_exact(own) else None
        )
    return as_number if inside["type"] in ("int", "long", "string") and not own else None


def is_exact(own: dict[str, Any]) -> bool:
    """Whether attributes are those of decimal(18, 8), of the right types in JSON."""
    return json.dumps(own, sort_keys=True) == json.dumps(DECIMAL, sort_keys=True)


def fits(number: Fraction) -> Fraction | None:
    return number if abs(number) < LIMIT and (number * 10**8).denominator == 1 else None


def as_number(value: Any) -> Fraction | None:
    if isinstance(value, int):
        return fits(Fraction(value))
    if not value or set(value) - set("+-.eE0123456789"):
        return None
    try:
        return fits(Fraction(value))
    except (ValueError, ZeroDivisionError):
        return None


def random_value(kind: Any, rng: random.Random) -> bytes:
    """Encode a value that is often a number, whatever its type."""
    if isinstance(kind, list):
        branch = rng.randrange(len(kind))
        return zigzag(branch) + random_value(kind[branch], rng)
    plain = kind["type"] if isinstance(kind, dict) else kind
    if plain == "string":
        whole, fraction = (
            rng.randrange(10 ** rng.randint(1, 12)),
            "".join(rng.choices("0123456789", k=rng.randint(0, 10))),
        )
        texts = (f"{whole}.{fraction}", str(whole), f"-{whole}e{rng.randint(-12, 12)}", f"+.{fraction}E3", f"{whole}.",
                 "", "nan", "1/2", " 7", "é", f"{whole}_000", f"{fraction}")  # fmt: skip
        raw = rng.choice(texts).encode()
        return zigzag(len(raw)) + raw
    if plain in ("bytes", "fixed"):
        size = kind["size"] if plain == "fixed" else rng.randrange(10)
        raw = (
            rng.randbytes(size)
            if rng.random() < 0.3
            else (b"\0" * size + rng.randbytes(min(size, 7)))[-size:]
            if size
            else b""
        )
        return raw if plain == "fixed" else zigzag(size) + raw
    return write_random(plain, rng)


def check_types(extra: Any, rng: random.Random) -> bool:
    """Check one random schema, with fields of random types beside those of TradeV2; return whether it was accepted."""
    fields = [dict(field) for field in trade_schema()["fields"]]
    for i, field in enumerate(fields):
        if field["name"] in AMOUNTS + TIMES:
            fields[i] = random_field(field["name"], rng)
    for number, field in enumerate(extra["fields"]):
        fields.insert(rng.randrange(len(fields) + 1), {"name": f"extra{number}", "type": field["type"]})
    schema = {**trade_schema(), "fields": fields}
    meanings: dict[str, list[Meaning | None]] = {}
    for field in fields:
        if field["name"] in AMOUNTS + TIMES:
            beside = {key: field[key] for key in DECIMAL if key in field}
            branches = field["type"] if isinstance(field["type"], list) else [field["type"]]
            branches = [branch["type"] if branch == {"type": "null"} else branch for branch in branches]
            known = [None if branch == "null" else branch_meaning(field["name"], branch, beside) for branch in branches]
            meanings[field["name"]] = known
    refused = [name for name, known in meanings.items() if not any(known)]
    if refused:
        with pytest.raises(UnknownSchemaError, match="accepted are") as caught:
            trade_decoder(1, json.dumps(schema))
        assert any(f"field `{name}`" in str(caught.value) for name in refused)
        return False
    check_values(schema, meanings, rng)
    return True


def check_values(schema: Any, meanings: dict[str, list[Meaning | None]], rng: random.Random) -> None:
    payloads, expected = [], []
    for _ in range(12):
        payload, row = b"\0\0\0\0\1", {}
        for field in schema["fields"]:
            name, kind = field["name"], field["type"]
            if name not in meanings:
                payload += encoded(kind, TRADE[name]) if name in TRADE else write_random(kind, rng)
                continue
            raw = random_value(kind, rng)
            payload += raw
            row[name] = meaning_of(kind, meanings[name], raw)
        payloads.append(payload)
        expected.append(row)
    decoded = trade_decoder(1, json.dumps(schema)).decode(as_payloads(payloads, rng), 5)
    for i, row in enumerate(expected):
        bad = [name for name in row if row[name] is None]
        assert decoded.defect[i] == (Defect.MALFORMED if bad else Defect.NONE), (decoded.detail(i), row)
        if bad:
            assert decoded.detail(i).startswith(f"field `{bad[0]}`: "), (decoded.detail(i), row)
            continue
        assert decoded.batch.column("message_id")[i].as_py() == TRADE["message_id"]
        for name, value in row.items():
            column = decoded.batch.column(name)
            found = Fraction(column[i].as_py()) if name in AMOUNTS else column.cast("int64")[i].as_py()
            assert found == (value if name in AMOUNTS else max(-(2**63), min(2**63 - 1, value))), name


def meaning_of(kind: Any, known: list[Meaning | None], raw: bytes) -> Any:
    stream = io.BytesIO(raw)
    branch = 0
    if isinstance(kind, list):
        branch = fastavro.schemaless_reader(stream, "long", None)  # type: ignore[assignment]
        kind = kind[branch]
    plain = kind["type"] if isinstance(kind, dict) else kind
    if plain == "fixed":
        plain = {"type": "fixed", "name": "F", "size": kind["size"]}
    meaning = known[branch]
    return None if meaning is None else meaning(fastavro.schemaless_reader(stream, plain, None))


def encoded(kind: Any, value: Any) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, kind, value)
    return stream.getvalue()


@settings(PROFILE, max_examples=examples(300))
@given(schemas(), st.integers(0, 2**32))
def test_random_writer_types(extra: Any, seed: int) -> None:
    check_types(extra, random.Random(seed))
