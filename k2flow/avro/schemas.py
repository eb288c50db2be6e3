"""Parses and checks writer and reader schemas, and returns the Arrow type of each Avro type.

fastavro parses; schemas that it accepts but that have no plan are rejected here. The Arrow types:

    null, boolean, int, long, float, double     null, bool, int32, int64, float, double
    bytes, string, enum                         binary, string, string
    fixed                                       fixed_size_binary
    array, map, record                          list, map<string, ...>, struct
    union                                       without null, one branch: its type; more: a struct of `member0`,
                                                `member1`, ..., at most one of them not null
    decimal                                     decimal128 up to 38 digits, decimal256 up to 76
    date, time-millis, time-micros              date32, time32[ms], time64[us]; a time is within the day
    timestamp-millis, -micros, -nanos           timestamp in that unit, UTC; any value, also outside years 1-9999
    local-timestamp-millis, -micros, -nanos     timestamp in that unit, no time zone
    uuid                                        string; of a fixed: fixed_size_binary

All fields are nullable, because a row with a defect may be null anywhere.
"""

import json
from dataclasses import dataclass
from typing import Any

import fastavro
import pyarrow as pa
from fastavro.schema import SchemaParseException

from k2flow.errors import SchemaError

Json = Any  # a parsed JSON schema: a name, a dict with the key `type`, or a list of branches

_PRIMITIVES = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
}
_LOGICAL = {
    "date": ("int", pa.date32()),
    "time-millis": ("int", pa.time32("ms")),
    "time-micros": ("long", pa.time64("us")),
    "timestamp-millis": ("long", pa.timestamp("ms", "UTC")),
    "timestamp-micros": ("long", pa.timestamp("us", "UTC")),
    "timestamp-nanos": ("long", pa.timestamp("ns", "UTC")),
    "local-timestamp-millis": ("long", pa.timestamp("ms")),
    "local-timestamp-micros": ("long", pa.timestamp("us")),
    "local-timestamp-nanos": ("long", pa.timestamp("ns")),
    "uuid": ("string", pa.string()),
}
_PARSE_ERRORS = (SchemaParseException, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)
_DECIMAL128_DIGITS = 38
_MAX_DIGITS = 76
MAX_DEPTH = 64  # the limit of nested types
MAX_TYPES = 10_000
"""The limit of types in a schema. A named type counts each time it is used, because uses can double at each level."""
MAX_FIXED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ParsedSchema:
    """A schema and the named types it defines, by full name."""

    root: Json
    names: dict[str, Json]

    def expand(self, schema: Json) -> Json:
        """Return the definition of a name, a primitive type as a dict, and any other schema unchanged."""
        if isinstance(schema, str):
            return {"type": schema} if schema in _PRIMITIVES else self.names[schema]
        return schema


def parse(schema: Json) -> ParsedSchema:
    """Parse a schema: JSON text, the name of a primitive type, or parsed JSON.

    Raises SchemaError if it is not a valid Avro schema, is recursive, or exceeds a limit.
    """
    names: dict[str, Json] = {}
    try:
        if isinstance(schema, str) and schema not in _PRIMITIVES:
            schema = json.loads(schema)
        root = fastavro.parse_schema(schema, names)
        json.dumps(root, ensure_ascii=False).encode()  # a name with lone surrogates could be neither shown nor stored
    except _PARSE_ERRORS as error:
        raise SchemaError(f"not an Avro schema: {type(error).__name__}: {error}") from error
    parsed = ParsedSchema(root, names)
    if _count(root, parsed, "", (), {}) > MAX_TYPES:
        raise SchemaError(f"more than {MAX_TYPES} types, counting each use of a named type")
    return parsed


