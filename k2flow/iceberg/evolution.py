"""The columns of a table that is there into those of its definition, by Iceberg's schema evolution.

    lacks a column                  added, optional: null in the rows that are there
    narrower                        int to long, float to double, a decimal to more digits of the same scale
    required                        optional
    has a column's former name      renamed
    has a column beyond             kept, as optional: null in the rows that come
    another order                   the definition's, columns beyond it last

That is a change of metadata alone, in one commit: Iceberg finds the columns of a file by their ids, which stay, so
files written before are read as they are (Iceberg spec, "Schema Evolution"). Flows that run meanwhile go on with the
columns that they know. Every other difference is a conflict.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from pyiceberg.schema import Schema
from pyiceberg.table.update.schema import UpdateSchema
from pyiceberg.types import (
    DecimalType,
    DoubleType,
    FloatType,
    IcebergType,
    IntegerType,
    ListType,
    LongType,
    MapType,
    NestedField,
    StructType,
)


@dataclass(frozen=True)
class Change:
    """One change, in words (none where they would say nothing more), and how PyIceberg is told of it."""

    text: str
    apply: Callable[[UpdateSchema], object]


class Evolution:
    """What makes the columns `found` those that are `wanted`; `former_names` has for some of these what they were.

    `changes` are to be made all in one commit, unless there are `conflicts`, a line each. `renamed` has the new name
    of each column that gets one.
    """

    def __init__(self, found: Schema, wanted: Schema, former_names: Mapping[str, str]) -> None:
        self.changes: list[Change] = []
        self.conflicts: list[str] = []
        there = {field.name: field for field in found.fields}
        names = [field.name for field in wanted.fields]
        self.renamed = {
            former: name
            for name, former in former_names.items()
            if name in names and name not in there and former in there and former not in names
        }
        self._former = {name: former for former, name in self.renamed.items()}
        for former, name in self.renamed.items():
            self._change(f"column {name} was {former}", _renaming(former, name))
        for field in wanted.fields:
            own = there.get(self._old(field.name))
            if own is None:
                self._change(f"column {field.name} {kind_name(field.field_type)} is new", _adding(field))
            else:
                self._compare((own.name,), field.name, own, field)
        beyond = [field for field in found.fields if self.renamed.get(field.name, field.name) not in names]
        for field in beyond:
            if field.required:
                self._make_optional((field.name,), field.name)
        order = [self.renamed.get(field.name, field.name) for field in found.fields]
        self._order(order, [*names, *(field.name for field in beyond)])

    def apply(self, update: UpdateSchema) -> None:
        for change in self.changes:
            change.apply(update)

    def __str__(self) -> str:
        return "; ".join(change.text for change in self.changes if change.text)

    def _old(self, name: str) -> str:
        """What the table calls a column now."""
        return self._former.get(name, name)

    def _change(self, text: str, apply: Callable[[UpdateSchema], object]) -> None:
        self.changes.append(Change(text, apply))

    def _make_optional(self, path: tuple[str, ...], label: str) -> None:
        self._change(f"column {label} is optional", lambda u: u.make_column_optional(path))

    def _compare(self, path: tuple[str, ...], label: str, own: NestedField, field: NestedField) -> None:
        """A column, or what is inside one, that both have; `path` is where the table has it."""
        if own.required and not field.required:
            self._make_optional(path, label)
        is_, wanted = own.field_type, field.field_type
        if isinstance(is_, ListType) and isinstance(wanted, ListType):
            self._compare((*path, "element"), f"{label}.element", is_.element_field, wanted.element_field)
        elif isinstance(is_, MapType) and isinstance(wanted, MapType) and is_.key_type == wanted.key_type:
            self._compare((*path, "value"), f"{label}.value", is_.value_field, wanted.value_field)
        elif _can_become(is_, wanted):
            text = f"column {label} is {kind_name(wanted)}, was {kind_name(is_)}"
            self._change(text, lambda u: u.update_column(path, field_type=wanted))
        elif kind_name(is_) != kind_name(wanted):
            why = "Iceberg cannot turn one into the other"
            if _can_become(wanted, is_):
                why = "a newer k2flow has made it wider, and none can make it narrower: run the newer one"
            self.conflicts.append(f"column {label} is {kind_name(is_)}, not {kind_name(wanted)} ({why})")

    def _order(self, found: list[str], wanted: list[str]) -> None:
        """Puts the columns, which are `found` in this order with new ones after them, into the order `wanted`."""
        order = [*found, *(name for name in wanted if name not in found)]
        moves: list[tuple[str, str | None]] = []
        for i, name in enumerate(wanted):
            if order[i] != name:
                order.remove(name)
                order.insert(i, name)
                moves.append((self._old(name), self._old(order[i - 1]) if i else None))
        if moves:
            new = all(self.renamed.get(name, name) not in found for name, _ in moves)
            text = "" if new else "columns are in the order of the definition"
            self._change(text, lambda update: _move(update, moves))


def _adding(field: NestedField) -> Callable[[UpdateSchema], object]:
    return lambda update: update.add_column(field.name, field.field_type)


def _renaming(former: str, name: str) -> Callable[[UpdateSchema], object]:
    return lambda update: update.rename_column(former, name)


def _move(update: UpdateSchema, moves: list[tuple[str, str | None]]) -> None:
    """Each column after the other one, or to the front."""
    for name, other in moves:
        if other is None:
            update.move_first(name)
        else:
            update.move_after(name, other)


def _can_become(one: IcebergType, other: IcebergType) -> bool:
    """Whether every value of a type is one of a wider type, to which Iceberg promotes (spec, "Schema Evolution")."""
    if isinstance(one, DecimalType) and isinstance(other, DecimalType):
        return one.scale == other.scale and one.precision < other.precision
    return (type(one), type(other)) in ((IntegerType, LongType), (FloatType, DoubleType))


def kind_name(kind: IcebergType) -> str:
    """What messages call a type."""
    if isinstance(kind, ListType):
        return f"list<{kind_name(kind.element_type)}>"
    if isinstance(kind, MapType):
        return f"map<{kind_name(kind.key_type)}, {kind_name(kind.value_type)}>"
    if isinstance(kind, StructType):
        return f"struct<{', '.join(f'{field.name} {kind_name(field.field_type)}' for field in kind.fields)}>"
    return str(kind)
