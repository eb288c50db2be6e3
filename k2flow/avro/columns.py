"""What was read of n values, still as numpy arrays over a block's bytes, and how it becomes an Arrow array.

Items of arrays and maps are read one from each record at a time, so columns can be joined and put into another order;
that is cheaper before the bytes of texts are copied. Texts are checked when they are built, and the defects noted then.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.cursor import Block, Ints, Mask
from k2flow.avro.maps import last_of_each_key
from k2flow.avro.utf8 import invalid_texts
from k2flow.records import Defect

_UUID_LENGTH = 36
_UUID_DASHES = [8, 13, 18, 23]
_HEX = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdefABCDEF", np.uint8))


class Column(ABC):
    """n values of one Arrow type; `valid` tells which are not null (None: all)."""

    valid: Mask | None

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Ints) -> Self:
        """The values at `index`, in its order."""

    @classmethod
    @abstractmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """All values of columns of one node of the plan, one column after the other."""

    @abstractmethod
    def build(self) -> pa.Array:
        """The Arrow array; notes the defects of texts."""

    @abstractmethod
    def masked(self, valid: Mask) -> "Column":
        """The same values, null outside `valid`."""


@dataclass(frozen=True, slots=True)
class Built(Column):
    """Values that are an Arrow array already."""

    array: pa.Array
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.array)

    def take(self, index: Ints) -> Self:
        return replace(self, array=self.array.take(pa.array(index)))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(pa.concat_arrays([part.array for part in parts]))

    def build(self) -> pa.Array:
        return self.array

    def masked(self, valid: Mask) -> Column:
        return Built(self.array.take(pa.array(np.arange(len(valid)), mask=~valid)))


@dataclass(frozen=True, slots=True)
class Values(Column):
    """Values of a fixed width; `values` has the memory layout that `type` has in Arrow, a boolean a byte each."""

    type: pa.DataType
    values: npt.NDArray[Any]
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.values)

    def take(self, index: Ints) -> Self:
        return replace(self, values=self.values[index], valid=_take_mask(self.valid, index))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(parts[0].type, np.concatenate([part.values for part in parts]), _join_masks(parts))

    def build(self) -> pa.Array:
        values = _bits(self.values) if pa.types.is_boolean(self.type) else np.ascontiguousarray(self.values)
        return _array(self.type, len(self), self.valid, [pa.py_buffer(values)])

    def masked(self, valid: Mask) -> Column:
        return replace(self, valid=valid)


@dataclass(frozen=True, slots=True)
class Symbols(Column):
    """Enum values: the index of each among `symbols`."""

    symbols: pa.StringArray
    index: Ints
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.index)

    def take(self, index: Ints) -> Self:
        return replace(self, index=self.index[index], valid=_take_mask(self.valid, index))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        return cls(parts[0].symbols, np.concatenate([part.index for part in parts]), _join_masks(parts))

    def build(self) -> pa.Array:
        n = len(self)
        if n and self.valid is None and self.index.min() == self.index.max():
            text = self.symbols[int(self.index[0])].as_py().encode()
            offsets = np.arange(n + 1, dtype=np.int32) * np.int32(len(text))
            return _array(pa.string(), n, None, [pa.py_buffer(offsets), pa.py_buffer(text * n)])
        mask = None if self.valid is None else ~self.valid
        return self.symbols.take(pa.array(self.index, mask=mask))

    def masked(self, valid: Mask) -> Column:
        return replace(self, valid=valid)


@dataclass(frozen=True, slots=True)
class Spans(Column):
    """Texts and byte strings: where each begins in the block's data, and its length."""

    type: pa.DataType
    block: Block
    start: Ints
    length: npt.NDArray[Any]
    label: str
    is_text: bool
    is_uuid: bool = False
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.start)

    def take(self, index: Ints) -> Self:
        valid = _take_mask(self.valid, index)
        return replace(self, start=self.start[index], length=self.length[index], valid=valid)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        start = np.concatenate([part.start for part in parts])
        length = np.concatenate([part.length for part in parts])
        return replace(parts[0], start=start, length=length, valid=_join_masks(parts))

    def build(self) -> pa.Array:
        offsets, data = self._copy()
        if self.is_text and self._flag_texts(offsets, data):
            return self.build()
        return _array(self.type, len(self), self.valid, [pa.py_buffer(offsets), pa.py_buffer(data)])

    def masked(self, valid: Mask) -> Column:
        return replace(self, valid=valid)

    def _copy(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """Offsets and bytes of all values, packed."""
        n = len(self)
        size = int(self.length[0]) if n else 0
        if (self.length == size).all():
            offsets = np.arange(n + 1, dtype=np.int32) * np.int32(size)
            data = self.block.window(f"V{size}", self.start) if size else np.zeros(0, np.uint8)
            return offsets, data.view(np.uint8)
        # Each value and the gap after it are items of one binary array over the whole block, so that Arrow's own
        # `take` copies every second item. The first and last item keep its estimate of the size positive.
        edges = np.empty(2 * n + 2, np.int32)
        edges[0], edges[-1] = 0, len(self.block.data)
        edges[1:-1:2] = self.start
        np.add(self.start, self.length, out=edges[2:-1:2], casting="unsafe")
        items = pa.Array.from_buffers(pa.binary(), 2 * n + 1, [None, pa.py_buffer(edges), self.block.buffer])
        _, packed, content = items.take(pa.array(np.arange(1, 2 * n + 1, 2, dtype=np.int32))).buffers()
        offsets = np.frombuffer(packed, np.int32, n + 1)
        return offsets, np.frombuffer(content, np.uint8, int(offsets[-1]))

    def _flag_texts(self, offsets: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> bool:
        """Notes texts that are no UTF-8 or no UUID, and makes them empty; whether there were any."""
        rows, where = invalid_texts(data, offsets)
        if len(rows):
            self.block.flag_content(self.start[rows] + where, Defect.INVALID_UTF8, self.label, "no UTF-8 at byte {at}")
            self.start[rows], self.length[rows] = self.block.park, 0
            return True
        if self.is_uuid:
            rows = np.flatnonzero(~_are_uuids(offsets, data) & (self.start < self.block.park))
            if len(rows):
                self.block.flag_content(self.start[rows], Defect.MALFORMED, self.label, "no UUID at byte {at}")
                self.start[rows], self.length[rows] = self.block.park, 0
                return True
        return False


@dataclass(frozen=True, slots=True)
class Struct(Column):
    """Records: the columns of their fields, and of `dropped` ones, which are only checked."""

    type: pa.DataType
    size: int
    children: list[Column]
    dropped: list[Column]
    valid: Mask | None = None

    def __len__(self) -> int:
        return self.size

    def take(self, index: Ints) -> Self:
        children = [child.take(index) for child in self.children]
        dropped = [child.take(index) for child in self.dropped]
        return replace(self, size=len(index), children=children, dropped=dropped, valid=_take_mask(self.valid, index))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        children = [join(list(same)) for same in zip(*(part.children for part in parts), strict=True)]
        dropped = [join(list(same)) for same in zip(*(part.dropped for part in parts), strict=True)]
        return cls(parts[0].type, sum(map(len, parts)), children, dropped, _join_masks(parts))

    def build(self) -> pa.Array:
        return _array(self.type, self.size, self.valid, [], self.build_children())

    def build_children(self) -> list[pa.Array]:
        """An Arrow array for each field."""
        for child in self.dropped:
            child.build()
        return [child.build() for child in self.children]

    def masked(self, valid: Mask) -> Column:
        return replace(self, valid=valid)


@dataclass(frozen=True, slots=True)
class Items(Column):
    """Arrays and maps: how many items each has, and the column of all items, in order."""

    type: pa.DataType
    counts: Ints
    child: Column
    valid: Mask | None = None

    def __len__(self) -> int:
        return len(self.counts)

    def take(self, index: Ints) -> Self:
        first = np.cumsum(self.counts) - self.counts
        counts = self.counts[index]
        shift = first[index] - (np.cumsum(counts) - counts)
        items = np.arange(counts.sum()) + np.repeat(shift, counts)
        return replace(self, counts=counts, child=self.child.take(items), valid=_take_mask(self.valid, index))

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        counts = np.concatenate([part.counts for part in parts])
        return cls(parts[0].type, counts, join([part.child for part in parts]), _join_masks(parts))

    def build(self) -> pa.Array:
        counts, child = self.counts, self.child.build()
        keep = last_of_each_key(counts, child.field(0)) if pa.types.is_map(self.type) else None
        if keep is not None:
            owner = np.repeat(np.arange(len(counts)), counts)
            counts, child = np.bincount(owner[keep], minlength=len(counts)), child.filter(pa.array(keep))
        offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        return _array(self.type, len(counts), self.valid, [pa.py_buffer(offsets)], [child])

    def masked(self, valid: Mask) -> Column:
        return replace(self, valid=valid)


def join(parts: Sequence[Column]) -> Column:
    """All values of columns of one node of the plan, one column after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(type(part) is type(first) for part in parts):
        return type(first).join(parts)
    return Built.join([Built(part.build()) for part in parts])


def _array(
    kind: pa.DataType, n: int, valid: Mask | None, buffers: list[pa.Buffer], children: list[pa.Array] | None = None
) -> pa.Array:
    nulls = None if valid is None else pa.py_buffer(_bits(valid))
    return pa.Array.from_buffers(kind, n, [nulls, *buffers], children=children)


def _bits(mask: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.packbits(mask, bitorder="little")


def _take_mask(valid: Mask | None, index: Ints) -> Mask | None:
    return None if valid is None else valid[index]


def _join_masks(parts: Sequence[Column]) -> Mask | None:
    if all(part.valid is None for part in parts):
        return None
    masks = [np.ones(len(part), np.bool_) if part.valid is None else part.valid for part in parts]
    return np.concatenate(masks)


def _are_uuids(offsets: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> Mask:
    """Which texts are a UUID as RFC 4122 writes it: 8-4-4-4-12 hexadecimal digits."""
    right: Mask = np.diff(offsets) == _UUID_LENGTH
    index = np.flatnonzero(right)
    text = data[offsets[index][:, None] + np.arange(_UUID_LENGTH)]
    dashes = np.all(text[:, _UUID_DASHES] == ord("-"), axis=1)
    right[index] = dashes & (_HEX[text].sum(axis=1) == _UUID_LENGTH - len(_UUID_DASHES))
    return right
