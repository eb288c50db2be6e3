"""Converts values of any Avro type to text, whole columns at once.

    null                        null, like a null value of any type
    boolean                     true, false
    int, long                   digits
    float, double               the fewest digits that parse to the same number, in Arrow's format: 0.1, 1e+20, inf
    decimal                     all digits of its scale, no exponent: 0.00000001
    bytes, fixed                hexadecimal, lower case, two digits per byte
    string, enum, uuid          unchanged
    date, time-*                2026-01-31, 12:34:56.789
    timestamp-*, local-*        2026-01-31T12:34:56.789000Z, with the digits of its unit; local ones without the Z
    union                       the text of its value
    array, map, record          JSON without spaces: booleans, ints, longs and finite floats and doubles bare, null as
                                null, all else as a string of the text above

A date or timestamp outside the years 1 to 9999 has no text format. Its text is its number of days, or of its unit,
since 1970. Arrow and numpy convert whole columns, but JSON is assembled value by value.
"""

import itertools
import json
from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.avro.parse import Json, ParsedSchema
from k2flow.avro.schemas import is_null, logical_type

_FIRST_DAY, _LAST_DAY = -719_162, 2_932_896  # 0001-01-01 and 9999-12-31, in days since 1970
_DAY_SECONDS = 86_400
_PER_SECOND = {"ms": 10**3, "us": 10**6, "ns": 10**9}
_HEX = np.array([f"{byte:02x}" for byte in range(256)], "S2")
_NOT_JSON = {"inf", "-inf", "nan"}


def to_texts(schema: Json, names: ParsedSchema, column: pa.Array) -> pa.StringArray:
    """Convert n values of a schema to text, null to null: (n,) strings.

    `names` defines the schema's named types. `column` has the schema's Arrow type, see schemas.py. Raises
    pyarrow.ArrowInvalid if the texts take 2 GiB or more in total.
    """
    schema = names.expand(schema)
    if isinstance(schema, list):
        members = _members(schema, names, column)
        return (
            pc.coalesce(*(to_texts(*member) for member in members)) if members else pa.nulls(len(column), pa.string())
        )
    if schema["type"] in ("array", "map", "record", "error"):
        fragments = _json(schema, names, column)
        return pa.array([f if ok else None for f, ok in zip(fragments, _valid(column), strict=True)], pa.string())
    return _plain(column)


def _members(schema: Json, names: ParsedSchema, column: pa.Array) -> list[tuple[Json, ParsedSchema, pa.Array]]:
    """Return the branches of a union other than null, each with its values, null if another branch is chosen."""
    branches = [branch for branch in schema if not is_null(branch, names)]
    columns = [column] if len(branches) == 1 else column.flatten() if branches else []
    return [(branch, names, child) for branch, child in zip(branches, columns, strict=True)]


def _plain(column: pa.Array) -> pa.StringArray:
    kind = column.type
    if pa.types.is_decimal(kind):
        return _decimals(column)
    if pa.types.is_binary(kind) or pa.types.is_fixed_size_binary(kind):
        return _hexadecimal(column)
    if pa.types.is_date(kind):
        days = column.cast(pa.int32())
        return _convert_within(days, _FIRST_DAY, _LAST_DAY, lambda inside: inside.cast(kind).cast(pa.string()))
    if pa.types.is_timestamp(kind):
        return _timestamps(column)
    return column.cast(pa.string())


def _timestamps(column: pa.TimestampArray) -> pa.StringArray:
    kind = column.type
    day = _DAY_SECONDS * _PER_SECOND[kind.unit]
    first, last = max(_FIRST_DAY * day, -(2**63)), min((_LAST_DAY + 1) * day, 2**63) - 1
    zone = "" if kind.tz is None else "Z"

    def iso(inside: pa.Array) -> pa.StringArray:
        # Cast without the zone: Arrow would need a time zone database, which the machine may lack.
        text = pc.replace_substring(inside.cast(pa.timestamp(kind.unit)).cast(pa.string()), " ", "T")
        return pc.binary_join_element_wise(text, zone, "") if zone else text

    return _convert_within(column.cast(pa.int64()), first, last, iso)


