"""Converts the default value of a field that only the reader's schema has, from JSON to Arrow.

Avro 1.12 specification, "Complex types", records: the table of field default values.
"""

from decimal import Decimal
from typing import Any

import pyarrow as pa

from k2flow.avro.schemas import Json, ParsedSchema, logical_type
from k2flow.errors import SchemaError


def default_array(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any, label: str) -> pa.Array:
    """Return an array of the one default value.

    Raises:
        SchemaError: The default is not a value of the schema.
    """
    try:
        return pa.array([_value(schema, reader, kind, default)], kind)
    except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError) as error:
        raise SchemaError(f"{label}: default {default!r} is not a value of its type") from error


def _value(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any) -> Any:
    """Return the Python value that pyarrow accepts for `kind`."""
    schema = reader.expand(schema)
    if isinstance(schema, list):
        return _union_value(schema, reader, kind, default)
    match schema["type"]:
        case "null":
            _check(default is None)
            return None
        case "boolean":
            _check(isinstance(default, bool))
        case "int" | "long":
            _check(isinstance(default, int) and not isinstance(default, bool))
        case "float" | "double":
            _check(isinstance(default, int | float) and not isinstance(default, bool))
            return float(default)
        case "string":
            _check(isinstance(default, str))
        case "enum":
            _check(default in schema["symbols"])
        case "bytes" | "fixed":
            return _bytes_value(schema, kind, default)
        case "array":
            _check(isinstance(default, list))
            return [_value(schema["items"], reader, kind.value_type, item) for item in default]
        case "map":
            items = default.items()
            return [(key, _value(schema["values"], reader, kind.item_type, value)) for key, value in items]
        case "record" | "error":
            return {
                field["name"]: _value(
                    field["type"],
                    reader,
                    kind.field(field["name"]).type,
                    default[field["name"]] if field["name"] in default else field["default"],
                )
                for field in schema["fields"]
            }
    return default


def _bytes_value(schema: Json, kind: pa.DataType, default: Any) -> Any:
    raw = default.encode("latin-1")  # each character encodes the byte of its code point
    _check(schema["type"] == "bytes" or len(raw) == schema["size"])
    logical = logical_type(schema)
    if logical is None:
        return raw
    _, precision, scale = logical
    unscaled = int.from_bytes(raw, "big", signed=True)
    _check(abs(unscaled) < 10**precision)
    return Decimal(unscaled).scaleb(-scale) if precision <= 28 else Decimal(f"{unscaled}E-{scale}")


def _union_value(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any) -> Any:
    """Return the value of the first branch that accepts the default."""
    branches = [branch for branch in schema if reader.expand(branch) != {"type": "null"}]
    if default is None and len(branches) < len(schema):
        return None
    for number, branch in enumerate(branches):
        own = kind if len(branches) == 1 else kind.field(number).type
        try:
            value = _value(branch, reader, own, default)
            pa.scalar(value, own)
        except (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError):
            continue
        return value if len(branches) == 1 else {kind.field(number).name: value}
    raise ValueError("no branch accepts the default")


def _check(holds: bool) -> None:
    if not holds:
        raise ValueError("not of this type")
