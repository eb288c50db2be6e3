"""Resolves a writer's and a reader's schema into a plan that decodes the writer's bytes into the reader's types.

Avro 1.12 specification, "Schema resolution", with two differences. Names of types matter only in unions, as in Java.
`accepted.py` decides about decimals and times. Without a reader's schema, the writer's schema serves as both. A field
that only the reader's schema has takes its default value.
"""

from enum import IntEnum
from typing import Any

import numpy as np
import pyarrow as pa

from k2flow.avro import accepted
from k2flow.avro.decimals import Decimal, WideDecimal
from k2flow.avro.defaults import default_array
from k2flow.avro.parse import MAX_TYPES, Json, ParsedSchema, check_texts, count_types, label_of
from k2flow.avro.plan import Array, Binary, Boolean, Enum, Fixed, Integer, Node, Null, Record
from k2flow.avro.schemas import MAX_DECIMAL_DIGITS, arrow_type, describe, is_named, is_null, logical_type
from k2flow.avro.skip import Skip
from k2flow.avro.unions import UNRESOLVED, Branch, Union
from k2flow.errors import SchemaError

_PROMOTIONS = {
    "int": ("long", "float", "double"),
    "long": ("float", "double"),
    "float": ("double",),
    "string": ("bytes",),
    "bytes": ("string",),
}
_NUMBERS = {name: np.dtype(code) for name, code in (("int", "i4"), ("long", "i8"), ("float", "<f4"), ("double", "<f8"))}
_MAX_OVERREAD = 1 << 22


def resolve(writer: ParsedSchema, reader: ParsedSchema) -> Node:
    """Return the plan. Raises SchemaError, which names the field, if the schemas are incompatible or too large.

    A field of the writer's record that the reader lacks cannot fail: if its type has no plan, its node is a `Skip`.
    """
    plan = _Resolver(writer, reader).resolve_root()
    if plan.max_overread > _MAX_OVERREAD:
        raise SchemaError(f"a record has more than {_MAX_OVERREAD} bytes of fixed-size fields")
    return plan


