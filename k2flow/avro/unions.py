"""Unions: the index of a branch, and its value. Avro 1.12 specification, "Unions" and "Schema resolution".

Every lane reads every branch that any lane has, those without it in the zeros; that is cheaper than to take them apart.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from k2flow.avro.columns import Built, Column, Struct
from k2flow.avro.cursor import Ints, Lanes, Mask
from k2flow.avro.plan import Node
from k2flow.records import Defect

UNRESOLVED = -1


@dataclass(frozen=True)
class Branch:
    """A branch of the writer's union: how to read it, and the member of the result it becomes.

    `member` is None for null, and UNRESOLVED where the reader's schema cannot take the branch.
    """

    node: Node
    member: int | None


@dataclass(frozen=True)
class Union(Node):
    """The index of a branch, and its value.

    Members are what the result can be besides null. One is a column of its own type, with nulls; several are a struct
    with one field for each (`member0`, `member1`, ...), at most one of which is not null.
    """

    branches: Sequence[Branch]
    members: Sequence[pa.DataType]

    @property
    def width(self) -> int:
        return 1 + min(branch.node.width for branch in self.branches)

    @property
    def reach(self) -> int:
        return 1 + max(branch.node.reach for branch in self.branches)

    @property
    def flat(self) -> bool:
        return all(branch.node.flat for branch in self.branches) and all(len(parts) <= 1 for parts in self._sources)

    def read(self, lanes: Lanes) -> Column:
        index = self._read_index(lanes)
        if not self.members:
            return Built(pa.nulls(len(lanes)))
        columns = []
        for kind, sources in zip(self.members, self._sources, strict=True):
            parts = [(index == number, self.branches[number].node) for number in sources]
            columns.append(_read_member(lanes, kind, parts))
        if len(columns) == 1:
            return columns[0]
        return Struct(self.type, len(lanes), columns, []).masked(self._present[index])

    @cached_property
    def _sources(self) -> list[list[int]]:
        """The branches that become each member."""
        return [
            [number for number, branch in enumerate(self.branches) if branch.member == member]
            for member in range(len(self.members))
        ]

    @cached_property
    def _present(self) -> Mask:
        """Which branches are not null."""
        return np.array([branch.member is not None for branch in self.branches])

    def _read_index(self, lanes: Lanes) -> Ints:
        at, k = lanes.pos, len(self.branches)
        index = lanes.varint(self.label, "a union branch")
        if index.max(initial=0) >= k or index.min(initial=0) < 0:
            bad = (index < 0) | (index >= k)
            text = f"union branch {{0}} of {k} at byte {{at}}"
            lanes.fault(bad, Defect.MALFORMED, at, self.label, text, index)
            index[bad] = 0
        for number, branch in enumerate(self.branches):
            if branch.member == UNRESOLVED:
                text = f"union branch {number} at byte {{at}} is none that the reader's schema can take"
                lanes.fault(index == number, Defect.MALFORMED, at, self.label, text)
        return index


@dataclass(frozen=True)
class Only(Node):
    """A type that the reader's schema has as one branch of a union."""

    branch: Branch
    members: Sequence[pa.DataType]

    @property
    def width(self) -> int:
        return self.branch.node.width

    @property
    def reach(self) -> int:
        return self.branch.node.reach

    @property
    def flat(self) -> bool:
        return self.branch.node.flat

    def read(self, lanes: Lanes) -> Column:
        column, n = self.branch.node.read(lanes), len(lanes)
        if self.branch.member is None:
            return Built(pa.nulls(n, self.type))
        columns: list[Column] = [Built(pa.nulls(n, kind)) for kind in self.members]
        columns[self.branch.member] = column
        return Struct(self.type, n, columns, [])


def _read_member(lanes: Lanes, kind: pa.DataType, parts: list[tuple[Mask, Node]]) -> Column:
    """The values of one member of a union, from the branches that become it: which lanes have each, and its node."""
    n = len(lanes)
    if len(parts) == 1 and parts[0][0].all():
        return parts[0][1].read(lanes)
    parts = [(on, node) for on, node in parts if on.any()]
    if not parts:
        return Built(pa.nulls(n, kind))
    columns = [_read_some(lanes, on, node) for on, node in parts]
    if len(parts) == 1:
        return columns[0].masked(parts[0][0])
    chosen, some = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    for i, (on, _) in enumerate(parts):
        chosen[on] = np.flatnonzero(on) + i * n
        some |= on
    return Built.join([Built(column.build()) for column in columns]).take(chosen).masked(some)


def _read_some(lanes: Lanes, on: Mask, node: Node) -> Column:
    """A value for the lanes of `on`, zeros for the others, which stay where they are."""
    part = lanes.idle(on)
    column = node.read(part)
    lanes.resume(on, part)
    return column
