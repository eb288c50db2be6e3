"""The Arrow type of each Avro type.

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

from collections.abc import Sequence

import pyarrow as pa

from k2flow.avro.schemas import Json, ParsedSchema, logical_type

_PLAIN = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
    "enum": pa.string(),
}
_LOGICAL = {
    "date": pa.date32(),
    "time-millis": pa.time32("ms"),
    "time-micros": pa.time64("us"),
    "timestamp-millis": pa.timestamp("ms", "UTC"),
    "timestamp-micros": pa.timestamp("us", "UTC"),
    "timestamp-nanos": pa.timestamp("ns", "UTC"),
    "local-timestamp-millis": pa.timestamp("ms"),
    "local-timestamp-micros": pa.timestamp("us"),
    "local-timestamp-nanos": pa.timestamp("ns"),
    "uuid": pa.string(),
}
_DECIMAL128_DIGITS = 38


def arrow_type(schema: Json, parsed: ParsedSchema) -> pa.DataType:
    """Return the Arrow type of a schema; `parsed` defines its named types."""
    schema = parsed.expand(schema)
    if isinstance(schema, list):
        members = [arrow_type(branch, parsed) for branch in schema if not is_null(branch, parsed)]
        return _union_type(members)
    logical = logical_type(schema)
    if logical is not None:
        name, precision, scale = logical
        if name == "decimal":
            return (pa.decimal128 if precision <= _DECIMAL128_DIGITS else pa.decimal256)(precision, scale)
        return _LOGICAL[name]
    match schema["type"]:
        case "record" | "error":
            return pa.struct([(field["name"], arrow_type(field["type"], parsed)) for field in schema["fields"]])
        case "array":
            return pa.list_(arrow_type(schema["items"], parsed))
        case "map":
            return pa.map_(pa.string(), arrow_type(schema["values"], parsed))
        case "fixed":
            return pa.binary(schema["size"])
    return _PLAIN[schema["type"]]


def is_null(schema: Json, parsed: ParsedSchema) -> bool:
    """Return whether a schema is the type null."""
    schema = parsed.expand(schema)
    return not isinstance(schema, list) and schema["type"] == "null"


def _union_type(members: Sequence[pa.DataType]) -> pa.DataType:
    if not members:
        return pa.null()
    if len(members) == 1:
        return members[0]
    return pa.struct([(f"member{i}", kind) for i, kind in enumerate(members)])
