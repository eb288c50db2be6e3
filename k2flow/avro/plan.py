"""The decoding plan: a tree of nodes, one per type of the schema, compiled once; each node reads all lanes at once.

The encodings are those of the Avro 1.12 specification, "Binary encoding" and "Logical types".
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from k2flow.avro.blocks import read_items
from k2flow.avro.columns import ArrowColumn, Column, EnumColumn, FixedWidth, ListColumn, StructColumn, VarBinary
from k2flow.avro.cursor import Ints, Lanes
from k2flow.records import Defect


@dataclass(frozen=True)
class Node(ABC):
    """Reads one type into a column of the Arrow type `type`; `label` is the field in details of defects."""

    type: pa.DataType
    label: str

    @property
    def own_size(self) -> int:
        """The smallest size in bytes of a value without the values of `inner`."""
        return 1

    @property
    def inner(self) -> "Sequence[Node]":
        """The nodes of the values inside a value."""
        return ()

    @property
    def min_size(self) -> int:
        """The smallest size of a value in bytes."""
        return self.own_size + sum(node.min_size for node in self.inner)

    @property
    def max_overread(self) -> int:
        """The largest number of padding bytes that a lane reads after it becomes inactive within a value."""
        return self.own_size + sum(node.max_overread for node in self.inner)

    @property
    def can_speculate(self) -> bool:
        """Whether bytes that may not be a value are read cheaply and without defects: no arrays, no merged branches."""
        return all(node.can_speculate for node in self.inner)

    @abstractmethod
    def read(self, lanes: Lanes) -> Column:
        """Read one value per lane, and advance all lanes over it."""


class Null(Node):
    """No bytes."""

    own_size = 0

    @override
    def read(self, lanes: Lanes) -> Column:
        return ArrowColumn(pa.nulls(len(lanes)))


class Boolean(Node):
    """One byte, 0 or 1; any other is malformed."""

    @override
    def read(self, lanes: Lanes) -> Column:
        start = lanes.read_fixed(1, self.label, "a boolean")
        values = lanes.block.data[start]
        bad = values > 1
        if bad.any():
            lanes.reject(bad, Defect.MALFORMED, start, self.label, "boolean {0} at byte {at}", values)
            values[bad] = 0
        return FixedWidth(self.type, values)


@dataclass(frozen=True)
class Integer(Node):
    """An int (32 bits) or long (64 bits), returned as `dtype`, which may be a type it is promoted to.

    A time of day outside the day is malformed, because Arrow has no such value.
    """

    bits: int
    dtype: npt.DTypeLike

    @override
    def read(self, lanes: Lanes) -> FixedWidth:
        at = lanes.pos
        values = lanes.read_varint(self.label, "an int" if self.bits == 32 else "a long")
        if self.bits == 32:
            bad = (values > 2**31 - 1) | (values < -(2**31))
            if bad.any():
                text = "int {0} of more than 32 bits at byte {at}"
                lanes.reject(bad, Defect.MALFORMED, at, self.label, text, values)
                values[bad] = 0
        if self._day:
            bad = (values < 0) | (values >= self._day)
            if bad.any():
                lanes.reject(bad, Defect.MALFORMED, at, self.label, "time {0} outside the day at byte {at}", values)
                values[bad] = 0
        return FixedWidth(self.type, values.astype(self.dtype, copy=False))

    @cached_property
    def _day(self) -> int:
        """The length of a day in the unit of a time of day; 0 for other types."""
        if not pa.types.is_time(self.type):
            return 0
        return 86_400_000 if self.type.unit == "ms" else 86_400_000_000


@dataclass(frozen=True)
class Binary(Node):
    """A string or bytes: a length and that number of bytes."""

    is_text: bool
    is_uuid: bool = False

    @override
    def read(self, lanes: Lanes) -> Column:
        start, length = lanes.read_length_prefixed(self.label)
        return VarBinary(self.type, lanes.block, start, length, self.label, self.is_text, self.is_uuid)


@dataclass(frozen=True)
class Fixed(Node):
    """A fixed, float or double (IEEE 754, little-endian): the bytes of one `encoded`, returned as `dtype`."""

    encoded: np.dtype[Any]
    dtype: np.dtype[Any]

    @property
    @override
    def own_size(self) -> int:
        return self.encoded.itemsize

    @override
    def read(self, lanes: Lanes) -> Column:
        start = lanes.read_fixed(self.own_size, self.label, f"{self.own_size} bytes")
        return FixedWidth(self.type, lanes.block.window(self.encoded, start).astype(self.dtype, copy=False))


@dataclass(frozen=True)
class Enum(Node):
    """The index of a writer's symbol; `codes` maps it to the index in the reader's `symbols`, or -1."""

    writer_symbols: npt.NDArray[np.object_]
    codes: Ints
    symbols: pa.StringArray

    @override
    def read(self, lanes: Lanes) -> Column:
        at, k = lanes.pos, len(self.codes)
        index = lanes.read_varint(self.label, "an enum index")
        if index.max(initial=0) >= k or index.min(initial=0) < 0:
            bad = (index < 0) | (index >= k)
            text = f"enum index {{0}} of {k} symbols at byte {{at}}"
            lanes.reject(bad, Defect.INVALID_ENUM, at, self.label, text, index)
            index[bad] = 0
        codes = self.codes[index]
        unknown = codes < 0
        if unknown.any():
            text = "enum symbol {0} at byte {at} is not in the reader's schema"
            lanes.reject(unknown, Defect.INVALID_ENUM, at, self.label, text, self.writer_symbols[index])
            codes[unknown] = 0
        return EnumColumn(self.type, codes, self.symbols)


@dataclass(frozen=True)
class Array(Node):
    """Blocks of items."""

    item: Node
    min_size = 1
    can_speculate = False

    @property
    @override
    def inner(self) -> Sequence[Node]:
        return (self.item,)

    @override
    def read(self, lanes: Lanes) -> Column:
        counts, items = read_items(lanes, self.item.read, *self._item_traits, self.label)
        return ListColumn(self.type, counts, items)

    @cached_property
    def _item_traits(self) -> tuple[int, bool]:
        return self.item.min_size, self.item.can_speculate


@dataclass(frozen=True)
class Record(Node):
    """A record, or the key and value of a map's entry: fields in the writer's order.

    `places` maps each to its place in `type`, or to None if the reader drops it. `added` holds the places of fields
    that only the reader has, each with an array of the one default value.
    """

    fields: Sequence[Node]
    places: Sequence[int | None]
    added: Sequence[tuple[int, pa.Array]] = ()
    own_size = 0

    @property
    @override
    def inner(self) -> Sequence[Node]:
        return self.fields

    @override
    def read(self, lanes: Lanes) -> StructColumn:
        placed: dict[int, Column] = {}
        dropped = []
        for field, place in zip(self.fields, self.places, strict=True):
            column = field.read(lanes)
            if place is None:
                dropped.append(column)
            else:
                placed[place] = column
        for place, default in self.added:
            placed[place] = ArrowColumn(default.take(pa.array(np.zeros(len(lanes), np.int64))))
        return StructColumn(self.type, len(lanes), [placed[i] for i in range(len(placed))], dropped)
