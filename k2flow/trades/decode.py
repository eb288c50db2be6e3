"""Messages into trades and failures: the header, the Avro record, the rules; in whole batches.

Delivery guarantee: each message is in exactly one of the two results. A pure function of the messages and of the
schemas their ids name.
"""

from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.exchange import Exchange
from k2flow.layers import DLQ, SILVER
from k2flow.trades.messages import MessageBatch
from k2flow.trades.reasons import Reason
from k2flow.trades.record_decoder import DecodedRecords, Defect, RecordDecoder
from k2flow.trades.registry import Schemas, UnknownSchemaError
from k2flow.trades.unknown_fields import UnknownFields
from k2flow.trades.validate import Validator

HEADER = 5
"""Bytes before the Avro record: 0x00 and the schema id, big-endian (Confluent's wire format)."""
_HEADER = np.dtype([("magic", "u1"), ("schema_id", ">u4")])

_REASON_OF_DEFECT = np.array([Reason[d.name] if d else Reason.VALID for d in sorted(Defect)], np.uint8)
_MOSTLY = 0.9
"""Where so many of a batch's payloads are of one schema, all are decoded by it: cheaper than to copy those out."""
_SHOWN_CHARACTERS = 200
IDENTITY = ["message_id", "timestamp"]


@dataclass(frozen=True)
class Decoded:
    """What came of a slice of messages; both parts stand for all its offsets."""

    trades: MessageBatch
    failures: MessageBatch


@dataclass(frozen=True)
class _Part:
    """The rows of a batch that one decoder decoded: their numbers in the batch, and what came of them.

    Rows that are not `own` it decoded only because they were in between: what came of them means nothing.
    """

    rows: npt.NDArray[np.int64]
    decoder: RecordDecoder
    decoded: DecodedRecords
    own: npt.NDArray[np.bool_]


