"""Avro schemas that refer to types of other schemas, as one schema. Pure functions of parsed JSON."""

from collections.abc import Sequence
from typing import Any

Json = Any
_NAMED = frozenset({"record", "error", "enum", "fixed"})
_INNER = ("type", "items", "values")  # where a schema that is no named type has others


def inline(schema: Json, referenced: Sequence[Json]) -> Json:
    """Return `schema` with each type that it takes from `referenced` defined where it is first used.

    Types are found by their full names, as Confluent's registry does: the name of a reference means nothing. A type
    that no schema defines stays a name. A type that contains itself does too: the parser refuses it.
    """
    return _Inliner(referenced).place(schema, "")


class _Inliner:
    def __init__(self, referenced: Sequence[Json]) -> None:
        self._definitions: dict[str, tuple[Json, str]] = {}  # by full name, with the namespace around it
        self._placed: set[str] = set()
        for schema in referenced:
            self._collect(schema, "")

    def place(self, schema: Json, namespace: str) -> Json:
        if isinstance(schema, str):
            name = _full_name(schema, namespace)
            if name in self._placed:
                return name
            return self.place(*self._definitions[name]) if name in self._definitions else schema
        if isinstance(schema, list):
            return [self.place(branch, namespace) for branch in schema]
        if not isinstance(schema, dict):
            return schema
        if not _is_named(schema):
            return {**schema, **{key: self.place(schema[key], namespace) for key in _INNER if key in schema}}
        name, inner = _names(schema, namespace)
        if name in self._placed and name in self._definitions:
            return name
        self._placed.add(name)
        fields = [{**each, "type": self.place(each.get("type"), inner)} for each in schema.get("fields", ())]
        return {**schema, "namespace": inner, **({"fields": fields} if "fields" in schema else {})}

    def _collect(self, schema: Json, namespace: str) -> None:
        if isinstance(schema, list):
            for branch in schema:
                self._collect(branch, namespace)
        elif isinstance(schema, dict) and _is_named(schema):
            name, inner = _names(schema, namespace)
            self._definitions.setdefault(name, (schema, namespace))
            for field in schema.get("fields", ()):
                self._collect(field.get("type"), inner)
        elif isinstance(schema, dict):
            for key in _INNER:
                self._collect(schema.get(key), namespace)


def _is_named(schema: Json) -> bool:
    return isinstance(schema.get("type"), str) and schema["type"] in _NAMED


def _full_name(name: str, namespace: str) -> str:
    return f"{namespace}.{name}" if namespace and "." not in name else name


def _names(schema: Json, namespace: str) -> tuple[str, str]:
    """Return the full name of a named type, and the namespace of the types in it."""
    name = _full_name(schema["name"], schema.get("namespace", namespace))
    return name, name.rpartition(".")[0]
