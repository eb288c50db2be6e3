"""Which types of a writer have a certain meaning for a reader's decimal or time (docs/adr/0021).

Avro ignores a logical type that is damaged or beside its type, and then any bytes resolve to a decimal. So these rules
are stricter than Avro's, and they also allow what converts exactly.
"""

import json
from collections.abc import Mapping
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.avro.decimals import Decimal, IntegerDecimal, TextDecimal
from k2flow.avro.parse import Json
from k2flow.avro.plan import Integer, Node
from k2flow.avro.schemas import logical_type
from k2flow.avro.times import MillisecondTime

_ATTRIBUTES = ("logicalType", "precision", "scale")
_MICROSECONDS = pa.timestamp("us", "UTC")
_MAX_SHOWN_CHARACTERS = 200
_INT64_DIGITS = 18


def accepted_types(kind: pa.DataType | None) -> str | None:
    """Return the writer's types that are accepted for a column, as text; None if Avro's rules apply."""
    if kind is not None and pa.types.is_decimal(kind):
        own = f"bytes or fixed with decimal({kind.precision}, {kind.scale}) inside the type"
        return f"{own}, int, long, string with a decimal number" if kind.precision <= _INT64_DIGITS else own
    if kind == _MICROSECONDS:
        return "long with timestamp-micros or timestamp-millis inside the type, long in microseconds"
    return None


def exact_node(writer: Json, kind: pa.DataType, label: str) -> Node | None:
    """Return the node that reads the writer's type into a column exactly; None for a type that is not accepted."""
    if not accepted_types(kind):
        return None
    logical, name = logical_type(writer), writer["type"]
    is_plain = not any(key in writer for key in _ATTRIBUTES)
    if pa.types.is_decimal(kind):
        if logical == ("decimal", kind.precision, kind.scale):
            return Decimal(kind, label, writer.get("size"))
        if not is_plain or kind.precision > _INT64_DIGITS:
            return None
        match name:
            case "int" | "long":
                return IntegerDecimal(kind, label, 32 if name == "int" else 64)
            case "string":
                return TextDecimal(kind, label)
        return None
    if name == "long" and (is_plain or logical == ("timestamp-micros", 0, 0)):
        return Integer(kind, label, 64, np.int64)
    return MillisecondTime(kind, label) if logical == ("timestamp-millis", 0, 0) else None


def beside(field: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes of a logical type that stand beside the type of a field instead of inside."""
    return {key: field[key] for key in _ATTRIBUTES if key in field}


def contradicts(attributes: Mapping[str, Any], schema: Json) -> bool:
    """Return whether attributes beside a type are not the same inside it."""
    return any(key not in schema or schema[key] != value for key, value in attributes.items())


def show(schema: Json, attributes: Mapping[str, Any]) -> str:
    """Return a type with the attributes of its logical type, and those beside it, as text."""
    inside = {key: schema[key] for key in ("size", *_ATTRIBUTES) if key in schema}
    text = str(schema["type"]) + (f" with {json.dumps(inside)[1:-1]}" if inside else "")
    text += f", and beside the type {json.dumps(attributes)[1:-1]}" if attributes else ""
    return text if len(text) <= _MAX_SHOWN_CHARACTERS else f"{text[:_MAX_SHOWN_CHARACTERS]}..."