def _count(schema: Json, parsed: ParsedSchema, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    """Count the types of a schema, and check them.

    `outer` holds the full names of the enclosing records, "" for other types; `known` the counts of named types. Raises
    SchemaError if a type is recursive, nested too deep or not valid.
    """
    schema = parsed.expand(schema)
    if len(outer) > MAX_DEPTH:
        raise SchemaError(f"{label_of(path)}: types nested more than {MAX_DEPTH} deep")
    if isinstance(schema, list):
        _check_union(schema, parsed, path)
        return 1 + sum(_count(branch, parsed, path, (*outer, ""), known) for branch in schema)
    match schema["type"]:
        case "array":
            return 1 + _count(schema["items"], parsed, f"{path}.item", (*outer, ""), known)
        case "map":
            return 2 + _count(schema["values"], parsed, f"{path}.value", (*outer, ""), known)
        case "record" | "error":
            return _count_record(schema, parsed, path, outer, known)
        case "fixed":
            size = schema["size"]
            if not isinstance(size, int) or not 0 <= size <= MAX_FIXED_BYTES:
                raise SchemaError(f"{label_of(path)}: a fixed of {size} bytes; use 0 to {MAX_FIXED_BYTES}")
        case "enum":
            if not schema["symbols"]:
                raise SchemaError(f"{label_of(path)}: an enum without symbols")
    return 1


def _count_record(schema: Json, parsed: ParsedSchema, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    name = schema["name"]
    if name in outer:
        raise SchemaError(f"{label_of(path)}: type {name} contains itself; recursive types have no Arrow type")
    if name not in known:
        fields = schema["fields"]
        if len({field["name"] for field in fields}) < len(fields):
            raise SchemaError(f"{label_of(path)}: record {name} has two fields with the same name")
        known[name] = 1 + sum(
            _count(field["type"], parsed, f"{path}.{field['name']}", (*outer, name), known) for field in fields
        )
    return known[name]


def _check_union(branches: list[Json], parsed: ParsedSchema, path: str) -> None:
    kinds = []
    for branch in map(parsed.expand, branches):
        if isinstance(branch, list):
            raise SchemaError(f"{label_of(path)}: a union directly inside a union")
        kinds.append(branch.get("name", branch["type"]))
    if not kinds or len(set(kinds)) < len(kinds):
        raise SchemaError(f"{label_of(path)}: a union needs branches, each of a different type")


def label_of(path: str) -> str:
    """Return the label of the field at a dotted path in messages; an empty path is the schema itself."""
    return f"field `{path.lstrip('.')}`" if path else "value"


def logical_type(schema: Json) -> tuple[str, int, int] | None:
    """Return name, precision and scale of a logical type; precision and scale are 0 unless it is decimal.

    Returns None for an unknown logical type and for one not valid for its type: Avro 1.12 specification, "Logical
    types", ignores both.
    """
    name, kind = schema.get("logicalType"), schema["type"]
    if name == "decimal" and kind in ("bytes", "fixed"):
        precision, scale = schema.get("precision"), schema.get("scale", 0)
        if isinstance(precision, int) and isinstance(scale, int) and 0 <= scale <= precision and precision > 0:
            if precision > _MAX_DIGITS:
                raise SchemaError(f"a decimal of {precision} digits; Arrow has at most {_MAX_DIGITS}")
            return name, precision, scale
        return None
    if isinstance(name, str) and name in _LOGICAL and _LOGICAL[name][0] == kind:
        return name, 0, 0
    return None


def arrow_type(schema: Json, parsed: ParsedSchema) -> pa.DataType:
    """Return the Arrow type of a schema; `parsed` defines its named types."""
    schema = parsed.expand(schema)
    if isinstance(schema, list):
        members = [arrow_type(branch, parsed) for branch in schema if not is_null(branch, parsed)]
        if len(members) > 1:
            return pa.struct([(f"member{i}", kind) for i, kind in enumerate(members)])
        return members[0] if members else pa.null()
    logical = logical_type(schema)
    if logical is not None:
        name, precision, scale = logical
        if name == "decimal":
            return (pa.decimal128 if precision <= _DECIMAL128_DIGITS else pa.decimal256)(precision, scale)
        return _LOGICAL[name][1]
    match schema["type"]:
        case "record" | "error":
            return pa.struct([(field["name"], arrow_type(field["type"], parsed)) for field in schema["fields"]])
        case "array":
            return pa.list_(arrow_type(schema["items"], parsed))
        case "map":
            return pa.map_(pa.string(), arrow_type(schema["values"], parsed))
        case "fixed":
            return pa.binary(schema["size"])
        case "enum":
            return pa.string()
    return _PRIMITIVES[schema["type"]]


def is_null(schema: Json, parsed: ParsedSchema) -> bool:
    """Return whether a schema is the type null."""
    schema = parsed.expand(schema)
    return not isinstance(schema, list) and schema["type"] == "null"


def describe(schema: Json) -> str:
    """Return the name of a type in messages."""
    if isinstance(schema, list):
        return "union"
    logical = logical_type(schema)
    name = str(schema.get("name", schema["type"]))
    if logical is None:
        return name
    return f"{name} ({logical[0]}({logical[1]}, {logical[2]}))" if logical[1] else f"{name} ({logical[0]})"


def is_named(writer: Json, reader: Json) -> bool:
    """Return whether the reader's named type has the writer's unqualified name, or an alias equal to its name."""
    full = str(writer["name"])
    short = full.rpartition(".")[2]
    aliases = reader.get("aliases", [])
    return short == str(reader["name"]).rpartition(".")[2] or full in aliases or short in aliases
