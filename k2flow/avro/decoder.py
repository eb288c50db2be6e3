"""Batches of Avro records into Arrow, all records side by side, each bad record flagged alone.

A pure function of the bytes and the schemas. The binary encoding is that of the Avro 1.12 specification; where it
leaves room, or a decoder may be lax, this one

- refuses a boolean byte other than 0 and 1, a varint of more than 64 bits, an int of more than 32, a negative enum
  index or union branch, a decimal of more digits than its precision, a time of day outside the day, a text that is no
  UUID as RFC 4122 writes it, and more than 1024 items without any bytes (null, an empty record) in one array;
- accepts varints and decimals of more bytes than they need, any date or timestamp, and a map with a key that comes
  twice (the last one holds); the size of a block of items is not compared with its content.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.columns import Struct
from k2flow.avro.cursor import FRONT, SLACK, Block, Ints, Lanes
from k2flow.avro.defects import Faults
from k2flow.avro.plan import Record
from k2flow.avro.resolve import resolve
from k2flow.avro.schemas import Json, parse
from k2flow.avro.unknown import UnknownField, with_unknown
from k2flow.records import DecodedRecords, Defect

_BLOCK_ROWS = 1 << 14
_BLOCK_BYTES = 1 << 22
_MAX_RECORD_BYTES = 1 << 30


class AvroDecoder:
    """Decodes records of one writer's schema, as the reader's schema wants them.

    Each is JSON text or what JSON text holds. `schema` is that of the batches: a column for each field of the record,
    or one column `value` if the schema is no record; types.py has the Arrow types. Fields of the writer's record that
    the reader's lacks are checked and dropped, or with `keep_unknown` given beside the batch: `unknown` tells which
    they are. Those of records within it are always dropped. Raises SchemaError if a schema is not valid, holds itself
    or is too large, or if the two are incompatible.
    """

    def __init__(self, writer_schema: Json, reader_schema: Json | None = None, keep_unknown: bool = False) -> None:
        self.writer_schema = writer_schema
        self.unknown_fields: tuple[UnknownField, ...] = ()
        writer = parse(writer_schema)
        self._plan = resolve(writer, writer if reader_schema is None else parse(reader_schema))
        self._reach = self._plan.reach
        kind = self._plan.type
        self.schema = pa.schema(list(kind) if isinstance(self._plan, Record) else [("value", kind)])
        if keep_unknown and isinstance(self._plan, Record):
            self._plan, self.unknown_fields = with_unknown(self._plan, writer)
        self._unknown_schema = pa.schema(list(self._plan.type)[len(kind) :] if self.unknown_fields else [])

    def decode(self, payloads: pa.BinaryArray | pa.LargeBinaryArray, skip: int = 0) -> DecodedRecords:
        """Decodes n payloads without nulls; `skip` is how many bytes before each record to pass over.

        Raises ValueError for a payload of more than 1 GiB.
        """
        n = len(payloads)
        faults = Faults(n)
        edges, data = _open(payloads)
        parts = [self._decode_block(block, lanes) for block, lanes in self._blocks(edges, data, skip, faults)]
        if not parts:
            arrays = [pa.array([], field.type) for field in (*self.schema, *self._unknown_schema)]
        elif len(parts) == 1:
            arrays = parts[0]
        else:
            arrays = [pa.concat_arrays(pieces) for pieces in zip(*parts, strict=True)]
        known = len(self.schema)
        batch = _batch(self.schema, n, arrays[:known])
        return DecodedRecords(
            batch=batch, unknown=arrays[known:], defect=faults.defect, position=faults.position, detail=faults.detail
        )

    def _blocks(
        self, edges: Ints, data: npt.NDArray[np.uint8], skip: int, faults: Faults
    ) -> Iterator[tuple[Block, Lanes]]:
        """The payloads in blocks that stay in the processor's caches from the first field to the last."""
        n, first = len(edges) - 1, 0
        buffer = np.zeros(0, np.uint8)
        while first < n:
            reach = int(np.searchsorted(edges, edges[first] + _BLOCK_BYTES, "right")) - 1
            last = min(max(reach, first + 1), first + _BLOCK_ROWS, n)
            begin, end = int(edges[first]), int(edges[last])
            size = end - begin
            if size > _MAX_RECORD_BYTES:
                raise ValueError(f"a payload of {size} bytes; at most {_MAX_RECORD_BYTES} can be decoded")
            park = FRONT + size + 1  # a record that has been read up to the block's end is not parked
            if len(buffer) < park + self._reach + SLACK:
                buffer = np.zeros(park + self._reach + SLACK, np.uint8)
            buffer[FRONT : FRONT + size] = data[begin:end]
            buffer[FRONT + size :] = 0
            at = edges[first : last + 1] - (begin - FRONT)
            block = Block(buffer, park, first, at[:-1], faults)
            yield block, Lanes(block, np.arange(first, last), np.minimum(at[:-1] + skip, at[1:]), at[1:].copy())
            first = last

    def _decode_block(self, block: Block, lanes: Lanes) -> list[pa.Array]:
        column = self._plan.read(lanes)
        left = lanes.end - lanes.pos
        trailing = left > 0
        text = "{0} bytes left over from byte {at}"
        lanes.fault(trailing, Defect.TRAILING_BYTES, lanes.pos, "record", text, left)
        if isinstance(self._plan, Record) and isinstance(column, Struct):
            return column.build_children()
        return [column.build()]


def _batch(schema: pa.Schema, n: int, arrays: list[pa.Array]) -> pa.RecordBatch:
    """By way of a struct, since a batch without columns has no other way to tell its number of rows."""
    rows = pa.Array.from_buffers(pa.struct(list(schema)), n, [None], children=arrays)
    return pa.RecordBatch.from_struct_array(rows)


def _open(payloads: pa.BinaryArray | pa.LargeBinaryArray) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Where each payload begins in the data, and the last one ends; and the data."""
    n, offset = len(payloads), payloads.offset
    _, edges, data = payloads.buffers()
    kind = np.int64 if pa.types.is_large_binary(payloads.type) else np.int32
    if n == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    positions = np.frombuffer(edges, kind, n + 1, offset * np.dtype(kind).itemsize).astype(np.int64)
    return positions, np.frombuffer(data or b"", np.uint8)