def _convert_within(
    numbers: pa.Array, first: int, last: int, convert: Callable[[pa.Array], pa.StringArray]
) -> pa.StringArray:
    """Convert the numbers from `first` to `last` by `convert`, and the others to their digits."""
    inside = pc.and_(pc.greater_equal(numbers, first), pc.less_equal(numbers, last))
    if inside.false_count == 0:
        return convert(numbers)
    zero = pa.scalar(0, numbers.type)
    return pc.if_else(inside, convert(pc.if_else(inside, numbers, zero)), numbers.cast(pa.string()))


def _decimals(column: pa.Array) -> pa.StringArray:
    """Format all digits; Arrow formats small numbers as 1E-8."""
    kind = column.type
    make = pa.decimal128 if pa.types.is_decimal128(kind) else pa.decimal256
    whole = pa.Array.from_buffers(make(kind.precision, 0), len(column), column.buffers(), offset=column.offset)
    text = whole.cast(pa.string())
    if kind.scale == 0:
        return text
    sign = pc.if_else(pc.starts_with(text, "-"), "-", "")
    digits = pc.ascii_lpad(pc.ascii_ltrim(text, "-"), kind.scale + 1, "0")
    before = pc.utf8_slice_codeunits(digits, 0, -kind.scale)
    after = pc.utf8_slice_codeunits(digits, -kind.scale)
    return pc.binary_join_element_wise(sign, before, ".", after, "")


def _hexadecimal(column: pa.Array) -> pa.StringArray:
    packed = column.cast(pa.large_binary())
    edges = np.frombuffer(packed.buffers()[1], np.int64, len(packed) + 1, 8 * packed.offset)
    data = np.frombuffer(packed.buffers()[2] or b"", np.uint8)[edges[0] : edges[-1]]
    offsets = pa.py_buffer(2 * (edges - edges[0]))
    text = pa.Array.from_buffers(pa.large_string(), len(packed), [None, offsets, pa.py_buffer(_HEX[data])])
    text = text.cast(pa.string())
    return pc.if_else(column.is_valid(), text, None) if column.null_count else text


def _json(schema: Json, names: ParsedSchema, column: pa.Array) -> list[str]:
    schema = names.expand(schema)
    if isinstance(schema, list):
        return _json_union(schema, names, column)
    match schema["type"]:
        case "record" | "error":
            found = _json_records(schema, names, column)
        case "array":
            items = _json(schema["items"], names, column.values)
            found = [f"[{','.join(items[a:b])}]" for a, b in _ranges(column)]
        case "map":
            keys = [_string(key) for key in column.keys.to_pylist()]
            values = _json(schema["values"], names, column.items)
            entries = [f"{key}:{value}" for key, value in zip(keys, values, strict=True)]
            found = [f"{{{','.join(entries[a:b])}}}" for a, b in _ranges(column)]
        case kind:
            is_bare = logical_type(schema) is None and kind in ("boolean", "int", "long", "float", "double")
            return [
                "null" if text is None else text if is_bare and text not in _NOT_JSON else _string(text)
                for text in _plain(column).to_pylist()
            ]
    return [text if ok else "null" for text, ok in zip(found, _valid(column), strict=True)]


def _json_records(schema: Json, names: ParsedSchema, column: pa.StructArray) -> list[str]:
    labels = [_string(field["name"]) for field in schema["fields"]]
    if not labels:
        return ["{}"] * len(column)
    columns = [
        [f"{label}:{value}" for value in _json(field["type"], names, child)]
        for label, field, child in zip(labels, schema["fields"], column.flatten(), strict=True)
    ]
    return [f"{{{','.join(row)}}}" for row in zip(*columns, strict=True)]


def _json_union(schema: Json, names: ParsedSchema, column: pa.Array) -> list[str]:
    found = ["null"] * len(column)
    for branch, _, child in _members(schema, names, column):
        written = _json(branch, names, child)
        for i in np.flatnonzero(_valid(child)).tolist():
            found[i] = written[i]
    return found


def _ranges(column: pa.Array) -> Iterator[tuple[int, int]]:
    """Yield the range of each array or map among all items."""
    return itertools.pairwise(column.offsets.to_pylist())


def _valid(column: pa.Array) -> npt.NDArray[np.bool_]:
    mask: npt.NDArray[np.bool_] = column.is_valid().to_numpy(zero_copy_only=False)
    return mask


def _string(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)