class TradeDecoder:
    """Turns the messages of one exchange's topic into trades of Silver's columns and rows of its dead-letter table."""

    def __init__(self, exchange: Exchange, schemas: Schemas) -> None:
        self._schemas = schemas
        self._validator = Validator(exchange)
        self._unknown = UnknownFields(exchange)
        self._topic = exchange.settings.topic
        self._silver = SILVER.arrow_schema
        self._dlq = DLQ.arrow_schema

    def decode(self, messages: MessageBatch) -> Decoded:
        """N messages (rows of MESSAGE_SCHEMA) into trades, by their time, and failures, in the order of the messages.

        Where the registry is out of reach it waits; raises RegistryError if the flow is stopped meanwhile.
        """
        payloads = messages.rows.column("value")
        found, ids = _read_headers(payloads)
        parts, details = self._decode_parts(payloads, found, ids)
        kafka_time = messages.rows.column("timestamp")
        for part in parts:
            self._judge(part, kafka_time, found, details)
        rows = np.flatnonzero(found)
        bad = messages.filter(found != Reason.VALID)
        failures = bad.with_rows(self._failures(bad, rows, found, ids, details))
        return Decoded(self._trades(parts, found, messages), failures)

    def identify(self, messages: MessageBatch) -> pa.RecordBatch:
        """`message_id` and `timestamp` of n messages, whatever the rules say of them; null where they cannot be read.

        Raises RegistryError as `decode` does.
        """
        payloads = messages.rows.column("value")
        found, ids = _read_headers(payloads)
        parts, _ = self._decode_parts(payloads, found, ids)
        rows = [np.zeros(0, np.int64)]
        batches = [_empty(self._silver).select(IDENTITY)]
        for part in parts:
            whole = np.flatnonzero(part.own & (part.decoded.defect == 0))
            read = part.decoded.batch.take(pa.array(whole)).select(IDENTITY)
            batches.append(read.cast(batches[0].schema))
            rows.append(part.rows[whole])
        at = np.full(len(payloads), -1)
        numbers = np.concatenate(rows)
        at[numbers] = np.arange(len(numbers))
        return pa.concat_batches(batches).take(pa.array(at, mask=at < 0))

    def _decode_parts(
        self, payloads: pa.BinaryArray, found: npt.NDArray[np.uint8], ids: npt.NDArray[np.int64]
    ) -> tuple[list[_Part], dict[int, str]]:
        """The records of each schema id, decoded together. `details` tells of rows whose id is unknown."""
        parts, details = [], {}
        readable = found == Reason.VALID
        for schema_id in np.unique(ids[readable]).tolist():
            rows = np.flatnonzero(readable & (ids == schema_id))
            try:
                decoder = self._schemas.decoder(schema_id)
            except UnknownSchemaError as error:
                found[rows] = Reason.UNKNOWN_SCHEMA
                details.update(dict.fromkeys(rows.tolist(), str(error)))
                continue
            self._unknown.say(schema_id, decoder)
            parts.append(_part(decoder, payloads, rows))
        return parts, details

    def _judge(
        self,
        part: _Part,
        kafka_time: pa.TimestampArray,
        found: npt.NDArray[np.uint8],
        details: dict[int, str],
    ) -> None:
        """Sets `found` and `details` for the defects in the bytes of one part and the rules that its values break."""
        broken = _REASON_OF_DEFECT[part.decoded.defect]
        times = kafka_time if len(part.rows) == len(kafka_time) else kafka_time.take(pa.array(part.rows))
        self._validator.check(part.decoded.batch, times, broken)
        found[part.rows[part.own]] = broken[part.own]
        defective = part.own & (part.decoded.defect != 0)
        for i in np.flatnonzero(defective).tolist():  # one by one, since each has a text of its own
            details[int(part.rows[i])] = part.decoded.detail(i)
        of_rules = np.flatnonzero(part.own & (broken != 0) & ~defective)
        for number in np.unique(broken[of_rules]).tolist():
            these = of_rules[broken[of_rules] == number]
            texts = _shown(part.decoded.batch, these, self._validator.broken(number).columns, times)
            details.update(zip(part.rows[these].tolist(), texts, strict=True))

    def _trades(self, parts: list[_Part], found: npt.NDArray[np.uint8], messages: MessageBatch) -> MessageBatch:
        """The good rows of all parts, in the order of time, since Gold's files want it."""
        batches, rows = [_empty(self._silver)], [np.zeros(0, np.int64)]
        for part in parts:
            own = np.flatnonzero((found[part.rows] == Reason.VALID) & part.own)
            own = own[np.argsort(_times(part.decoded.batch)[own], kind="stable")]
            batches.append(self._silver_rows(part, pa.array(own)))
            rows.append(part.rows[own])
        trades, numbers = pa.concat_batches(batches), np.concatenate(rows)
        if len(parts) > 1:
            order = np.lexsort((numbers, _times(trades)))
            trades, numbers = trades.take(pa.array(order)), numbers[order]
        return replace(messages, rows=trades, partition=messages.partition[numbers], offset=messages.offset[numbers])

    def _silver_rows(self, part: _Part, rows: pa.Array) -> pa.RecordBatch:
        """The trades of `rows` (numbers in the part) with Silver's columns."""
        batch = part.decoded.batch.take(rows)
        found = {name: batch.column(name) for name in batch.schema.names}
        found["exchange_date"] = found["timestamp"].cast(pa.date32())
        unknown = [column.take(rows) for column in part.decoded.unknown]
        found["vendor_data"] = self._unknown.kept(part.decoder, found["vendor_data"], unknown)
        columns = [found[field.name].cast(field.type) for field in self._silver]
        return pa.RecordBatch.from_arrays(columns, schema=self._silver)

    def _failures(
        self,
        bad: MessageBatch,
        rows: npt.NDArray[np.int64],
        found: npt.NDArray[np.uint8],
        ids: npt.NDArray[np.int64],
        details: dict[int, str],
    ) -> pa.RecordBatch:
        n, now = len(rows), datetime.now(UTC)
        numbers = found[rows]
        unread = (numbers == Reason.NULL_PAYLOAD) | (numbers == Reason.BAD_MAGIC)
        payloads = bad.rows.column("value")
        texts = [details.get(row) or _header_detail(payloads[i]) for i, row in enumerate(rows.tolist())]
        different, which = np.unique(numbers, return_inverse=True)
        reasons = pa.array([self._code(number) for number in different.tolist()], pa.string())
        columns = {
            "topic": pa.repeat(self._topic, n),
            "partition": pa.array(bad.partition),
            "offset": pa.array(bad.offset),
            "kafka_timestamp": bad.rows.column("timestamp"),
            "payload": payloads,
            "schema_id": pa.array(ids[rows].astype(np.uint32).view(np.int32), mask=unread),
            "reason": reasons.take(pa.array(which)),
            "detail": pa.array(texts, pa.string()),
            "failed_at": pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), n),
            "failed_date": pa.repeat(pa.scalar(now.date(), pa.date32()), n),
        }
        return pa.RecordBatch.from_arrays([columns[field.name] for field in self._dlq], schema=self._dlq)

    def _code(self, number: int) -> str:
        known = Reason._value2member_map_.get(number)
        return known.code if isinstance(known, Reason) else self._validator.broken(number).reason


