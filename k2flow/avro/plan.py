"""What to read for each type of a schema: nodes, compiled once, that read the values of all lanes side by side.

The encodings are those of the Avro 1.12 specification, "Binary encoding" and "Logical types".
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.blocks import read_items
from k2flow.avro.columns import Built, Column, Items, Spans, Struct, Symbols, Values
from k2flow.avro.cursor import Ints, Lanes
from k2flow.avro.decimals import read_decimals
from k2flow.records import Defect


@dataclass(frozen=True)
class Node(ABC):
    """Reads one type into a column of the Arrow type `type`; `label` names the field in details of defects."""

    type: pa.DataType
    label: str

    @property
    def width(self) -> int:
        """The smallest number of bytes that a value takes."""
        return 1

    @property
    def reach(self) -> int:
        """The largest number of zeros that a lane reads which stops in the midst of a value."""
        return 1

    @property
    def flat(self) -> bool:
        """Whether reading a value that may be none costs little and notes nothing: no arrays, no merged branches."""
        return True

    @abstractmethod
    def read(self, lanes: Lanes) -> Column:
        """Moves all lanes over one value."""


class Null(Node):
    """No bytes."""

    width = 0
    reach = 0

    def read(self, lanes: Lanes) -> Column:
        return Built(pa.nulls(len(lanes)))


class Boolean(Node):
    """One byte, 0 or 1; any other is malformed."""

    def read(self, lanes: Lanes) -> Column:
        start = lanes.advance(1, self.label, "a boolean")
        values = lanes.block.data[start]
        bad = values > 1
        if bad.any():
            lanes.fault(bad, Defect.MALFORMED, start, self.label, "boolean {0} at byte {at}", values)
            values[bad] = 0
        return Values(self.type, values)


@dataclass(frozen=True)
class Integer(Node):
    """An int (32 bits) or long (64), given as `dtype`, which may be a type that it is promoted to.

    A time of day outside the day is malformed, since Arrow has no such value.
    """

    bits: int
    dtype: npt.DTypeLike

    def read(self, lanes: Lanes) -> Column:
        at = lanes.pos
        values = lanes.varint(self.label, "an int" if self.bits == 32 else "a long")
        if self.bits == 32:
            bad = (values > 2**31 - 1) | (values < -(2**31))
            if bad.any():
                text = "int {0} of more than 32 bits at byte {at}"
                lanes.fault(bad, Defect.MALFORMED, at, self.label, text, values)
                values[bad] = 0
        if self._day:
            bad = (values < 0) | (values >= self._day)
            if bad.any():
                lanes.fault(bad, Defect.MALFORMED, at, self.label, "time {0} outside the day at byte {at}", values)
                values[bad] = 0
        return Values(self.type, values.astype(self.dtype, copy=False))

    @cached_property
    def _day(self) -> int:
        """A day in the unit of a time of day; 0 for other types."""
        if not pa.types.is_time(self.type):
            return 0
        return 86_400_000 if self.type.unit == "ms" else 86_400_000_000


@dataclass(frozen=True)
class Float(Node):
    """A float (4 bytes) or double (8), IEEE 754, little-endian; given as `dtype`."""

    size: int
    dtype: npt.DTypeLike

    @property
    def width(self) -> int:
        return self.size

    @property
    def reach(self) -> int:
        return self.size

    def read(self, lanes: Lanes) -> Column:
        start = lanes.advance(self.size, self.label, f"{self.size} bytes")
        values = lanes.block.window(f"<f{self.size}", start)
        return Values(self.type, values.astype(self.dtype, copy=False))


@dataclass(frozen=True)
class Binary(Node):
    """A string or bytes: a length and so many bytes."""

    is_text: bool
    is_uuid: bool = False

    def read(self, lanes: Lanes) -> Column:
        start, length = lanes.span(self.label)
        return Spans(self.type, lanes.block, start, length, self.label, self.is_text, self.is_uuid)


@dataclass(frozen=True)
class Fixed(Node):
    """A given number of bytes."""

    size: int

    @property
    def width(self) -> int:
        return self.size

    @property
    def reach(self) -> int:
        return self.size

    def read(self, lanes: Lanes) -> Column:
        start = lanes.advance(self.size, self.label, f"{self.size} bytes")
        return Values(self.type, lanes.block.window(f"V{self.size}", start))


@dataclass(frozen=True)
class Decimal(Node):
    """A decimal in bytes, or in a fixed of `size` bytes; more digits than the precision are malformed."""

    size: int | None

    @property
    def width(self) -> int:
        return 1 if self.size is None else self.size

    @property
    def reach(self) -> int:
        return self.width

    def read(self, lanes: Lanes) -> Column:
        if self.size is None:
            start, length = lanes.span(self.label)
        else:
            start = lanes.advance(self.size, self.label, f"{self.size} bytes")
            length = np.full(len(start), self.size)
        precision = self.type.precision
        values, wide = read_decimals(lanes.block, start, length, precision, self.type.byte_width // 8)
        if wide.any():
            text = f"{{0}} bytes at byte {{at}} hold a number of more than {precision} digits"
            lanes.fault(wide, Defect.MALFORMED, start, self.label, text, length)
        return Values(self.type, values)


@dataclass(frozen=True)
class Enum(Node):
    """The index of a symbol; `codes` gives each its index in `symbols`, those of the reader, or -1."""

    writer_symbols: npt.NDArray[np.object_]
    codes: Ints
    symbols: pa.StringArray

    def read(self, lanes: Lanes) -> Column:
        at, k = lanes.pos, len(self.codes)
        index = lanes.varint(self.label, "an enum index")
        if index.max(initial=0) >= k or index.min(initial=0) < 0:
            bad = (index < 0) | (index >= k)
            text = f"enum index {{0}} of {k} symbols at byte {{at}}"
            lanes.fault(bad, Defect.INVALID_ENUM, at, self.label, text, index)
            index[bad] = 0
        codes = self.codes[index]
        unknown = codes < 0
        if unknown.any():
            text = "enum symbol {0} at byte {at} is unknown to the reader's schema"
            lanes.fault(unknown, Defect.INVALID_ENUM, at, self.label, text, self.writer_symbols[index])
            codes[unknown] = 0
        return Symbols(self.symbols, codes)


@dataclass(frozen=True)
class Array(Node):
    """Blocks of items."""

    item: Node

    @property
    def reach(self) -> int:
        return self.item.reach + 1

    @property
    def flat(self) -> bool:
        return False

    def read(self, lanes: Lanes) -> Column:
        width, flat = self._item_traits
        counts, items = read_items(lanes, self.item.read, width, flat, self.label)
        return Items(self.type, counts, items)

    @cached_property
    def _item_traits(self) -> tuple[int, bool]:
        return self.item.width, self.item.flat


@dataclass(frozen=True)
class Entry(Node):
    """A key and a value of a map."""

    key: Binary
    value: Node

    @property
    def width(self) -> int:
        return self.key.width + self.value.width

    @property
    def reach(self) -> int:
        return self.key.reach + self.value.reach

    @property
    def flat(self) -> bool:
        return self.value.flat

    def read(self, lanes: Lanes) -> Column:
        key = self.key.read(lanes)
        return Struct(self.type, len(lanes), [key, self.value.read(lanes)], [])


@dataclass(frozen=True)
class Record(Node):
    """Fields in the writer's order; `places` gives each its place in `type`, or None where the reader drops it.

    `added` are the places of fields that only the reader has, with an array of the one default value.
    """

    fields: Sequence[Node]
    places: Sequence[int | None]
    added: Sequence[tuple[int, pa.Array]]

    @property
    def width(self) -> int:
        return sum(field.width for field in self.fields)

    @property
    def reach(self) -> int:
        return sum(field.reach for field in self.fields)

    @property
    def flat(self) -> bool:
        return all(field.flat for field in self.fields)

    def read(self, lanes: Lanes) -> Struct:
        placed: dict[int, Column] = {}
        dropped = []
        for field, place in zip(self.fields, self.places, strict=True):
            column = field.read(lanes)
            if place is None:
                dropped.append(column)
            else:
                placed[place] = column
        zeros = np.zeros(len(lanes), np.int64)
        for place, default in self.added:
            placed[place] = Built(default.take(pa.array(zeros)))
        return Struct(self.type, len(lanes), [placed[i] for i in range(len(placed))], dropped)
