"""Decodes messages into trades and dead letters: the header, the Avro record, the rules; in whole batches.

Delivery guarantee: each message is in exactly one of the two results. A pure function of the messages and of the
schemas that their ids name.
"""

from collections.abc import Collection
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.exchange import Exchange
from k2flow.layers import DLQ, SILVER
from k2flow.trades.messages import HEADER_BYTES, MessageBatch, header_detail, read_headers
from k2flow.trades.reasons import Reason
from k2flow.trades.record_decoder import DecodedRecords, Defect, RecordDecoder
from k2flow.trades.registry import Schemas
from k2flow.trades.registry_lookup import UnknownSchemaError
from k2flow.trades.unknown_fields import UnknownFields
from k2flow.trades.validate import KAFKA_TIME, Validator, int64_times

_REASON_OF_DEFECT = np.array([Reason[d.name] if d else Reason.VALID for d in sorted(Defect)], np.uint8)
_WHOLE_BATCH_SHARE = 0.9
"""If this share of a batch uses one schema, decode the whole batch with it: copying the share out costs more."""
_MAX_CHARACTERS = 200  # of a value in the text of a dead letter; longer ones are cut
_MAX_DETAIL = 2_000  # characters of the whole text: a schema or a registry may be quoted in it
MESSAGE_ID = ("message_id",)  # the columns that name a message
Ints = npt.NDArray[np.int64]
Reasons = npt.NDArray[np.uint8]


@dataclass(frozen=True, kw_only=True)
class DecodedBatch:
    """The two results of a batch of messages. Both stand for all its offsets."""

    trades: MessageBatch
    dead_letters: MessageBatch


@dataclass(frozen=True, kw_only=True)
class _DecodedPart:
    rows: Ints  # their numbers in the batch
    decoder: RecordDecoder
    records: DecodedRecords  # one per row
    has_schema: npt.NDArray[np.bool_]  # rows of the decoder's schema; the others only lie in between