def _part(decoder: RecordDecoder, payloads: pa.BinaryArray, rows: npt.NDArray[np.int64]) -> _Part:
    n = len(payloads)
    if len(rows) < n * _MOSTLY:
        return _Part(rows, decoder, decoder.decode(payloads.take(pa.array(rows)), HEADER), np.ones(len(rows), np.bool_))
    own = np.zeros(n, np.bool_)
    own[rows] = True
    return _Part(np.arange(n), decoder, decoder.decode(payloads, HEADER), own)


def _read_headers(payloads: pa.BinaryArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Of n payloads what is wrong with the header (NULL_PAYLOAD, BAD_MAGIC or 0), and the schema id."""
    n = len(payloads)
    found, ids = np.zeros(n, np.uint8), np.zeros(n, np.int64)
    edges = np.frombuffer(payloads.buffers()[1], np.int32, n + 1 + payloads.offset)[payloads.offset :]
    data = payloads.buffers()[2] or b""
    long = np.flatnonzero(np.diff(edges) >= HEADER)
    found[:] = Reason.BAD_MAGIC
    if len(long):
        # An item at every byte, so that one look-up copies all headers.
        every = np.ndarray((len(data) - HEADER + 1,), f"V{HEADER}", buffer=data, strides=(1,))
        header = every[edges[long]].view(_HEADER)
        readable = header["magic"] == 0
        found[long[readable]] = Reason.VALID
        ids[long] = np.where(readable, header["schema_id"], 0)
    if payloads.null_count:
        null = payloads.is_null().to_numpy(zero_copy_only=False)
        found[null], ids[null] = Reason.NULL_PAYLOAD, 0
    return found, ids


def _header_detail(payload: pa.BinaryScalar) -> str:
    """Why a header cannot be read."""
    if not payload.is_valid:
        return "the message has no value"
    value = payload.as_py()
    if len(value) < HEADER:
        return f"{len(value)} bytes, fewer than the {HEADER} of the header"
    return f"first byte 0x{value[0]:02x}, not 0x00"


def _shown(
    batch: pa.RecordBatch, rows: npt.NDArray[np.int64], columns: tuple[str, ...], kafka_time: pa.TimestampArray
) -> list[str]:
    """The values by which m rows broke a rule, `name = value`; times as numbers, since they may be no date at all."""
    index = pa.array(rows)
    parts = [[f"{name} = {text}" for text in _texts(batch.column(name).take(index))] for name in columns]
    texts = [", ".join(of_row) for of_row in zip(*parts, strict=True)]
    if columns == ("timestamp",):
        known = kafka_time.take(index).cast(pa.int64()).to_pylist()
        pairs = zip(texts, known, strict=True)
        texts = [text if us is None else f"{text}, Kafka timestamp = {us} us" for text, us in pairs]
    return texts


def _texts(values: pa.Array) -> list[str]:
    """M values as a dead-letter row shows them."""
    if pa.types.is_timestamp(values.type):
        return [f"{us} us since 1970" for us in values.cast(pa.int64()).to_pylist()]
    show = repr if pa.types.is_string(values.type) else str
    texts = [show(value) for value in values.to_pylist()]
    return [t if len(t) <= _SHOWN_CHARACTERS else f"{t[:_SHOWN_CHARACTERS]}... ({len(t)} characters)" for t in texts]


def _times(trades: pa.RecordBatch) -> npt.NDArray[np.int64]:
    numbers = trades.column("timestamp").cast(pa.int64())
    times: npt.NDArray[np.int64] = (numbers.fill_null(0) if numbers.null_count else numbers).to_numpy()
    return times


def _empty(schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in schema], schema=schema)
