"""Evolves the columns of an existing table into those of its definition, by Iceberg's schema evolution.

    the table's column is ...       and becomes
    missing                         added, optional: null in the existing rows
    narrower                        wider: int to long, float to double, a decimal with more digits of the same scale
    required                        optional
    under its former name           renamed
    not in the definition           kept, optional: null in new rows
    at another position             moved to the definition's position; columns not in the definition come last

Evolution changes only metadata, in one commit. Iceberg finds the columns of a file by their ids, which stay, so files
written before are read as they are (Iceberg spec, "Schema Evolution"). Flows that run meanwhile continue with the
columns that they know. Every other difference is a conflict.

PyIceberg's `union_by_name` adds columns, widens types and makes columns optional. It knows no former names, keeps the
positions, and silently ignores a table that is wider than its definition. Those parts are ours.
"""

from collections.abc import Mapping

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


class Evolution:
    """The difference between the columns `found` in a table and those `wanted`.

    `conflicts` are those that Iceberg cannot resolve, a line each: with any, do not call `apply`. `changes` are what
    `apply` does, a line each. `renamed` is the new name of each renamed column, by its former name.
    """

    def __init__(self, found: Schema, wanted: Schema, former_names: Mapping[str, str]) -> None:
        """Compare two schemas; `former_names` has the former names of some wanted columns, by today's name."""
        self.conflicts: list[str] = []
        existing = {field.name: field for field in found.fields}
        names = [field.name for field in wanted.fields]
        self.renamed = {
            former: name
            for name, former in former_names.items()
            if name in names and name not in existing and former in existing and former not in names
        }
        self._former = {name: former for former, name in self.renamed.items()}
        self._wanted = wanted
        self.changes = [f"column {name} was {former}" for former, name in self.renamed.items()]
        for field in wanted.fields:
            own = existing.get(self._name_in_table(field.name))
            if own is None:
                self.changes.append(f"column {field.name} {type_name(field.field_type)} is new")
            else:
                self._compare(field.name, own, field)
        extra = [field for field in found.fields if self.renamed.get(field.name, field.name) not in names]
        self._required = [field.name for field in extra if field.required]
        self.changes += [f"column {name} is optional" for name in self._required]
        order = [self.renamed.get(field.name, field.name) for field in found.fields]
        self._moves = _moves(order, [*names, *(field.name for field in extra)])
        if any(name in order for name, _ in self._moves):
            self.changes.append("columns are in the order of the definition")

    def apply(self, update: UpdateSchema) -> None:
        """Add all changes to `update`."""
        wanted = [field.model_copy(update={"name": self._name_in_table(field.name)}) for field in self._wanted.fields]
        update.union_by_name(Schema(*wanted))
        for name in self._required:
            update.make_column_optional(name)
        for former, name in self.renamed.items():
            update.rename_column(former, name)
        for name, after in self._moves:
            if after is None:
                update.move_first(self._name_in_table(name))
            else:
                update.move_after(self._name_in_table(name), self._name_in_table(after))

    def __str__(self) -> str:
        return "; ".join(self.changes)

    def _name_in_table(self, name: str) -> str:
        return self._former.get(name, name)

    def _compare(self, label: str, own: NestedField, field: NestedField) -> None:
        if own.required and not field.required:
            self.changes.append(f"column {label} is optional")
        found, wanted = own.field_type, field.field_type
        if isinstance(found, ListType) and isinstance(wanted, ListType):
            self._compare(f"{label}.element", found.element_field, wanted.element_field)
        elif isinstance(found, MapType) and isinstance(wanted, MapType) and found.key_type == wanted.key_type:
            self._compare(f"{label}.value", found.value_field, wanted.value_field)
        elif _can_become(found, wanted):
            self.changes.append(f"column {label} is {type_name(wanted)}, was {type_name(found)}")
        elif type_name(found) != type_name(wanted):
            why = "Iceberg cannot turn one into the other"
            if _can_become(wanted, found):
                why = "a newer k2flow has widened it, and no k2flow can narrow it: run the newer one"
            self.conflicts.append(f"column {label} is {type_name(found)}, not {type_name(wanted)} ({why})")


def _moves(found: list[str], wanted: list[str]) -> list[tuple[str, str | None]]:
    """Return each column to move and the one before it (None: to the front), in order.

    The columns are in the order `found`, with new ones after them, and are to be in the order `wanted`.
    """
    order = [*found, *(name for name in wanted if name not in found)]
    moves: list[tuple[str, str | None]] = []
    for i, name in enumerate(wanted):
        if order[i] != name:
            order.remove(name)
            order.insert(i, name)
            moves.append((name, order[i - 1] if i else None))
    return moves


def _can_become(one: IcebergType, other: IcebergType) -> bool:
    """Return whether Iceberg promotes a type to a wider one (spec, "Schema Evolution")."""
    if isinstance(one, DecimalType) and isinstance(other, DecimalType):
        return one.scale == other.scale and one.precision < other.precision
    return (type(one), type(other)) in ((IntegerType, LongType), (FloatType, DoubleType))


def type_name(kind: IcebergType) -> str:
    """Return the name of a type in messages."""
    if isinstance(kind, ListType):
        return f"list<{type_name(kind.element_type)}>"
    if isinstance(kind, MapType):
        return f"map<{type_name(kind.key_type)}, {type_name(kind.value_type)}>"
    if isinstance(kind, StructType):
        return f"struct<{', '.join(f'{field.name} {type_name(field.field_type)}' for field in kind.fields)}>"
    return str(kind)
