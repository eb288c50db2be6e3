"""Unions: the index of a branch, and its value. Avro 1.12 specification, "Unions" and "Schema resolution".

Every lane reads every branch that any lane has; lanes with another branch are inactive meanwhile. That is cheaper than
splitting the lanes.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from typing_extensions import override

from k2flow.avro.columns import ArrowColumn, Column, StructColumn
from k2flow.avro.cursor import Ints, Lanes, Mask
from k2flow.avro.plan import Node
from k2flow.records import Defect

UNRESOLVED = -1


@dataclass(frozen=True)
class Branch:
    """A branch of the writer's union: its node, and the member of the result that it becomes.

    `member` is None for null, and UNRESOLVED if the branch matches no type of the reader's schema.
    """

    node: Node
    member: int | None


@dataclass(frozen=True)
class Union(Node):
    """The index of a branch, and its value; no index if only the reader's schema has a union.

    Members are the types of the result other than null. One member gives a column of its type, with nulls. Several give
    a struct with one field per member (`member0`, `member1`, ...), at most one of them not null.
    """

    branches: Sequence[Branch]
    members: Sequence[pa.DataType]
    has_index: bool = True

    @property
    @override
    def own_size(self) -> int:
        return int(self.has_index)

    @property
    @override
    def min_size(self) -> int:
        return self.own_size + min(branch.node.min_size for branch in self.branches)

    @property
    @override
    def max_overread(self) -> int:
        return self.own_size + max(branch.node.max_overread for branch in self.branches)

    @property
    @override
    def can_speculate(self) -> bool:
        is_merged = any(len(sources) > 1 for sources in self._sources)
        return not is_merged and all(branch.node.can_speculate for branch in self.branches)

    @override
    def read(self, lanes: Lanes) -> Column:
        index = self._read_index(lanes) if self.has_index else np.zeros(len(lanes), np.int64)
        if not self.members:
            return ArrowColumn(pa.nulls(len(lanes)))
        columns = []
        for kind, sources in zip(self.members, self._sources, strict=True):
            parts = [(index == number, self.branches[number].node) for number in sources]
            columns.append(_read_member(lanes, kind, parts))
        if len(columns) == 1:
            return columns[0]
        return StructColumn(self.type, len(lanes), columns).with_validity(self._present[index])

    @cached_property
    def _sources(self) -> list[list[int]]:
        return [
            [number for number, branch in enumerate(self.branches) if branch.member == member]
            for member in range(len(self.members))
        ]

    @cached_property
    def _present(self) -> Mask:
        return np.array([branch.member is not None for branch in self.branches])

    def _read_index(self, lanes: Lanes) -> Ints:
        at, k = lanes.pos, len(self.branches)
        index = lanes.read_varint(self.label, "a union branch")
        if index.max(initial=0) >= k or index.min(initial=0) < 0:
            bad = (index < 0) | (index >= k)
            text = f"union branch {{0}} of {k} at byte {{at}}"
            lanes.reject(bad, Defect.MALFORMED, at, self.label, text, index)
            index[bad] = 0
        for number, branch in enumerate(self.branches):
            if branch.member == UNRESOLVED:
                text = f"union branch {number} at byte {{at}} matches no type of the reader's schema"
                lanes.reject(index == number, Defect.MALFORMED, at, self.label, text)
        return index


def _read_member(lanes: Lanes, kind: pa.DataType, parts: list[tuple[Mask, Node]]) -> Column:
    """Read one member of a union from its branches; `parts` holds the mask of lanes and the node of each branch."""
    n = len(lanes)
    if len(parts) == 1 and parts[0][0].all():
        return parts[0][1].read(lanes)
    parts = [(on, node) for on, node in parts if on.any()]
    if not parts:
        return ArrowColumn(pa.nulls(n, kind))
    columns = [_read_masked(lanes, on, node) for on, node in parts]
    if len(parts) == 1:
        return columns[0].with_validity(parts[0][0])
    source, present = np.zeros(n, np.int64), np.zeros(n, np.bool_)
    for i, (on, _) in enumerate(parts):
        source[on] = np.flatnonzero(on) + i * n
        present |= on
    return (
        ArrowColumn.concat([ArrowColumn(column.to_arrow()) for column in columns]).take(source).with_validity(present)
    )


def _read_masked(lanes: Lanes, on: Mask, node: Node) -> Column:
    """Read values for the lanes of `on` and zeros for the others, which do not advance."""
    part = lanes.masked(on)
    column = node.read(part)
    lanes.put_masked(on, part)
    return column
