"""Writer and reader schemas, parsed and checked.

fastavro parses; what it lets pass and no plan can be made of is refused here.
"""

import json
from dataclasses import dataclass
from typing import Any

import fastavro
from fastavro.schema import SchemaParseException, UnknownType

from k2flow.errors import SchemaError

Json = Any
"""A schema as JSON text holds it: a name, a dict with the key `type`, or a list of branches."""

_PRIMITIVES = frozenset(("null", "boolean", "int", "long", "float", "double", "bytes", "string"))
_LOGICAL = {
    "date": "int",
    "time-millis": "int",
    "time-micros": "long",
    "timestamp-millis": "long",
    "timestamp-micros": "long",
    "timestamp-nanos": "long",
    "local-timestamp-millis": "long",
    "local-timestamp-micros": "long",
    "local-timestamp-nanos": "long",
    "uuid": "string",
}
_PARSE_ERRORS = (
    SchemaParseException,
    UnknownType,
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RecursionError,
)
_MAX_DIGITS = 76
MAX_DEPTH = 64
"""How deep types may be nested."""
MAX_TYPES = 10_000
"""How many types a schema may hold, counting a named one each time it is used: they can double at each level."""
MAX_FIXED_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Parsed:
    """A schema and the named types it defines, by full name."""

    root: Json
    names: dict[str, Json]

    def expand(self, schema: Json) -> Json:
        """The definition in place of a name; primitive types as dicts; unions as they are."""
        if isinstance(schema, str):
            return {"type": schema} if schema in _PRIMITIVES else self.names[schema]
        return schema


def parse(schema: Json) -> Parsed:
    """Parses a schema: JSON text, the name of a primitive type, or what JSON text holds.

    Raises SchemaError if it is no Avro schema.
    """
    names: dict[str, Json] = {}
    try:
        if isinstance(schema, str) and schema not in _PRIMITIVES:
            schema = json.loads(schema)
        root = fastavro.parse_schema(schema, names)
        json.dumps(root, ensure_ascii=False).encode()  # a name that is no UTF-8 could be neither shown nor stored
    except _PARSE_ERRORS as error:
        raise SchemaError(f"no Avro schema: {type(error).__name__}: {error}") from error
    parsed = Parsed(root, names)
    if _count(root, parsed, "", (), {}) > MAX_TYPES:
        raise SchemaError(f"more than {MAX_TYPES} types, counting a named one each time it is used")
    return parsed


def _count(schema: Json, parsed: Parsed, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    """How many types a schema holds. Raises SchemaError for one that is recursive, nested too deep or not valid.

    `outer` are the full names of the records around it, "" for other types; `known` the counts of named types.
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
                raise SchemaError(f"{label_of(path)}: a fixed of {size} bytes; 0 to {MAX_FIXED_BYTES} can be read")
        case "enum":
            if not schema["symbols"]:
                raise SchemaError(f"{label_of(path)}: an enum without symbols")
    return 1


def _count_record(schema: Json, parsed: Parsed, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    name = schema["name"]
    if name in outer:
        raise SchemaError(f"{label_of(path)}: type {name} holds itself; recursive types have no Arrow type")
    if name not in known:
        fields = schema["fields"]
        if len({field["name"] for field in fields}) < len(fields):
            raise SchemaError(f"{label_of(path)}: record {name} has two fields of one name")
        known[name] = 1 + sum(
            _count(field["type"], parsed, f"{path}.{field['name']}", (*outer, name), known) for field in fields
        )
    return known[name]


def _check_union(branches: list[Json], parsed: Parsed, path: str) -> None:
    kinds = []
    for branch in map(parsed.expand, branches):
        if isinstance(branch, list):
            raise SchemaError(f"{label_of(path)}: a union in a union")
        kinds.append(branch.get("name", branch["type"]))
    if not kinds or len(set(kinds)) < len(kinds):
        raise SchemaError(f"{label_of(path)}: a union needs branches, each of a different type")


def label_of(path: str) -> str:
    """What messages call the field at a dotted path; an empty one is the schema itself."""
    return f"field `{path.lstrip('.')}`" if path else "value"


def logical_type(schema: Json) -> tuple[str, int, int] | None:
    """Name, precision and scale (both 0 unless decimal) of a logical type that holds; None for one to be ignored.

    Avro 1.12 specification, "Logical types": one that is unknown or not valid for its type is ignored.
    """
    name, kind = schema.get("logicalType"), schema["type"]
    if name == "decimal" and kind in ("bytes", "fixed"):
        precision, scale = schema.get("precision"), schema.get("scale", 0)
        if isinstance(precision, int) and isinstance(scale, int) and 0 <= scale <= precision and precision > 0:
            if precision > _MAX_DIGITS:
                raise SchemaError(f"a decimal of {precision} digits: Arrow has at most {_MAX_DIGITS}")
            return name, precision, scale
        return None
    if isinstance(name, str) and _LOGICAL.get(name) == kind:
        return name, 0, 0
    return None


def describe(schema: Json) -> str:
    """What messages call a type."""
    if isinstance(schema, list):
        return "union"
    logical = logical_type(schema)
    name = str(schema.get("name", schema["type"]))
    if logical is None:
        return name
    return f"{name} ({logical[0]}({logical[1]}, {logical[2]}))" if logical[1] else f"{name} ({logical[0]})"


def is_named(writer: Json, reader: Json) -> bool:
    """Whether the reader's named type has the writer's unqualified name, or has the writer's name for an alias."""
    full = str(writer["name"])
    short = full.rpartition(".")[2]
    aliases = reader.get("aliases", [])
    return short == str(reader["name"]).rpartition(".")[2] or full in aliases or short in aliases
