"""Parses Avro schemas, and checks which types have a plan.

A reader needs less than a validator. So a default value that does not fit, an odd name or a damaged logical type is no
error here: none of them changes how a value is encoded. `count_types` finds the types that cannot become a column.
"""

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from k2flow.errors import SchemaError

Json = Any  # a parsed JSON schema: a name, a dict with the key `type`, or a list of branches

PRIMITIVES = {
    "null": pa.null(),
    "boolean": pa.bool_(),
    "int": pa.int32(),
    "long": pa.int64(),
    "float": pa.float32(),
    "double": pa.float64(),
    "bytes": pa.binary(),
    "string": pa.string(),
}
_NAMED = ("record", "error", "enum", "fixed")
_PARSE_ERRORS = (ValueError, TypeError, KeyError, AttributeError, RecursionError)
MAX_DEPTH = 64  # the limit of nested types
MAX_TYPES = 10_000
"""The limit of types in a schema. A named type counts each time it is used, because uses can double at each level."""
MAX_FIXED_BYTES = 1 << 20
MAX_PRECISION = 1_000
"""The limit of digits in a decimal."""


@dataclass(frozen=True, slots=True)
class ParsedSchema:
    """A schema and the named types it defines, by full name."""

    root: Json
    names: dict[str, Json]

    def expand(self, schema: Json) -> Json:
        """Return the definition of a name, a primitive type as a dict, and any other schema unchanged."""
        if isinstance(schema, str):
            return {"type": schema} if schema in PRIMITIVES else self.names[schema]
        return schema


def parse(schema: Json) -> ParsedSchema:
    """Parse a schema: JSON text, the name of a primitive type, or parsed JSON.

    Raises SchemaError if its values cannot be separated: no JSON, a type without a definition, or with two.
    """
    try:
        if isinstance(schema, str) and schema not in PRIMITIVES:
            schema = json.loads(schema)
        parser = _Parser()
        return ParsedSchema(parser.parse(schema), parser.names)
    except _PARSE_ERRORS as error:
        raise SchemaError(f"not an Avro schema: {type(error).__name__}: {error}") from error


class _Parser:
    """Copies a schema with full names. It keeps a list of work, since Python limits recursion."""

    def __init__(self) -> None:
        self.names: dict[str, Json] = {}
        self._sources: dict[str, Json] = {}  # the JSON of each named type
        self._references: list[tuple[str, str]] = []  # each name in its namespace, and as written
        self._todo: list[tuple[Json, str, Any, Any]] = []  # schema, namespace, and the container and key of its copy

    def parse(self, schema: Json) -> Json:
        found: dict[str, Json] = {}
        self._todo.append((schema, "", found, "root"))
        while self._todo:
            part, space, container, key = self._todo.pop()
            container[key] = self._copy(part, space)
        for full, written in self._references:
            if full not in self.names:
                if written not in self.names:
                    raise ValueError(f"type {full} is not defined")
                self.names[full] = self.names[written]  # Java looks in the null namespace, too
        return found["root"]

    def _copy(self, schema: Json, space: str) -> Json:
        if isinstance(schema, list):
            branches: list[Json] = [None] * len(schema)
            self._todo += [(branch, space, branches, i) for i, branch in enumerate(schema)]
            return branches
        kind = schema if isinstance(schema, str) else schema["type"]
        if not isinstance(kind, str):
            raise ValueError(f"type {kind!r} is not a name")
        if kind in ("array", "map"):
            inner = "items" if kind == "array" else "values"
            found = dict(schema)
            self._todo.append((schema[inner], space, found, inner))
            return found
        if kind in _NAMED:
            return self._define(schema, space)
        if kind in PRIMITIVES:
            return schema if isinstance(schema, str) else dict(schema)
        full = f"{space}.{kind}" if space and "." not in kind else kind
        self._references.append((full, kind))
        return full

    def _define(self, schema: Json, space: str) -> Json:
        name, space = schema["name"], schema.get("namespace", space)
        full = f"{space}.{name}" if space and "." not in name else name
        if self._sources.setdefault(full, schema) != schema:
            raise ValueError(f"type {full} is defined twice")
        found = {**schema, "name": full}
        if schema["type"] in ("record", "error"):
            found["fields"] = [dict(field) for field in schema.get("fields", ())]
            space = full.rpartition(".")[0]
            self._todo += [(field["type"], space, field, "type") for field in found["fields"]]
            for field in found["fields"]:
                field["name"].encode("utf-8", "surrogatepass")  # a name is text
        elif schema["type"] == "enum":
            "".join(schema["symbols"])  # a list of texts
        elif type(schema["size"]) is not int or schema["size"] < 0:
            raise ValueError(f"fixed {full} has {schema['size']!r} bytes")
        self.names[full] = found
        return found


def count_types(schema: Json, parsed: ParsedSchema, path: str) -> int:
    """Count the types of a schema, each use of a named type included.

    Raises SchemaError, which names the field at the dotted `path`, if a type can be no column: it is recursive, nested
    too deep, too large or not valid.
    """
    return _count(schema, parsed, path, (), {})


def _count(schema: Json, parsed: ParsedSchema, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    """`outer` holds the full names of the enclosing records, "" for other types; `known` the counts of named types."""
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
        case "fixed" if schema["size"] > MAX_FIXED_BYTES:
            raise SchemaError(f"{label_of(path)}: a fixed of {schema['size']} bytes; use 0 to {MAX_FIXED_BYTES}")
        case "enum":
            if not schema["symbols"]:
                raise SchemaError(f"{label_of(path)}: an enum without symbols")
            check_texts(schema["symbols"], path)
    return 1


def _count_record(schema: Json, parsed: ParsedSchema, path: str, outer: tuple[str, ...], known: dict[str, int]) -> int:
    name = schema["name"]
    if name in outer:
        raise SchemaError(f"{label_of(path)}: type {name} contains itself; recursive types have no Arrow type")
    if name not in known:
        fields = schema["fields"]
        names = [field["name"] for field in fields]
        check_texts(names, path)
        if len(set(names)) < len(fields):
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


def check_texts(texts: list[str], path: str) -> None:
    """Refuse lone surrogates: such a text can be neither shown nor stored."""
    try:
        "".join(texts).encode()
    except UnicodeEncodeError as error:
        raise SchemaError(f"{label_of(path)}: a name that is not valid Unicode") from error


def label_of(path: str) -> str:
    """Return the label of the field at a dotted path in messages; an empty path is the schema itself."""
    shown = path.lstrip(".").encode("utf-8", "backslashreplace").decode()
    return f"field `{shown}`" if path else "value"