class TradeDecoder:
    """Decodes the messages of one exchange's topic into rows of Silver and of its dead-letter table."""

    def __init__(self, exchange: Exchange, schemas: Schemas) -> None:
        self._schemas = schemas
        self._validator = Validator(exchange)
        self._unknown = UnknownFields(exchange)
        self._topic = exchange.settings.topic
        self._silver = SILVER.arrow_schema
        self._dlq = DLQ.arrow_schema

    def decode(self, messages: MessageBatch) -> DecodedBatch:
        """Decode n messages (rows of MESSAGE_SCHEMA): trades by their time, dead letters in the order of the messages.

        If the registry does not answer, wait for it. Raises RegistryError if the flow is stopped meanwhile.
        """
        payloads = messages.rows.column("value")
        reasons, ids = read_headers(payloads)
        parts, details = self._decode_parts(messages, reasons, ids)
        kafka_time = messages.rows.column("timestamp")
        for part in parts:
            self._find_reasons(part, kafka_time, reasons, details)
        rows = np.flatnonzero(reasons)
        bad = messages.filter(reasons != Reason.VALID)
        dead_letters = replace(bad, rows=self._dead_letters(bad, rows, reasons, ids, details))
        return DecodedBatch(trades=self._trades(parts, reasons, messages), dead_letters=dead_letters)

    def identify(self, messages: MessageBatch) -> pa.RecordBatch:
        """Return the column `message_id` of n messages, valid or not; null for an unreadable message.

        Raises RegistryError, as `decode`.
        """
        payloads = messages.rows.column("value")
        reasons, ids = read_headers(payloads)
        parts, _ = self._decode_parts(messages, reasons, ids)
        rows = [np.zeros(0, np.int64)]
        batches = [pa.RecordBatch.from_pylist([], self._silver).select(MESSAGE_ID)]
        for part in parts:
            whole = np.flatnonzero(part.has_schema & (part.records.defect == 0))
            identities = part.records.batch.take(pa.array(whole)).select(MESSAGE_ID)
            batches.append(identities.cast(batches[0].schema))
            rows.append(part.rows[whole])
        at = np.full(len(payloads), -1)
        numbers = np.concatenate(rows)
        at[numbers] = np.arange(len(numbers))
        return pa.concat_batches(batches).take(pa.array(at, mask=at < 0))

    def _decode_parts(
        self, messages: MessageBatch, reasons: Reasons, ids: Ints
    ) -> tuple[list[_DecodedPart], dict[int, str]]:
        """Decode the records of each schema id together. Return the details of rows with an unknown id by number."""
        parts: list[_DecodedPart] = []
        payloads, readable = messages.rows.column("value"), reasons == Reason.VALID
        in_batch = np.unique(ids[readable]).tolist()
        found = self._schemas.decoders(in_batch, lambda wanted: self._first_of(messages, wanted, ids, readable))
        unknown = {}
        for schema_id, decoder in found.items():
            if isinstance(decoder, UnknownSchemaError):
                unknown[schema_id] = str(decoder)
                continue
            self._unknown.log_once(schema_id, decoder)
            parts.append(_decode_part(decoder, payloads, np.flatnonzero(readable & (ids == schema_id))))
        rows = np.flatnonzero(readable & np.isin(ids, list(unknown))) if unknown else np.zeros(0, np.int64)
        reasons[rows] = Reason.UNKNOWN_SCHEMA
        return parts, {row: unknown[i] for row, i in zip(rows.tolist(), ids[rows].tolist(), strict=True)}

    def _first_of(
        self, messages: MessageBatch, schema_ids: Collection[int], ids: Ints, readable: npt.NDArray[np.bool_]
    ) -> str:
        """Return topic, partition and offset of the first readable message that has one of some schema ids."""
        first = np.flatnonzero(readable & np.isin(ids, list(schema_ids)))[0]
        return f"{self._topic}[{messages.partition[first]}] offset {messages.offset[first]}"

    def _find_reasons(
        self, part: _DecodedPart, kafka_time: pa.TimestampArray, reasons: Reasons, details: dict[int, str]
    ) -> None:
        """Set the reasons and details of one part's rows, for defects in their bytes and the rules they break."""
        of_part = _REASON_OF_DEFECT[part.records.defect]
        times = kafka_time if len(part.rows) == len(kafka_time) else kafka_time.take(pa.array(part.rows))
        self._validator.check(part.records.batch, times, of_part)
        reasons[part.rows[part.has_schema]] = of_part[part.has_schema]
        defective = part.has_schema & (part.records.defect != 0)
        for i in np.flatnonzero(defective).tolist():  # one by one, since each has a text of its own
            details[int(part.rows[i])] = part.records.detail(i)
        invalid = np.flatnonzero(part.has_schema & (of_part != 0) & ~defective)
        for number in np.unique(of_part[invalid]).tolist():
            these = invalid[of_part[invalid] == number]
            texts = _rule_details(part.records.batch, these, self._validator.rule(number).columns, times)
            details.update(zip(part.rows[these].tolist(), texts, strict=True))

    def _trades(self, parts: list[_DecodedPart], reasons: Reasons, messages: MessageBatch) -> MessageBatch:
        """Return the valid rows of all parts, sorted by time, as Gold's files need them."""
        batches, rows = [pa.RecordBatch.from_pylist([], self._silver)], [np.zeros(0, np.int64)]
        for part in parts:
            valid = np.flatnonzero((reasons[part.rows] == Reason.VALID) & part.has_schema)
            valid = valid[np.argsort(int64_times(part.records.batch.column("timestamp"))[valid], kind="stable")]
            batches.append(self._silver_rows(part, pa.array(valid)))
            rows.append(part.rows[valid])
        # A single part, which is usual, needs no copy.
        trades = batches[-1] if len(parts) == 1 else pa.concat_batches(batches)
        numbers = np.concatenate(rows)
        if len(parts) > 1:
            order = np.lexsort((numbers, int64_times(trades.column("timestamp"))))
            trades, numbers = trades.take(pa.array(order)), numbers[order]
        return replace(messages, rows=trades, partition=messages.partition[numbers], offset=messages.offset[numbers])

    def _silver_rows(self, part: _DecodedPart, rows: pa.Array) -> pa.RecordBatch:
        """Return the trades of `rows` (numbers in the part) with Silver's columns."""
        batch = part.records.batch.take(rows)
        columns = {name: batch.column(name) for name in batch.schema.names}
        columns["exchange_date"] = columns["timestamp"].cast(pa.date32())
        unknown = [column.take(rows) for column in part.records.unknown]
        columns["vendor_data"] = self._unknown.add(part.decoder, columns["vendor_data"], unknown)
        in_order = [columns[field.name].cast(field.type) for field in self._silver]
        return pa.RecordBatch.from_arrays(in_order, schema=self._silver)

    def _dead_letters(
        self, bad: MessageBatch, rows: Ints, reasons: Reasons, ids: Ints, details: dict[int, str]
    ) -> pa.RecordBatch:
        """Return the rows of the dead-letter table for the bad messages, whose numbers in the batch are `rows`."""
        n, now = len(rows), datetime.now(UTC)
        numbers = reasons[rows]
        without_id = (numbers == Reason.NULL_PAYLOAD) | (numbers == Reason.BAD_MAGIC)
        payloads = bad.rows.column("value")
        texts = [_detail(details.get(row) or _header_detail(bad, i)) for i, row in enumerate(rows.tolist())]
        distinct, which = np.unique(numbers, return_inverse=True)
        codes = pa.array([self._code(number) for number in distinct.tolist()], pa.string())
        columns = {
            "topic": pa.repeat(self._topic, n),
            "partition": pa.array(bad.partition),
            "offset": pa.array(bad.offset),
            "kafka_timestamp": bad.rows.column("timestamp"),
            "payload": payloads,
            "schema_id": pa.array(ids[rows].astype(np.uint32).view(np.int32), mask=without_id),
            "reason": codes.take(pa.array(which)),
            "detail": pa.array(texts, pa.string()),
            "failed_at": pa.repeat(pa.scalar(now, pa.timestamp("us", "UTC")), n),
            "failed_date": pa.repeat(pa.scalar(now.date(), pa.date32()), n),
        }
        return pa.RecordBatch.from_arrays([columns[field.name] for field in self._dlq], schema=self._dlq)

    def _code(self, number: int) -> str:
        known = Reason._value2member_map_.get(number)
        return known.code if isinstance(known, Reason) else self._validator.rule(number).reason


