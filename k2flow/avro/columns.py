"""Decoded values as numpy arrays over the bytes of a block, and their conversion to Arrow arrays.

Items of arrays and maps are read one per record at a time, so columns can be concatenated and reordered. That is
cheaper before the bytes of texts are copied. Texts are checked on conversion, and their defects recorded then.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from typing_extensions import override

from k2flow.avro.cursor import Block, Ints, Mask
from k2flow.avro.utf8 import invalid_texts
from k2flow.records import Defect

_WORD_BITS = 64
_UUID_LENGTH = 36
_UUID_DASHES = [8, 13, 18, 23]
_HEX = np.isin(np.arange(256), np.frombuffer(b"0123456789abcdefABCDEF", np.uint8))


@dataclass(frozen=True, slots=True)
class Column(ABC):
    """n values of one Arrow type; `valid` marks the values that are not null (None: all)."""

    valid: Mask | None = field(default=None, kw_only=True)

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def take(self, index: Ints) -> Self:
        """Return the values at `index`, in its order."""

    @classmethod
    @abstractmethod
    def concat(cls, parts: Sequence[Self]) -> Self:
        """Concatenate columns of one node of the plan."""

    @abstractmethod
    def to_arrow(self) -> pa.Array:
        """Convert to an Arrow array, and record the defects of texts."""

    def with_validity(self, valid: Mask) -> "Column":
        """Return the same values, null outside `valid`."""
        return replace(self, valid=valid)


@dataclass(frozen=True, slots=True)
class ArrowColumn(Column):
    """Values that are already an Arrow array."""

    array: pa.Array

    def __len__(self) -> int:
        return len(self.array)

    @override
    def take(self, index: Ints) -> Self:
        return replace(self, array=self.array.take(pa.array(index)))

    @classmethod
    @override
    def concat(cls, parts: Sequence[Self]) -> Self:
        return cls(pa.concat_arrays([part.array for part in parts]))

    @override
    def to_arrow(self) -> pa.Array:
        return self.array

    @override
    def with_validity(self, valid: Mask) -> Column:
        return ArrowColumn(self.array.take(pa.array(np.arange(len(valid)), mask=~valid)))


@dataclass(frozen=True, slots=True)
class FixedWidth(Column):
    """Values of a fixed width, in the memory layout of the Arrow type `type`; a boolean takes one byte."""

    type: pa.DataType
    values: npt.NDArray[Any]

    def __len__(self) -> int:
        return len(self.values)

    @override
    def take(self, index: Ints) -> Self:
        return replace(self, values=self.values[index], valid=_take_mask(self.valid, index))

    @classmethod
    @override
    def concat(cls, parts: Sequence[Self]) -> Self:
        values = np.concatenate([part.values for part in parts])
        return replace(parts[0], values=values, valid=_concat_masks(parts))

    @override
    def to_arrow(self) -> pa.Array:
        values = _to_bits(self.values) if pa.types.is_boolean(self.type) else np.ascontiguousarray(self.values)
        return _array(self.type, len(self), self.valid, [pa.py_buffer(values)])


@dataclass(frozen=True, slots=True)
class EnumColumn(FixedWidth):
    """Enum values; `values` are indices into `symbols`."""

    symbols: pa.StringArray

    @override
    def to_arrow(self) -> pa.Array:
        n = len(self)
        if n and self.valid is None and self.values.min() == self.values.max():
            text = self.symbols[int(self.values[0])].as_py().encode()
            offsets = np.arange(n + 1, dtype=np.int32) * np.int32(len(text))
            return _array(pa.string(), n, None, [pa.py_buffer(offsets), pa.py_buffer(text * n)])
        mask = None if self.valid is None else ~self.valid
        return self.symbols.take(pa.array(self.values, mask=mask))


@dataclass(frozen=True, slots=True)
class VarBinary(Column):
    """Texts and byte strings, as the start of each in the block's data and its length."""

    type: pa.DataType
    block: Block
    start: Ints
    length: npt.NDArray[Any]
    label: str
    is_text: bool
    is_uuid: bool = False

    def __len__(self) -> int:
        return len(self.start)

    @override
    def take(self, index: Ints) -> Self:
        valid = _take_mask(self.valid, index)
        return replace(self, start=self.start[index], length=self.length[index], valid=valid)

    @classmethod
    @override
    def concat(cls, parts: Sequence[Self]) -> Self:
        start = np.concatenate([part.start for part in parts])
        length = np.concatenate([part.length for part in parts])
        return replace(parts[0], start=start, length=length, valid=_concat_masks(parts))

    @override
    def to_arrow(self) -> pa.Array:
        offsets, data = self._copy()
        if self.is_text and self._reject_invalid(offsets, data):
            return VarBinary.to_arrow(self)
        return _array(self.type, len(self), self.valid, [pa.py_buffer(offsets), pa.py_buffer(data)])

    def _copy(self) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        n = len(self)
        size = int(self.length[0]) if n else 0
        if (self.length == size).all():
            offsets = np.arange(n + 1, dtype=np.int32) * np.int32(size)
            data = self.block.window(f"V{size}", self.start) if size else np.zeros(0, np.uint8)
            return offsets, data.view(np.uint8)
        # Each value and each gap after a value is an item of one binary array over the whole block. Arrow's own `take`
        # then copies every second item. The first and last item keep its estimate of the size positive.
        edges = np.empty(2 * n + 2, np.int32)
        edges[0], edges[-1] = 0, len(self.block.data)
        edges[1:-1:2] = self.start
        np.add(self.start, self.length, out=edges[2:-1:2], casting="unsafe")
        items = pa.Array.from_buffers(pa.binary(), 2 * n + 1, [None, pa.py_buffer(edges), self.block.buffer])
        _, packed, content = items.take(pa.array(np.arange(1, 2 * n + 1, 2, dtype=np.int32))).buffers()
        offsets = np.frombuffer(packed, np.int32, n + 1)
        return offsets, np.frombuffer(content, np.uint8, int(offsets[-1]))

    def _reject_invalid(self, offsets: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> bool:
        """Record texts that are not UTF-8 or not a UUID, make them empty, and return whether there were any."""
        rows, position = invalid_texts(data, offsets)
        defect, text = Defect.INVALID_UTF8, "invalid UTF-8 at byte {at}"
        if self.is_uuid and not len(rows):
            rows = np.flatnonzero(~_are_uuids(offsets, data) & (self.start < self.block.padding_start))
            position, defect, text = np.zeros(len(rows), np.int64), Defect.MALFORMED, "invalid UUID at byte {at}"
        if not len(rows):
            return False
        self.block.add_defect(self.start[rows] + position, defect, self.label, text)
        self.start[rows], self.length[rows] = self.block.padding_start, 0
        return True


@dataclass(frozen=True, slots=True)
class StructColumn(Column):
    """Records: the columns of their fields, and of `dropped` fields, which are only checked."""

    type: pa.DataType
    size: int
    children: list[Column]
    dropped: list[Column] = field(default_factory=list)

    def __len__(self) -> int:
        return self.size

    @override
    def take(self, index: Ints) -> Self:
        children = [child.take(index) for child in self.children]
        dropped = [child.take(index) for child in self.dropped]
        return replace(self, size=len(index), children=children, dropped=dropped, valid=_take_mask(self.valid, index))

    @classmethod
    @override
    def concat(cls, parts: Sequence[Self]) -> Self:
        children = [concat(list(same)) for same in zip(*(part.children for part in parts), strict=True)]
        dropped = [concat(list(same)) for same in zip(*(part.dropped for part in parts), strict=True)]
        return cls(parts[0].type, sum(map(len, parts)), children, dropped, valid=_concat_masks(parts))

    @override
    def to_arrow(self) -> pa.Array:
        return _array(self.type, self.size, self.valid, [], self.children_to_arrow())

    def children_to_arrow(self) -> list[pa.Array]:
        """Convert each field to an Arrow array."""
        for child in self.dropped:
            child.to_arrow()
        return [child.to_arrow() for child in self.children]


@dataclass(frozen=True, slots=True)
class ListColumn(Column):
    """Arrays and maps: the number of items of each, and the column of all items, in order."""

    type: pa.DataType
    counts: Ints
    items: Column

    def __len__(self) -> int:
        return len(self.counts)

    @override
    def take(self, index: Ints) -> Self:
        first = np.cumsum(self.counts) - self.counts
        counts = self.counts[index]
        shift = first[index] - (np.cumsum(counts) - counts)
        items = self.items.take(np.arange(counts.sum()) + np.repeat(shift, counts))
        return replace(self, counts=counts, items=items, valid=_take_mask(self.valid, index))

    @classmethod
    @override
    def concat(cls, parts: Sequence[Self]) -> Self:
        counts = np.concatenate([part.counts for part in parts])
        return cls(parts[0].type, counts, concat([part.items for part in parts]), valid=_concat_masks(parts))

    @override
    def to_arrow(self) -> pa.Array:
        counts, items = self.counts, self.items.to_arrow()
        keep = _last_of_each_key(counts, items.field(0)) if pa.types.is_map(self.type) else None
        if keep is not None:
            owner = np.repeat(np.arange(len(counts)), counts)
            counts, items = np.bincount(owner[keep], minlength=len(counts)), items.filter(pa.array(keep))
        offsets = np.zeros(len(counts) + 1, np.int32)
        np.cumsum(counts, out=offsets[1:])
        return _array(self.type, len(counts), self.valid, [pa.py_buffer(offsets)], [items])


def concat(parts: Sequence[Column]) -> Column:
    """Concatenate columns of one node of the plan, of any classes."""
    first = parts[0]
    if len(parts) == 1:
        return first
    if all(type(part) is type(first) for part in parts):
        return type(first).concat(parts)
    return ArrowColumn.concat([ArrowColumn(part.to_arrow()) for part in parts])


def _array(
    kind: pa.DataType, n: int, valid: Mask | None, buffers: list[pa.Buffer], children: list[pa.Array] | None = None
) -> pa.Array:
    validity = None if valid is None else pa.py_buffer(_to_bits(valid))
    return pa.Array.from_buffers(kind, n, [validity, *buffers], children=children)


def _to_bits(mask: npt.NDArray[Any]) -> npt.NDArray[np.uint8]:
    return np.packbits(mask, bitorder="little")


def _take_mask(valid: Mask | None, index: Ints) -> Mask | None:
    return None if valid is None else valid[index]


def _concat_masks(parts: Sequence[Column]) -> Mask | None:
    if all(part.valid is None for part in parts):
        return None
    masks = [np.ones(len(part), np.bool_) if part.valid is None else part.valid for part in parts]
    return np.concatenate(masks)


def _last_of_each_key(counts: Ints, keys: pa.StringArray) -> Mask | None:
    """Return the mask of map entries without duplicate keys, or None to keep all; `counts` (n,): entries per map.

    The last entry of a key wins, as in fastavro and in Java's map. Avro has no rule for duplicate keys, but DuckDB
    rejects a file in which a map has a key twice. So one hostile message would make all of its file unreadable.
    """
    if not len(keys) or counts.max() < 2:
        return None
    encoded = keys.dictionary_encode()
    codes, distinct = encoded.indices.to_numpy(), len(encoded.dictionary)
    if distinct <= _WORD_BITS:  # the usual case: one bit set per map decides it
        filled = counts[counts > 0]
        bits = np.bitwise_or.reduceat(np.uint64(1) << codes.astype(np.uint64), np.cumsum(filled) - filled)
        if (np.bitwise_count(bits) == filled).all():
            return None
    owner = np.repeat(np.arange(len(counts)), counts)
    _, from_end = np.unique((owner * distinct + codes)[::-1], return_index=True)
    if len(from_end) == len(keys):
        return None
    keep = np.zeros(len(keys), bool)
    keep[len(keys) - 1 - from_end] = True
    return keep


def _are_uuids(offsets: npt.NDArray[np.int32], data: npt.NDArray[np.uint8]) -> Mask:
    """Return which texts are UUIDs in the format of RFC 4122: 8-4-4-4-12 hexadecimal digits."""
    right: Mask = np.diff(offsets) == _UUID_LENGTH
    index = np.flatnonzero(right)
    text = data[offsets[index][:, None] + np.arange(_UUID_LENGTH)]
    dashes = np.all(text[:, _UUID_DASHES] == ord("-"), axis=1)
    right[index] = dashes & (_HEX[text].sum(axis=1) == _UUID_LENGTH - len(_UUID_DASHES))
    return right
