"""Passes over values whose type can be no column, one record at a time.

Such a type is recursive, nested too deep or too large. Its values are left out of the result. They are read only as far
as needed to find their end: lengths, counts and branches are checked, contents are not.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from typing_extensions import override

from k2flow.avro.columns import ArrowColumn, Column
from k2flow.avro.cursor import MAX_COUNT, Lanes
from k2flow.avro.parse import Json, ParsedSchema
from k2flow.avro.plan import Node
from k2flow.records import Defect

_VARINT_BYTES = 10
_FIXED_SIZES = {"boolean": 1, "float": 4, "double": 8}


@dataclass(frozen=True)
class Skip(Node):
    """A value that is left out, and why; `names` defines the named types of `schema`. All its rows are null."""

    schema: Json
    names: ParsedSchema
    reason: str
    own_size = 0
    can_speculate = False

    @override
    def read(self, lanes: Lanes) -> Column:
        n, data = len(lanes), memoryview(lanes.block.buffer).cast("B")
        bad = np.zeros(n, np.uint8)
        at, texts = np.zeros(n, np.int64), np.full(n, None, object)
        for i in np.flatnonzero(lanes.pos < lanes.block.padding_start).tolist():
            scan = _Scan(data, int(lanes.pos[i]), int(lanes.end[i]))
            try:
                self._skip(scan)
            except _DefectFoundError as found:
                bad[i], at[i], texts[i] = found.defect, found.at, found.text
            else:
                lanes.pos[i] = scan.at
        for defect in np.unique(bad[bad != 0]).tolist():
            lanes.reject(bad == defect, Defect(defect), at, self.label, "{0} at byte {at}", texts)
        return ArrowColumn(pa.nulls(n))

    def _skip(self, scan: "_Scan") -> None:
        """Move past one value. A stack of what is left to read replaces recursion, which Python limits."""
        left: list[Json | Iterator[Json]] = [self.schema]
        records_at, records = scan.at, 0  # the records entered since this byte
        while left:
            part = left[-1]
            if isinstance(part, Iterator):
                part = next(part, None)
                if part is None:
                    left.pop()
                    continue
            else:
                left.pop()
            schema = self.names.expand(part)
            if isinstance(schema, list):
                left.append(schema[scan.index(len(schema), "union branch")])
                continue
            match schema["type"]:
                case "record" | "error":
                    records_at, records = scan.at, 1 + (records if scan.at == records_at else 0)
                    if records > len(self.names.names):
                        raise _DefectFoundError(Defect.MALFORMED, scan.at, "a record that contains itself without end")
                    left.append(field["type"] for field in schema["fields"] if not self._is_empty(field["type"]))
                case "array":
                    left.append(self._items(scan, (schema["items"],)))
                case "map":
                    left.append(self._items(scan, ("string", schema["values"])))
                case "enum":
                    scan.index(len(schema["symbols"]), "enum index", Defect.INVALID_ENUM)
                case "int" | "long":
                    scan.long("a long")
                case "bytes" | "string":
                    scan.skip(scan.length())
                case "fixed":
                    scan.skip(schema["size"])
                case kind:
                    scan.skip(_FIXED_SIZES.get(kind, 0))

    def _items(self, scan: "_Scan", item: tuple[Json, ...]) -> Iterator[Json]:
        """Yield the types of an array's or map's items, block by block."""
        filled = [part for part in item if not self._is_empty(part)]
        while count := scan.block_count():
            if filled:
                scan.expect(count)
                for _ in range(count):
                    yield from filled

    def _is_empty(self, schema: Json) -> bool:
        """Whether the values of a type have no bytes."""
        return _name(schema) in self._empty

    @cached_property
    def _empty(self) -> set[str | None]:
        """The names of the types whose values have no bytes."""
        found: set[str | None] = {"null"}
        size = 0
        while size < len(found):
            size = len(found)
            for name, schema in reversed(self.names.names.items()):  # inner types come last
                if schema["type"] == "fixed":
                    is_empty = not schema["size"]
                else:
                    is_empty = "fields" in schema and all(_name(part["type"]) in found for part in schema["fields"])
                if is_empty:
                    found.add(name)
        return found


def _name(schema: Json) -> str | None:
    """Return the full name of a named or primitive type."""
    if isinstance(schema, dict):
        return str(schema.get("name", schema["type"]))
    return schema if isinstance(schema, str) else None


class _DefectFoundError(Exception):
    def __init__(self, defect: Defect, at: int, text: str) -> None:
        super().__init__(text)
        self.defect, self.at, self.text = defect, at, text


@dataclass(slots=True)
class _Scan:
    """The read position in one record."""

    data: memoryview
    at: int
    end: int

    def skip(self, size: int) -> None:
        self.expect(size)
        self.at += size

    def expect(self, size: int) -> None:
        """Raise _DefectFoundError if fewer than `size` bytes are left."""
        if size > self.end - self.at:
            text = f"expected {size} bytes, {self.end - self.at} left,"
            raise _DefectFoundError(Defect.TRUNCATED, self.at, text)

    def long(self, what: str) -> int:
        start, number = self.at, 0
        for i in range(_VARINT_BYTES):
            if self.at >= self.end:
                raise _DefectFoundError(Defect.TRUNCATED, start, f"expected {what}, {self.end - start} left,")
            byte = self.data[self.at]
            self.at += 1
            number |= (byte & 0x7F) << 7 * i
            if byte < 0x80 and number < 2**64:
                return (number >> 1) ^ -(number & 1)
        raise _DefectFoundError(Defect.MALFORMED, start, f"{what} of more than 64 bits")

    def length(self) -> int:
        start, size = self.at, self.long("a length")
        if size < 0:
            raise _DefectFoundError(Defect.MALFORMED, start, f"length {size}")
        return size

    def index(self, count: int, what: str, defect: Defect = Defect.MALFORMED) -> int:
        start, number = self.at, self.long(what)
        if not 0 <= number < count:
            raise _DefectFoundError(defect, start, f"{what} {number} of {count}")
        return number

    def block_count(self) -> int:
        start, count = self.at, self.long("a block count")
        if abs(count) > MAX_COUNT:
            raise _DefectFoundError(Defect.MALFORMED, start, f"a block of {count} items")
        if count < 0:
            self.long("a block size")
        return abs(count)