def _decode_part(decoder: RecordDecoder, payloads: pa.BinaryArray, rows: Ints) -> _DecodedPart:
    """Decode the payloads at `rows`; all payloads, if most are there."""
    has_schema = np.zeros(len(payloads), np.bool_)
    has_schema[rows] = True
    if len(rows) < len(payloads) * _WHOLE_BATCH_SHARE:
        payloads, has_schema = payloads.take(pa.array(rows)), has_schema[rows]
    else:
        rows = np.arange(len(payloads))
    records = decoder.decode(payloads, HEADER_BYTES)
    return _DecodedPart(rows=rows, decoder=decoder, records=records, has_schema=has_schema)


def _rule_details(
    batch: pa.RecordBatch, rows: npt.NDArray[np.int64], columns: tuple[str, ...], kafka_time: pa.TimestampArray
) -> list[str]:
    """Return the values of `columns` in m rows, as `name = value`; times as numbers, since they may be no date."""
    index = pa.array(rows)
    times = _kafka_times(kafka_time.take(index))
    parts = [
        times if name == KAFKA_TIME else [f"{name} = {text}" for text in _texts(batch.column(name).take(index))]
        for name in columns
    ]
    return [", ".join(of_row) for of_row in zip(*parts, strict=True)]


def _kafka_times(times: pa.TimestampArray) -> list[str]:
    known = times.cast(pa.int64()).to_pylist()
    return ["no usable Kafka timestamp" if us is None else f"Kafka timestamp = {us} us" for us in known]


def _header_detail(messages: MessageBatch, i: int) -> str:
    at = int(messages.partition[i]), int(messages.offset[i])
    return header_detail(messages.rows.column("value")[i], messages.header_details.get(at))


def _detail(text: str) -> str:
    """Return the text of a dead letter, cut, in characters that UTF-8 can encode."""
    cut = text if len(text) <= _MAX_DETAIL else f"{text[:_MAX_DETAIL]}... ({len(text)} characters)"
    return cut.encode("utf-8", "backslashreplace").decode()


def _texts(values: pa.Array) -> list[str]:
    if pa.types.is_timestamp(values.type):
        return [f"{us} us since 1970" for us in values.cast(pa.int64()).to_pylist()]
    show = repr if pa.types.is_string(values.type) else str
    texts = [show(value) for value in values.to_pylist()]
    return [t if len(t) <= _MAX_CHARACTERS else f"{t[:_MAX_CHARACTERS]}... ({len(t)} characters)" for t in texts]
