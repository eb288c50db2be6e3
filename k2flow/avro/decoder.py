"""Decodes batches of Avro records to Arrow, all records at once; a bad record does not affect the others.

A pure function of the bytes and the schemas. The binary encoding is that of the Avro 1.12 specification. Where the
specification leaves room or decoders are often lax, these rules apply:

    rejected    a boolean byte other than 0 and 1; a varint of more than 64 bits; an int of more than 32 bits;
                a negative enum index or union branch; a decimal of more digits than its precision;
                a text that is no decimal number, or one that the decimal cannot hold exactly;
                a time of day outside the day; a UUID not in the format of RFC 4122;
                more than 1024 items without bytes (null, an empty record) in one array
    accepted    varints and decimals of more bytes than needed; any date or timestamp;
                duplicate keys in a map (the last entry wins); a block of items with a wrong size in bytes
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.columns import StructColumn
from k2flow.avro.cursor import LEADING_ZEROS, TRAILING_ZEROS, Block, Ints, Lanes
from k2flow.avro.defect_log import DefectLog
from k2flow.avro.parse import Json, ParsedSchema, parse
from k2flow.avro.plan import Node, Record
from k2flow.avro.resolve import resolve
from k2flow.avro.skip import Skip
from k2flow.avro.texts import to_texts
from k2flow.records import DecodedRecords, Defect

_BLOCK_ROWS = 1 << 14
_BLOCK_BYTES = 1 << 22
_MAX_RECORD_BYTES = 1 << 30
_MAX_REASONS = 20  # in a text


@dataclass(frozen=True)
class WriterOnlyField:
    """A field of the writer's record that the reader's lacks, of the type `schema`; `names` defines its named types."""

    name: str
    schema: Json
    names: ParsedSchema

    def to_texts(self, column: pa.Array) -> pa.StringArray:
        """Convert n values of this field to text, null to null; see `texts.to_texts`."""
        return to_texts(self.schema, self.names, column)


class AvroDecoder:
    """Decodes records of one writer's schema into the types of the reader's schema.

    Implements `trades.record_decoder.RecordDecoder`. `schema` is the Arrow schema of the batches, with the types of
    schemas.py: a column per field of the record, or one column `value` if the Avro schema is not a record. Fields that
    only the writer's record has are checked and dropped. With `keep_unknown` they are returned beside the batch as the
    writer's types, and `unknown_fields` lists them. `left_out` says which of them cannot be kept, and why; usually
    none. Those of inner records are always dropped. Raises SchemaError if a schema is not valid, if a type that the
    reader needs is recursive or too large, or if the two are incompatible.
    """

    def __init__(self, writer_schema: Json, reader_schema: Json | None = None, keep_unknown: bool = False) -> None:
        """Compile the plan; a schema is JSON text or parsed JSON."""
        self.writer_schema = writer_schema
        self.unknown_fields: tuple[WriterOnlyField, ...] = ()
        writer = parse(writer_schema)
        self._plan = resolve(writer, writer if reader_schema is None else parse(reader_schema))
        self._max_overread = self._plan.max_overread
        self.left_out = _left_out(self._plan)
        kind = self._plan.type
        self.schema = pa.schema(list(kind) if isinstance(self._plan, Record) else [("value", kind)])
        if keep_unknown and isinstance(self._plan, Record):
            self._plan, self.unknown_fields = _keep_dropped_fields(self._plan, writer)
        self._unknown_schema = pa.schema(list(self._plan.type)[len(kind) :] if self.unknown_fields else [])

    def decode(self, payloads: pa.BinaryArray | pa.LargeBinaryArray, skip: int = 0) -> DecodedRecords:
        """Decode n payloads; `skip` is the number of bytes to skip before each record. A null is an empty payload.

        Raises ValueError if a payload has more than 1 GiB.
        """
        n = len(payloads)
        defects = DefectLog(n)
        edges, data = _offsets_and_data(payloads)
        parts = [self._decode_block(block, lanes) for block, lanes in self._blocks(edges, data, skip, defects)]
        if not parts:
            arrays = [pa.array([], field.type) for field in (*self.schema, *self._unknown_schema)]
        elif len(parts) == 1:
            arrays = parts[0]
        else:
            arrays = [pa.concat_arrays(pieces) for pieces in zip(*parts, strict=True)]
        known = len(self.schema)
        # From a struct array, because a batch without columns has no other way to keep its length.
        rows = pa.Array.from_buffers(pa.struct(list(self.schema)), n, [None], children=arrays[:known])
        return DecodedRecords(
            batch=pa.RecordBatch.from_struct_array(rows),
            unknown=arrays[known:],
            defect=defects.defect,
            position=defects.position,
            detail=defects.detail,
        )

    def _blocks(
        self, edges: Ints, data: npt.NDArray[np.uint8], skip: int, defects: DefectLog
    ) -> Iterator[tuple[Block, Lanes]]:
        """Yield the payloads in blocks that stay in the CPU caches from the first field to the last."""
        n, first = len(edges) - 1, 0
        buffer = np.zeros(0, np.uint8)
        while first < n:
            fitting = int(np.searchsorted(edges, edges[first] + _BLOCK_BYTES, "right")) - 1
            last = min(max(fitting, first + 1), first + _BLOCK_ROWS, n)
            begin, end = int(edges[first]), int(edges[last])
            size = end - begin
            if size > _MAX_RECORD_BYTES:
                raise ValueError(f"a payload has {size} bytes, more than the limit of {_MAX_RECORD_BYTES}")
            padding_start = LEADING_ZEROS + size + 1  # a lane at the end of the block is still active
            needed = padding_start + self._max_overread + TRAILING_ZEROS
            if len(buffer) < needed:
                buffer = np.zeros(needed, np.uint8)
            buffer[LEADING_ZEROS : LEADING_ZEROS + size] = data[begin:end]
            buffer[LEADING_ZEROS + size :] = 0
            at = edges[first : last + 1] - (begin - LEADING_ZEROS)
            block = Block(buffer, padding_start, first, at[:-1], defects)
            yield block, Lanes(block, np.arange(first, last), np.minimum(at[:-1] + skip, at[1:]), at[1:].copy())
            first = last

    def _decode_block(self, block: Block, lanes: Lanes) -> list[pa.Array]:
        column = self._plan.read(lanes)
        left = lanes.end - lanes.pos
        trailing = left > 0
        text = "{0} trailing bytes from byte {at}"
        lanes.reject(trailing, Defect.TRAILING_BYTES, lanes.pos, "record", text, left)
        if isinstance(self._plan, Record) and isinstance(column, StructColumn):
            return column.children_to_arrow()
        return [column.to_arrow()]


def _left_out(plan: Node) -> str:
    """Return the reason of each root field that is only passed over."""
    reasons = [node.reason for node in plan.inner if isinstance(node, Skip)]
    more = len(reasons) - _MAX_REASONS
    return "; ".join(reasons[:_MAX_REASONS]) + (f"; and {more} more" if more > 0 else "")


def _keep_dropped_fields(plan: Record, writer: ParsedSchema) -> tuple[Record, tuple[WriterOnlyField, ...]]:
    """Return a plan that appends the fields that `plan` drops to its fields, and these fields in order."""
    unknown_here = [i for i, node in enumerate(plan.fields) if plan.places[i] is None and not isinstance(node, Skip)]
    fields = [(i, writer.root["fields"][i]) for i in unknown_here]
    places = list(plan.places)
    for place, (i, _) in enumerate(fields, len(plan.type)):
        places[i] = place
    kind = pa.struct([*plan.type, *(pa.field(field["name"], plan.fields[i].type) for i, field in fields)])
    unknown = tuple(WriterOnlyField(field["name"], field["type"], writer) for _, field in fields)
    return replace(plan, type=kind, places=places), unknown


def _offsets_and_data(payloads: pa.BinaryArray | pa.LargeBinaryArray) -> tuple[Ints, npt.NDArray[np.uint8]]:
    """Return the n + 1 offsets of the payloads in the data, and the data."""
    n, offset = len(payloads), payloads.offset
    _, edges, data = payloads.buffers()
    kind = np.int64 if pa.types.is_large_binary(payloads.type) else np.int32
    if n == 0:
        return np.zeros(1, np.int64), np.zeros(0, np.uint8)
    positions = np.frombuffer(edges, kind, n + 1, offset * np.dtype(kind).itemsize).astype(np.int64)
    return positions, np.frombuffer(data or b"", np.uint8)
