"""Computes the expected tables, one message at a time, with fastavro and plain Python, without code of k2flow."""

import copy
import io
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import fastavro

from k2flow.trades.schema import trade_schema
from tests import strict_avro

UNIX_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
YEAR_1, YEAR_10000 = -62_135_596_800_000_000, 253_402_300_800_000_000
FIRST_BLOCK = 1_230_940_800_000_000  # 2009-01-03, in microseconds since 1970
YEAR = 365 * 86_400_000_000


@dataclass(frozen=True)
class Message:
    """A Kafka message; `timestamp_ms` is None if it has no timestamp."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    timestamp_ms: int | None

    @property
    def usable_ms(self) -> int | None:
        """Its time as the tables keep it: None if it has none, or one that cannot be right."""
        return None if usable_time(self.timestamp_ms) is None else self.timestamp_ms


@dataclass
class Expected:
    """The expected tables of a topic. `dlq`: (partition, offset) -> (payload, reason); `silver`: rows as tuples."""

    bronze: dict[tuple[int, int], Message] = field(default_factory=dict)
    silver: Counter[tuple[Any, ...]] = field(default_factory=Counter)
    dlq: dict[tuple[int, int], tuple[bytes | None, str]] = field(default_factory=dict)

    @property
    def gold_ids(self) -> set[str]:
        return {row[0] for row in self.silver}


def expect(messages: Iterable[Message], code: str, schema_ids: tuple[int, ...] = (1,)) -> Expected:
    """Return the expected tables of a topic of the exchange `code`."""
    expected = Expected()
    for message in messages:
        at = (message.partition, message.offset)
        expected.bronze[at] = message
        reason, trade = classify(message, code, schema_ids)
        if reason:
            expected.dlq[at] = (message.value, reason)
        else:
            expected.silver[silver_row(trade)] += 1
    return expected


def classify(message: Message, code: str, schema_ids: tuple[int, ...]) -> tuple[str, dict[str, Any]]:
    """Return the reason and {} for a bad message, or an empty reason and the decoded trade."""
    value = message.value
    if value is None:
        return "null_payload", {}
    if len(value) < 5 or value[0] != 0:
        return "bad_magic", {}
    if int.from_bytes(value[1:5], "big") not in schema_ids:
        return "unknown_schema", {}
    reason, trade = decode(value[5:])
    return (reason, {}) if reason else (broken_rule(trade, message.timestamp_ms, code), trade)


def _plain_times(schema: dict[str, Any]) -> dict[str, Any]:
    """Return TradeV2 with times as plain numbers, because fastavro decodes to datetimes, which end at the year 9999."""
    plain = copy.deepcopy(schema)
    for each in plain["fields"]:
        if isinstance(each["type"], dict) and each["type"].get("logicalType") == "timestamp-micros":
            each["type"] = "long"
    return plain


SCHEMA = fastavro.parse_schema(_plain_times(trade_schema()))


def decode(record: bytes) -> tuple[str, dict[str, Any]]:
    """Return the defect in the bytes and {}, or an empty defect and the trade of fastavro."""
    if reason := strict_avro.defect(record):
        return reason, {}
    stream = io.BytesIO(record)
    trade: dict[str, Any] = fastavro.schemaless_reader(stream, SCHEMA, None)  # type: ignore[assignment, arg-type]
    return "", trade


def usable_time(kafka_ms: int | None) -> int | None:
    """Return Kafka's time in microseconds, None if the message has none or one that cannot be right."""
    if kafka_ms is None or not FIRST_BLOCK <= kafka_ms * 1000 < YEAR_10000:
        return None
    return kafka_ms * 1000


def broken_rule(trade: dict[str, Any], kafka_ms: int | None, code: str) -> str:
    """Return the first rule that a decoded trade breaks, or an empty string."""
    time, received, kafka = trade["timestamp"], trade["ingestion_timestamp"], usable_time(kafka_ms)
    rules = [
        ("message_id_required", not trade["message_id"].strip()),
        ("symbol_required", not trade["symbol"].strip()),
        ("trade_id_required", not trade["trade_id"].strip()),
        ("currency_required", not trade["currency"].strip()),
        ("price_must_be_positive", trade["price"] <= 0),
        ("quantity_must_be_positive", trade["quantity"] <= 0),
        ("invalid_side", trade["side"] not in ("BUY", "SELL")),
        ("wrong_exchange", trade["exchange"] != code),
        ("invalid_asset_class", trade["asset_class"] != "crypto"),
        ("timestamp_out_of_range", not all(YEAR_1 <= t < YEAR_10000 for t in (time, received))),
        ("timestamp_in_future", kafka is not None and time - kafka > 60_000_000),
        ("timestamp_too_old", kafka is not None and kafka - time > YEAR),
        ("timestamp_implausible", kafka is None and (time < FIRST_BLOCK or abs(time - received) > YEAR)),
        ("ingestion_timestamp_implausible", kafka is not None and abs(received - kafka) > YEAR),
    ]
    return next((name for name, broken in rules if broken), "")


def silver_row(trade: dict[str, Any]) -> tuple[Any, ...]:
    """Convert a trade to a hashable row of Silver's 16 columns."""
    time = UNIX_EPOCH + timedelta(microseconds=trade["timestamp"])
    return (
        trade["message_id"],
        trade["trade_id"],
        trade["symbol"],
        trade["exchange"],
        trade["asset_class"],
        time,
        Decimal(trade["price"]),
        Decimal(trade["quantity"]),
        trade["currency"],
        trade["side"],
        tuple(trade["trade_conditions"]),
        trade["source_sequence"],
        UNIX_EPOCH + timedelta(microseconds=trade["ingestion_timestamp"]),
        trade["platform_sequence"],
        frozen_map(trade["vendor_data"]),
        time.date(),
    )


def frozen_map(pairs: Any) -> tuple[tuple[str, str], ...] | None:
    """Convert a map, a list of pairs (Arrow's form of a map) or None to a hashable value."""
    if pairs is None:
        return None
    return tuple(sorted(pairs.items() if isinstance(pairs, dict) else pairs))
