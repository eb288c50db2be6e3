"""Trades as Kafka messages, and checks of their decoding."""

import io
import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa

from k2flow.exchange import Exchange, find_exchange
from k2flow.layers import DLQ, SILVER
from k2flow.trades.decode import DecodedBatch, TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.registry import FixedSchemas, Schemas
from k2flow.trades.schema import trade_schema

NOW_US = 1_764_000_000_000_000
TRADE: dict[str, Any] = {
    "message_id": "6f1c8a52-6a0b-4f0c-9d2e-0c7d7f1f6f10",
    "trade_id": "BINANCE-1",
    "symbol": "BTCUSDT",
    "exchange": "BINANCE",
    "asset_class": "crypto",
    "timestamp": NOW_US,
    "price": Decimal("64000.50000000"),
    "quantity": Decimal("0.00100000"),
    "currency": "USDT",
    "side": "BUY",
    "trade_conditions": ["T"],
    "source_sequence": 7,
    "ingestion_timestamp": NOW_US + 5,
    "platform_sequence": None,
    "vendor_data": {"b": "1", "a": "2"},
}
BINANCE = find_exchange("binance")


def plain(schema: Any) -> Any:
    """Return a schema without the logical type of its times: datetimes end at the year 9999."""
    if isinstance(schema, dict):
        kept = {key: plain(value) for key, value in schema.items()}
        return "long" if schema.get("logicalType") == "timestamp-micros" else kept
    return [plain(part) for part in schema] if isinstance(schema, list) else schema


def encoded(schema: Any, record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(plain(schema)), record)
    return stream.getvalue()


def value(schema_id: int = 1, **changed: Any) -> bytes:
    """Return the Kafka value of a good trade with changed fields."""
    return b"\0" + schema_id.to_bytes(4, "big") + encoded(trade_schema(), {**TRADE, **changed})


def messages(values: Sequence[bytes | None], kafka_us: Sequence[int | None] | None = None) -> MessageBatch:
    """Return messages of the partitions 0, 1, 2, 0, ... at the offsets 100, 101, ..."""
    n = len(values)
    kafka = pa.array(kafka_us or [NOW_US] * n, pa.int64()).cast(pa.timestamp("us", "UTC"))
    rows = pa.RecordBatch.from_arrays(
        [pa.nulls(n, pa.binary()), pa.array(values, pa.binary()), kafka], schema=MESSAGE_SCHEMA
    )
    partition, offset = np.arange(n, dtype=np.int32) % 3, 100 + np.arange(n, dtype=np.int64)
    return MessageBatch(rows, partition, offset, [(p, 100, 100 + n) for p in range(3)])


def decode(
    values: Sequence[bytes | None],
    schemas: Schemas | None = None,
    exchange: Exchange = BINANCE,
    kafka_us: Sequence[int | None] | None = None,
) -> DecodedBatch:
    """Decode, and assert what holds for every batch: each message is in one result, with its partition and offset."""
    given_ = messages(values, kafka_us)
    decoded = TradeDecoder(exchange, schemas or FixedSchemas((1,))).decode(given_)
    trades, failures = decoded.trades, decoded.dead_letters
    for part in (trades, failures):
        part.rows.validate(full=True)
        assert part.rows.num_rows == len(part.partition) == len(part.offset)
        assert part.offsets == given_.offsets
    assert sorted([*trades.offset.tolist(), *failures.offset.tolist()]) == given_.offset.tolist()
    for part in (trades, failures):
        assert part.partition.tolist() == ((part.offset - 100) % 3).tolist()
    assert trades.rows.schema == SILVER.arrow_schema
    assert failures.rows.schema == DLQ.arrow_schema
    assert failures.offset.tolist() == sorted(failures.offset.tolist())
    assert failures.rows["partition"].to_pylist() == failures.partition.tolist()
    assert failures.rows["offset"].to_pylist() == failures.offset.tolist()
    at = trades.rows["timestamp"].cast(pa.int64()).to_pylist()
    assert at == sorted(at)
    for row in failures.rows.to_pylist():
        assert row["payload"] == values[row["offset"] - 100]
        assert row["topic"] == exchange.settings.topic
        assert row["detail"]
        assert row["failed_date"] == row["failed_at"].date()
    return decoded


def reasons(decoded: DecodedBatch) -> dict[int, str]:
    """Return the reason of each dead letter, by its index in the batch."""
    return {row["offset"] - 100: row["reason"] for row in decoded.dead_letters.rows.to_pylist()}


def details(decoded: DecodedBatch) -> list[str]:
    found: list[str] = decoded.dead_letters.rows["detail"].to_pylist()
    return found


def ids(decoded: DecodedBatch) -> list[Any]:
    found: list[Any] = decoded.dead_letters.rows["schema_id"].to_pylist()
    return found


def evolved(**changed: Any) -> dict[str, Any]:
    """Return a writer's variant of TradeV2: changes by field name, None for a field that it lacks."""
    schema = json.loads(json.dumps(trade_schema()))
    schema["fields"] = [{**f, **(changed.get(f["name"]) or {})} for f in schema["fields"] if changed.get(f["name"], f)]
    return schema  # type: ignore[no-any-return]


def written(schema: Any, schema_id: int, **changed: Any) -> bytes:
    """Return a trade encoded with a writer's schema."""
    names = [field["name"] for field in schema["fields"]]
    record = {name: part for name, part in {**TRADE, **changed}.items() if name in names}
    return b"\0" + schema_id.to_bytes(4, "big") + encoded(schema, record)
