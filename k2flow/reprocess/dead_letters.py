"""Dead letters, for people: their number by reason, and the defect of one, byte by byte."""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from io import BytesIO
from typing import Any

import duckdb
import fastavro
import numpy as np
import pyarrow as pa
from fastavro.schema import SchemaParseException

from k2flow.avro.decoder import AvroDecoder
from k2flow.errors import QueryError
from k2flow.exchange import Exchange
from k2flow.query.sql import query_errors
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import HEADER_BYTES, MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.registry import Schemas
from k2flow.trades.registry_lookup import UnknownSchemaError

_UNREADABLE = (
    *(ValueError, EOFError, IndexError, OverflowError, TypeError, KeyError, AttributeError),
    *(SchemaParseException, RecursionError),  # fastavro refuses more schemas than the decoder
)


@dataclass(frozen=True)
class ReasonCount:
    """The dead letters of one exchange and reason: their number, the first and last failure, and the last detail."""

    exchange: str
    reason: str
    count: int
    first: datetime
    last: datetime
    example: str


@dataclass(frozen=True)
class DeadLetter:
    """One row of a dead-letter table."""

    topic: str
    partition: int
    offset: int
    kafka_timestamp: datetime | None
    payload: bytes | None
    schema_id: int | None
    reason: str
    detail: str
    failed_at: datetime


@dataclass(frozen=True)
class Explanation:
    """A dead letter as today's code reads it.

    `fields` before the defect: (name, value, first byte, byte after the last). `position`: the byte of the defect, None
    if all can be read. `reason` and `detail` are today's: None and empty for a valid trade.
    """

    fields: Sequence[tuple[str, Any, int, int]]
    position: int | None
    reason: str | None
    detail: str


def count_by_reason(connection: duckdb.DuckDBPyConnection, exchanges: Sequence[Exchange]) -> list[ReasonCount]:
    """Return the dead letters by exchange and reason, most first. Raises QueryError."""
    found = []
    with query_errors():
        for exchange in exchanges:
            rows = connection.sql(
                "SELECT reason, count(*), min(failed_at), max(failed_at), arg_max(detail, failed_at) "
                f"FROM {exchange.dlq} GROUP BY reason ORDER BY 2 DESC, 1"
            ).fetchall()
            found += [ReasonCount(exchange.name, *row) for row in rows]
    return found


def find_dead_letters(
    connection: duckdb.DuckDBPyConnection, exchange: Exchange, partition: int, offset: int
) -> list[DeadLetter]:
    """Return the dead letter of an offset: one, or one for each topic that had the offset. Raises QueryError."""
    with query_errors():
        rows = connection.execute(
            'SELECT topic, "partition", "offset", kafka_timestamp, payload, schema_id, reason, detail, failed_at '
            f'FROM {exchange.dlq} WHERE "partition" = ? AND "offset" = ? ORDER BY failed_at',
            [partition, offset],
        ).fetchall()
    if not rows:
        raise QueryError(
            f"{exchange.dlq} has no row of partition {partition}, offset {offset}: `k2flow query` shows which it has"
        )
    return [DeadLetter(*row) for row in rows]


def explain(letter: DeadLetter, exchange: Exchange, schemas: Schemas) -> Explanation:
    """Explain a dead letter by today's schemas and rules. Raises RegistryError."""
    reason, detail = _decode(letter, exchange, schemas)
    if letter.payload is None or letter.schema_id is None:
        return Explanation([], 0 if letter.payload else None, reason, detail)
    try:
        decoder = schemas.decoder(letter.schema_id % 2**32)
    except UnknownSchemaError:
        return Explanation([], None, reason, detail)
    position = int(decoder.decode(pa.array([letter.payload], pa.binary()), HEADER_BYTES).position[0])
    end = len(letter.payload) if position < 0 else position
    schema = decoder.writer_schema if isinstance(decoder, AvroDecoder) else None
    return Explanation(_readable(letter.payload, schema, end), None if position < 0 else position, reason, detail)


def _decode(letter: DeadLetter, exchange: Exchange, schemas: Schemas) -> tuple[str | None, str]:
    """Return today's reason, None for a valid trade, and detail."""
    columns = [
        pa.nulls(1, pa.binary()),
        pa.array([letter.payload], pa.binary()),
        pa.array([letter.kafka_timestamp], MESSAGE_SCHEMA.field("timestamp").type),
    ]
    rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
    where = [(letter.partition, letter.offset, letter.offset + 1)]
    message = MessageBatch(rows, np.array([letter.partition], np.int32), np.array([letter.offset]), where)
    failed = TradeDecoder(exchange, schemas).decode(message).dead_letters.rows.to_pylist()
    return (failed[0]["reason"], failed[0]["detail"]) if failed else (None, "")


def _readable(payload: bytes, schema: Any, end: int) -> list[tuple[str, Any, int, int]]:
    """Return the fields of a record that lie before byte `end`, as fastavro reads them."""
    with suppress(ValueError):  # the bare name of a type is not JSON
        schema = json.loads(schema) if isinstance(schema, str) else schema
    if not isinstance(schema, dict) or schema.get("type") != "record":
        return []
    found: list[tuple[str, Any, int, int]] = []
    fields: list[Any] = []
    at = HEADER_BYTES
    for field in schema["fields"]:
        for candidate in (field, _without_logical_types(field)):  # a time may be out of range
            beginning = {**schema, "fields": [*fields, candidate]}  # from the start: an earlier field may name a type
            stream = BytesIO(payload[HEADER_BYTES:])
            with suppress(*_UNREADABLE):
                record = fastavro.schemaless_reader(stream, beginning, None)
                break
        else:
            break  # the decoder has the position of the defect
        after = HEADER_BYTES + stream.tell()
        if after > end or not isinstance(record, dict):
            break
        fields.append(candidate)
        found.append((field["name"], record[field["name"]], at, after))
        at = after
    return found


def _without_logical_types(schema: Any) -> Any:
    if isinstance(schema, dict):
        return {key: _without_logical_types(value) for key, value in schema.items() if key != "logicalType"}
    return [_without_logical_types(each) for each in schema] if isinstance(schema, list) else schema


def hex_dump(payload: bytes, position: int | None, width: int = 16) -> list[str]:
    """Return lines of `width` bytes: offset, hexadecimal, characters; the byte at `position` in brackets."""
    lines = []
    for start in range(0, max(len(payload), 1), width):
        part = payload[start : start + width]
        digits = "".join(f"[{byte:02x}]" if start + i == position else f" {byte:02x} " for i, byte in enumerate(part))
        text = "".join(chr(byte) if 32 <= byte < 127 else "." for byte in part)
        lines.append(f"{start:6d}  {digits:<{width * 4}}  {text}")
    if position is not None and position >= len(payload):
        lines.append(f"{len(payload):6d}  [end]")
    return lines