class _Resolver:
    def __init__(self, writer: ParsedSchema, reader: ParsedSchema) -> None:
        self._writer = writer
        self._reader = reader
        self._types_left = MAX_TYPES
        self._overread_left = _MAX_OVERREAD

    def resolve_root(self) -> Node:
        """Return the plan of the whole schema."""
        writer, reader = self._writer.expand(self._writer.root), self._reader.expand(self._reader.root)
        _Resolver(self._reader, self._reader)._count(reader, "")
        if not _is_record(writer) or not _is_record(reader):
            self._count(writer, "")
            return self.resolve(writer, reader, "")
        self._types_left -= 1
        return self._record(writer, reader, "", is_root=True)

    def resolve(self, writer: Json, reader: Json, path: str) -> Node:
        writer, reader = self._writer.expand(writer), self._reader.expand(reader)
        if isinstance(writer, list) or isinstance(reader, list):
            return self._union(writer, reader, path)
        if not self._match(writer, reader, _Match.PROMOTED):
            raise self._incompatible(writer, [reader], path)
        kind = arrow_type(reader, self._reader)
        if node := accepted.exact_node(writer, kind, label_of(path)):
            return node
        match writer["type"]:
            case "record" | "error":
                return self._record(writer, reader, path)
            case "array":
                return Array(kind, label_of(path), self.resolve(writer["items"], reader["items"], f"{path}.item"))
            case "map":
                return self._map(writer, reader, path)
            case "enum":
                return self._enum(writer, reader, path)
        return self._plain(writer, reader, path)

    def _as_written(self, schema: Json, path: str) -> Node:
        """Read a type that the reader lacks as the writer's type, so that all bytes are checked."""
        return _Resolver(self._writer, self._writer).resolve(schema, schema, path)

    def _count(self, schema: Json, path: str) -> None:
        """Raise SchemaError if a type has no plan, or if the schema has too many types with it."""
        count = count_types(schema, self._writer, path)
        if count > self._types_left:
            raise SchemaError(f"{label_of(path)}: more than {MAX_TYPES} types, counting each use of a named type")
        self._types_left -= count

    def _unknown(self, schema: Json, path: str, name: str, repeated: bool) -> Node:
        """Return the node of a root field that the reader lacks."""
        try:
            if repeated:
                raise SchemaError(f"{label_of(path)}: another field has the same name")
            check_texts([name], path)
            self._count(schema, path)
            node = self._as_written(schema, path)
            if node.max_overread > self._overread_left:
                raise SchemaError(f"{label_of(path)}: more than {_MAX_OVERREAD} bytes of fixed-size fields")
        except SchemaError as error:
            return Skip(pa.null(), label_of(path), schema, self._writer, str(error))
        return node

    def _record(self, writer: Json, reader: Json, path: str, is_root: bool = False) -> Node:
        kind = arrow_type(reader, self._reader)
        places = _places(writer, reader)
        names = [field["name"] for field in writer["fields"]]
        first = {name: i for i, name in reversed(list(enumerate(names)))}
        fields: list[Node] = [Null(pa.null(), "")] * len(places)
        # Known fields come first: they must have a plan, and they count first against the limits.
        for i in sorted(range(len(places)), key=lambda i: places[i] is None):
            field, place = writer["fields"][i], places[i]
            own = f"{path}.{names[i]}".lstrip(".")
            if place is not None:
                if is_root:
                    self._count(field["type"], own)
                fields[i] = self._field(field, reader["fields"][place], own)
            elif is_root:
                fields[i] = self._unknown(field["type"], own, names[i], first[names[i]] < i)
            else:
                fields[i] = self._as_written(field["type"], own)
            self._overread_left -= fields[i].max_overread
        added = []
        for place, field in enumerate(reader["fields"]):
            if place not in places:
                label = label_of(f"{path}.{field['name']}".lstrip("."))
                if "default" not in field:
                    raise SchemaError(f"{label}: missing in the writer's schema, and without a default in the reader's")
                own_kind = kind.field(place).type
                added.append((place, default_array(field["type"], self._reader, own_kind, field["default"], label)))
        return Record(kind, label_of(path), fields, places, added)

    def _field(self, field: Json, wanted: Json, path: str) -> Node:
        """Return the node of a field that both have."""
        beside = accepted.beside(field)
        if beside and accepted.accepted_types(arrow_type(wanted["type"], self._reader)):
            writer = self._writer.expand(field["type"])
            for branch in map(self._writer.expand, writer if isinstance(writer, list) else [writer]):
                if branch["type"] != "null" and accepted.contradicts(beside, branch):
                    raise self._incompatible(branch, [wanted["type"]], path, beside)
        return self.resolve(field["type"], wanted["type"], path)

    def _incompatible(
        self, writer: Json, wanted: list[Json], path: str, beside: dict[str, Any] | None = None
    ) -> SchemaError:
        """Return the error that says what was found, and what is accepted."""
        reader = [self._reader.expand(option) for option in wanted]
        kinds = [accepted.accepted_types(arrow_type(option, self._reader)) for option in reader]
        names = ", ".join(describe(option) for option in reader)
        text = f"{label_of(path)}: the writer's {accepted.show(writer, beside or {})} cannot be read as {names}"
        return SchemaError(text + "".join(f"; accepted are {kind}" for kind in kinds if kind))

    def _map(self, writer: Json, reader: Json, path: str) -> Node:
        kind = arrow_type(reader, self._reader)
        value = self.resolve(writer["values"], reader["values"], f"{path}.value")
        key = Binary(pa.string(), label_of(f"{path}.key"), is_text=True)
        entry = Record(pa.struct([kind.key_field, kind.item_field]), label_of(path), (key, value), places=(0, 1))
        return Array(kind, label_of(path), entry)

    def _enum(self, writer: Json, reader: Json, path: str) -> Node:
        symbols = list(reader["symbols"])
        default = reader.get("default")
        places = {symbol: i for i, symbol in reversed(list(enumerate(symbols)))}
        fallback = places.get(default, -1) if isinstance(default, str) else -1
        codes = [places.get(symbol, fallback) for symbol in writer["symbols"]]
        own = np.array(writer["symbols"], np.object_)
        return Enum(pa.string(), label_of(path), own, np.array(codes, np.int64), pa.array(symbols, pa.string()))

    def _plain(self, writer: Json, reader: Json, path: str) -> Node:
        label, kind = label_of(path), arrow_type(reader, self._reader)
        logical, wanted = logical_type(writer), logical_type(reader)
        is_number = writer["type"] == "bytes" and reader["type"] == "string" and "logicalType" in writer
        if (logical and wanted and logical != wanted) or is_number:
            raise self._incompatible(writer, [reader], path)
        match writer["type"]:
            case "null":
                return Null(kind, label)
            case "boolean":
                return Boolean(kind, label)
            case "int" | "long":
                return Integer(kind, label, 32 if writer["type"] == "int" else 64, _NUMBERS[reader["type"]])
            case "float" | "double":
                return Fixed(kind, label, _NUMBERS[writer["type"]], _NUMBERS[reader["type"]])
            case _ if wanted and wanted[0] == "decimal":
                _, precision, scale = wanted
                if precision > MAX_DECIMAL_DIGITS:
                    return WideDecimal(kind, label, writer.get("size"), precision, scale)
                return Decimal(kind, label, writer.get("size"))
            case "fixed":
                encoded = np.dtype(f"V{writer['size']}")
                return Fixed(kind, label, encoded, encoded)
        # A string read as bytes is still checked as text, and so are bytes read as a string.
        is_text = "string" in (writer["type"], reader["type"])
        return Binary(kind, label, is_text, is_uuid=wanted is not None and wanted[0] == "uuid")

    def _union(self, writer: Json, reader: Json, path: str) -> Node:
        label, kind = label_of(path), arrow_type(reader, self._reader)
        wanted = reader if isinstance(reader, list) else [reader]
        members = [branch for branch in wanted if not is_null(branch, self._reader)]
        kinds = [arrow_type(branch, self._reader) for branch in members]
        if not isinstance(writer, list):
            branch = self._branch(writer, wanted, members, path)
            return branch.node if branch.node.type == kind else Union(kind, label, [branch], kinds, has_index=False)
        branches, failures = [], []
        for part in writer:
            try:
                branches.append(self._branch(part, wanted, members, path))
            except SchemaError as error:
                failures.append(error)
                branches.append(Branch(self._as_written(part, path), UNRESOLVED))
        if len(failures) == len(branches):
            raise next(
                (error for error, part in zip(failures, writer, strict=True) if not is_null(part, self._writer)),
                failures[0],
            )
        return Union(kind, label, branches, kinds)

    def _branch(self, writer: Json, wanted: list[Json], members: list[Json], path: str) -> Branch:
        """Resolve a type of the writer to the reader's branch that matches best, the first one if several do."""
        own = self._writer.expand(writer)
        for level in _Match:
            for option in wanted:
                if self._match(own, self._reader.expand(option), level):
                    member = members.index(option) if option in members else None
                    return Branch(self.resolve(writer, option, path), member)
        raise self._incompatible(own, wanted, path)

    def _match(self, writer: Json, reader: Json, level: "_Match") -> bool:
        """Return whether two types match at least as well as `level`, without regard to inner types."""
        kind, wanted = writer["type"], reader["type"]
        column = arrow_type(reader, self._reader) if logical_type(reader) else None
        if accepted.accepted_types(column):
            readable = accepted.exact_node(writer, column, "") is not None
        elif kind == wanted:
            readable = kind != "fixed" or writer["size"] == reader["size"]
        else:
            readable = wanted in _PROMOTIONS.get(kind, ())
        if not readable or kind != wanted:
            return readable and level == _Match.PROMOTED
        if level == _Match.PROMOTED or kind not in ("record", "error", "enum", "fixed"):
            return True
        return writer["name"] == reader["name"] or (level > _Match.SAME and is_named(writer, reader))


class _Match(IntEnum):
    SAME = 0  # the same type with the same full name
    NAMED = 1  # the same type with a matching name
    PROMOTED = 2  # a type that the other can be read as, whatever their names


def _is_record(schema: Json) -> bool:
    return isinstance(schema, dict) and schema["type"] in ("record", "error")


def _places(writer: Json, reader: Json) -> list[int | None]:
    """Return the place in the reader's record of each field of the writer's; None for a field that it lacks."""
    names = [field["name"] for field in reader["fields"]]
    sources = {field["name"] for field in writer["fields"]}
    aliases = {
        alias: i
        for i, field in enumerate(reader["fields"])
        if field["name"] not in sources
        for alias in reversed(field.get("aliases", []))
    }
    places: list[int | None] = []
    for field in writer["fields"]:
        name = field["name"]
        if name in names and names.index(name) in places:
            raise SchemaError(f"{label_of(name)}: the writer's record has two fields with this name")
        place = names.index(name) if name in names else aliases.get(name)
        places.append(None if place in places else place)  # a second alias of a field that already has a source
    return places
