"""A second record format through the `RecordDecoder` protocol: TradeV2 as JSON, without any Avro code."""

import json
from collections.abc import Sequence
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from k2flow.exchange import find_exchange
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.record_decoder import DecodedRecords, Defect, UnknownField
from k2flow.trades.registry import Schemas

NOW_US = 1_764_000_000_000_000
HEADER = b"\0\0\0\0\7"
TIME = pa.timestamp("us", "UTC")
TRADE_V2 = pa.schema(
    [
        ("message_id", pa.string()),
        ("trade_id", pa.string()),
        ("symbol", pa.string()),
        ("exchange", pa.string()),
        ("asset_class", pa.string()),
        ("timestamp", TIME),
        ("price", pa.decimal128(18, 8)),
        ("quantity", pa.decimal128(18, 8)),
        ("currency", pa.string()),
        ("side", pa.string()),
        ("trade_conditions", pa.list_(pa.string())),
        ("source_sequence", pa.int64()),
        ("ingestion_timestamp", TIME),
        ("platform_sequence", pa.int64()),
        ("vendor_data", pa.map_(pa.string(), pa.string())),
    ]
)
TRADE: dict[str, Any] = {
    "message_id": "m-1",
    "trade_id": "BINANCE-1",
    "symbol": "BTCUSDT",
    "exchange": "BINANCE",
    "asset_class": "crypto",
    "timestamp": NOW_US,
    "price": "64000.5",
    "quantity": "0.001",
    "currency": "USDT",
    "side": "BUY",
    "trade_conditions": ["T"],
    "source_sequence": 7,
    "ingestion_timestamp": NOW_US + 5,
    "platform_sequence": None,
    "vendor_data": {"a": "1"},
}


class JsonDecoder:
    """Decodes TradeV2 as one JSON object per payload; numbers of price and quantity are strings."""

    unknown_fields: Sequence[UnknownField] = ()

    def decode(self, payloads: pa.BinaryArray, skip: int) -> DecodedRecords:
        n = len(payloads)
        rows: list[dict[str, Any]] = []
        defect, position, details = np.zeros(n, np.uint8), np.full(n, -1), dict[int, str]()
        for i, payload in enumerate(payloads.to_pylist()):
            row: dict[str, Any] = {}
            try:
                row = self._row((payload or b"")[skip:].decode())
            except UnicodeDecodeError as error:
                defect[i], position[i] = Defect.INVALID_UTF8, skip + error.start
                details[i] = f"not UTF-8 at byte {position[i]}"
            except json.JSONDecodeError as error:
                defect[i], position[i] = Defect.MALFORMED, skip + error.pos
                details[i] = f"not JSON at byte {position[i]}"
            except (TypeError, ValueError, ArithmeticError, pa.ArrowException) as error:
                defect[i], details[i] = Defect.MALFORMED, f"not a trade: {error}"
            rows.append(row)
        return DecodedRecords(
            batch=pa.RecordBatch.from_pylist(rows, schema=TRADE_V2),
            defect=defect,
            position=position,
            detail=lambda row: details.get(row, ""),
        )

    def _row(self, text: str) -> dict[str, Any]:
        row = json.loads(text)
        if not isinstance(row, dict):
            raise ValueError(f"a {type(row).__name__}")
        row = {**row, **{name: Decimal(row[name]) for name in ("price", "quantity") if name in row}}
        pa.RecordBatch.from_pylist([row], schema=TRADE_V2)
        return row


class JsonSchemas(Schemas):
    """Every schema id means JSON."""

    def decoder(self, schema_id: int) -> JsonDecoder:
        return JsonDecoder()


def messages(values: Sequence[bytes | None]) -> MessageBatch:
    n = len(values)
    columns = [pa.nulls(n, pa.binary()), pa.array(values, pa.binary()), pa.array([NOW_US] * n, TIME)]
    rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
    return MessageBatch(rows, np.zeros(n, np.int32), np.arange(n, dtype=np.int64), [(0, 0, n)])


def value(**changed: Any) -> bytes:
    return HEADER + json.dumps({**TRADE, **changed}).encode()


@pytest.fixture(scope="module")
def decoder() -> TradeDecoder:
    return TradeDecoder(find_exchange("binance"), JsonSchemas())


def test_good_rows_become_trades_in_order_of_time(decoder: TradeDecoder) -> None:
    decoded = decoder.decode(messages([value(message_id="late", timestamp=NOW_US + 1), value(message_id="early")]))
    assert decoded.dead_letters.rows.num_rows == 0
    assert decoded.trades.rows["message_id"].to_pylist() == ["early", "late"]
    assert decoded.trades.offset.tolist() == [1, 0]
    row = decoded.trades.rows.to_pylist(maps_as_pydicts="strict")[0]
    assert (row["price"], row["vendor_data"]) == (Decimal("64000.5"), {"a": "1"})
    assert row["timestamp"].date() == row["exchange_date"]


def test_each_malformed_row_is_rejected_alone(decoder: TradeDecoder) -> None:
    decoded = decoder.decode(
        messages([value(), HEADER + b'{"price" 1}', HEADER + b'{"symbol": "\xff"}', HEADER + b"[]", value()])
    )
    found = decoded.dead_letters.rows.select(["offset", "reason", "detail", "schema_id"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (1, "malformed", "not JSON at byte 14", 7),
        (2, "invalid_utf8", "not UTF-8 at byte 17", 7),
        (3, "malformed", "not a trade: a list", 7),
    ]
    assert decoded.trades.offset.tolist() == [0, 4]


def test_validation_applies_to_rows_of_any_format(decoder: TradeDecoder) -> None:
    decoded = decoder.decode(messages([value(), value(price="-1"), value(exchange="KRAKEN")]))
    found = decoded.dead_letters.rows.select(["offset", "reason", "detail"]).to_pylist()
    assert [tuple(row.values()) for row in found] == [
        (1, "price_must_be_positive", "price = -1.00000000"),
        (2, "wrong_exchange", "exchange = 'KRAKEN'"),
    ]
    assert decoded.trades.offset.tolist() == [0]


def test_decoder_may_get_rows_without_a_readable_header(decoder: TradeDecoder) -> None:
    """If at least 90 % of a batch has one schema, its decoder gets the whole batch; the other rows are discarded."""
    decoded = decoder.decode(messages([None, *[value(message_id=str(i)) for i in range(28)], b"\1"]))
    assert decoded.dead_letters.rows["reason"].to_pylist() == ["null_payload", "bad_magic"]
    assert sorted(decoded.trades.offset.tolist()) == list(range(1, 29))


def test_identify_reads_ids_of_any_format(decoder: TradeDecoder) -> None:
    identities = decoder.identify(messages([value(price="-1"), HEADER + b"{"]))
    assert identities["message_id"].to_pylist() == ["m-1", None]
