"""The default values of a reader's fields, converted from JSON to Arrow.

Avro 1.12 specification, "Complex types", records, the table of field default values.
"""

import decimal
from typing import Any

import pyarrow as pa

from k2flow.avro.parse import Json, ParsedSchema
from k2flow.avro.schemas import logical_type
from k2flow.errors import SchemaError

_DEFAULT_ERRORS = (pa.ArrowException, ValueError, TypeError, KeyError, AttributeError, OverflowError)
_JSON_TYPES = {
    "null": (type(None),),
    "boolean": (bool,),
    "int": (int,),
    "long": (int,),
    "float": (int, float),
    "double": (int, float),
    "string": (str,),
    "array": (list,),
}
"""The types of a default value in parsed JSON, where the Avro type restricts them."""


def default_array(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any, label: str) -> pa.Array:
    """Return an array of the one default value. Raises SchemaError."""
    try:
        return pa.array([_default_value(schema, reader, kind, default)], kind)
    except _DEFAULT_ERRORS as error:
        raise SchemaError(f"{label}: default {default!r} is not a value of its type") from error


def _default_value(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any) -> Any:
    schema = reader.expand(schema)
    if isinstance(schema, list):
        return _union_value(schema, reader, kind, default)
    kind_name = schema["type"]
    if type(default) not in _JSON_TYPES.get(kind_name, (type(default),)):
        raise ValueError("not of this type")
    match kind_name:
        case "float" | "double":
            return float(default)
        case "enum" if default not in schema["symbols"]:
            raise ValueError("not a symbol")
        case "bytes" | "fixed":
            return _bytes_value(schema, kind, default)
        case "array":
            return [_default_value(schema["items"], reader, kind.value_type, item) for item in default]
        case "map":
            items = default.items()
            return [(key, _default_value(schema["values"], reader, kind.item_type, value)) for key, value in items]
        case "record" | "error":
            values = {}
            for field in schema["fields"]:
                name = field["name"]
                value = default[name] if name in default else field["default"]
                values[name] = _default_value(field["type"], reader, kind.field(name).type, value)
            return values
    return default


def _bytes_value(schema: Json, kind: pa.DataType, default: Any) -> Any:
    raw = default.encode("latin-1")  # each character encodes the byte of its code point
    if schema["type"] == "fixed" and len(raw) != schema["size"]:
        raise ValueError("not of this size")
    logical = logical_type(schema)
    if logical is None:
        return raw
    _, precision, scale = logical
    unscaled = int.from_bytes(raw, "big", signed=True)
    if abs(unscaled) >= 10**precision:
        raise ValueError("too many digits")
    return decimal.Decimal(f"{unscaled}E-{scale}")


def _union_value(schema: Json, reader: ParsedSchema, kind: pa.DataType, default: Any) -> Any:
    branches = [branch for branch in schema if reader.expand(branch) != {"type": "null"}]
    if default is None and len(branches) < len(schema):
        return None
    for number, branch in enumerate(branches):
        own = kind if len(branches) == 1 else kind.field(number).type
        try:
            value = _default_value(branch, reader, own, default)
            pa.scalar(value, own)
        except _DEFAULT_ERRORS:
            continue
        return value if len(branches) == 1 else {kind.field(number).name: value}
    raise ValueError("no branch accepts the default")
