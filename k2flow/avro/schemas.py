"""The logical types of a schema, and the Arrow type of each Avro type.

    null, boolean, int, long, float, double     null, bool, int32, int64, float, double
    bytes, string, enum                         binary, string, string
    fixed                                       fixed_size_binary
    array, map, record                          list, map<string, ...>, struct
    union                                       without null, one branch: its type; more: a struct of `member0`,
                                                `member1`, ..., at most one of them not null
    decimal                                     decimal128 up to 38 digits, decimal256 up to 76; a string of all
                                                digits up to 1000
    date, time-millis, time-micros              date32, time32[ms], time64[us]; a time is within the day
    timestamp-millis, -micros, -nanos           timestamp in that unit, UTC; any value, also outside years 1-9999
    local-timestamp-millis, -micros, -nanos     timestamp in that unit, no time zone
    uuid                                        string; of a fixed: fixed_size_binary

All fields are nullable, because a row with a defect may be null anywhere.
"""

import math

import pyarrow as pa

from k2flow.avro.parse import MAX_PRECISION, PRIMITIVES, Json, ParsedSchema

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
_DECIMAL128_DIGITS = 38
MAX_DECIMAL_DIGITS = 76
"""The limit of digits in Arrow's decimals; wider ones are kept as text."""


def logical_type(schema: Json) -> tuple[str, int, int] | None:
    """Return name, precision and scale of a logical type; precision and scale are 0 unless it is decimal.

    Returns None for an unknown logical type and for one not valid for its type: Avro 1.12 specification, "Logical
    types", ignores both.
    """
    name, kind = schema.get("logicalType"), schema["type"]
    if name == "decimal" and kind in ("bytes", "fixed"):
        precision, scale = schema.get("precision"), schema.get("scale", 0)
        if type(precision) is int and type(scale) is int and 0 <= scale <= precision and 0 < precision <= _most(schema):
            return name, precision, scale
        return None
    if isinstance(name, str) and name in _LOGICAL and _LOGICAL[name][0] == kind:
        return name, 0, 0
    return None


def _most(schema: Json) -> int:
    """Return the most digits that a decimal of this type may have."""
    bits = 8 * schema["size"] - 1 if schema["type"] == "fixed" else math.inf
    return int(min(MAX_PRECISION, bits * math.log10(2)))


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
            if precision > MAX_DECIMAL_DIGITS:
                return pa.string()
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
    return PRIMITIVES[schema["type"]]


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
