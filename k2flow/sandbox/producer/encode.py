"""Encodes trades as TradeV2 messages, column by column: many times faster than one by one."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.sandbox.producer.trades import Bools, Bytes, Ints
from k2flow.trades.schema import trade_schema

FIELDS: tuple[str, ...] = tuple(field["name"] for field in trade_schema()["fields"])
_HEX = np.array([list(f"{byte:02x}".encode()) for byte in range(256)], np.uint8)
_HEX_COLUMNS = np.array([i for i in range(36) if i not in (8, 13, 18, 23)])
_UUID_TEXT_LENGTH = 36


@dataclass(frozen=True)
class EncodedTrades:
    """n messages, each as its header and the bytes of its 15 fields, in the order of FIELDS."""

    header: bytes
    fields: tuple[pa.BinaryArray, ...]

    def values(self) -> list[bytes]:
        """Return the n Kafka values."""
        joined = pc.binary_join_element_wise(pa.scalar(self.header), *self.fields, pa.scalar(b""))
        ends = np.frombuffer(joined.buffers()[1], np.int32, len(joined) + 1).tolist()
        data = joined.buffers()[2].to_pybytes()
        return [data[start:end] for start, end in itertools.pairwise(ends)]

    def row(self, i: int) -> dict[str, bytes]:
        """Return the bytes of each field of message i."""
        return {name: column[i].as_py() for name, column in zip(FIELDS, self.fields, strict=True)}


def wire_header(schema_id: int) -> bytes:
    """Return the header of Confluent's wire format: 0x00 and the schema id, big-endian."""
    return b"\0" + schema_id.to_bytes(4, "big")


def encode(trades: pa.RecordBatch, schema_id: int) -> EncodedTrades:
    """Encode n trades, see trades.py, as n TradeV2 messages with this schema id (0 to 2^32-1)."""
    crypto = avro_long(enum_index("asset_class", "crypto"))
    columns = {
        "message_id": _uuids(trades["message_id"]),
        "trade_id": _texts(trades["trade_id"]),
        "symbol": _coded(trades["symbol"], avro_string),
        "exchange": _coded(trades["exchange"], avro_string),
        "asset_class": pa.repeat(pa.scalar(crypto, pa.binary()), len(trades)),
        "timestamp": _longs(trades["timestamp"]),
        "price": _decimals(trades["price"]),
        "quantity": _decimals(trades["quantity"]),
        "currency": _coded(trades["currency"], avro_string),
        "side": _coded(trades["side"], lambda side: avro_long(enum_index("side", side))),
        "trade_conditions": _coded(trades["trade_conditions"], _text_list),
        "source_sequence": _optional_longs(trades["source_sequence"]),
        "ingestion_timestamp": _longs(trades["ingestion_timestamp"]),
        "platform_sequence": _optional_longs(trades["platform_sequence"]),
        "vendor_data": _coded(trades["vendor_data"], _optional_map),
    }
    return EncodedTrades(wire_header(schema_id), tuple(columns[name] for name in FIELDS))


def avro_long(value: int) -> bytes:
    """Encode an Avro long: zigzag, then seven bits per byte, the lowest first."""
    rest = (value << 1) ^ (value >> 63)
    out = bytearray()
    while rest > 0x7F:
        out.append(rest & 0x7F | 0x80)
        rest >>= 7
    out.append(rest)
    return bytes(out)


def avro_bytes(value: bytes) -> bytes:
    """Encode an Avro bytes or string value."""
    return avro_long(len(value)) + value


def avro_string(value: str) -> bytes:
    """Encode an Avro string."""
    return avro_bytes(value.encode())


def avro_decimal(units: int) -> bytes:
    """Encode an Avro decimal, given as its unscaled integer of any size."""
    return avro_bytes(units.to_bytes((units if units >= 0 else ~units).bit_length() // 8 + 1, "big", signed=True))


@cache
def enum_index(field: str, symbol: str) -> int:
    """Return the index of a symbol of an enum field of TradeV2."""
    found = next(f for f in trade_schema()["fields"] if f["name"] == field)
    return int(found["type"]["symbols"].index(symbol))


def _text_list(values: list[str]) -> bytes:
    return _blocks([avro_string(value) for value in values])


def _optional_map(entries: list[tuple[str, str]] | None) -> bytes:
    if entries is None:
        return avro_long(0)
    return avro_long(1) + _blocks([avro_string(key) + avro_string(value) for key, value in entries])


def _blocks(items: list[bytes]) -> bytes:
    """Encode an array or map as one block of its encoded items, or as none if it is empty."""
    return (avro_long(len(items)) if items else b"") + b"".join(items) + avro_long(0)


def _coded(column: pa.DictionaryArray, encode_one: Callable[[Any], bytes]) -> pa.BinaryArray:
    values = [encode_one(value) for value in column.dictionary.to_pylist()]
    return pa.array(values, pa.binary()).take(column.indices)


def _uuids(ids: pa.FixedSizeBinaryArray) -> pa.BinaryArray:
    each = np.frombuffer(ids.buffers()[1], np.uint8, 16 * len(ids), 16 * ids.offset)
    rows = np.full((len(ids), 1 + _UUID_TEXT_LENGTH), ord("-"), np.uint8)
    rows[:, 0] = avro_long(_UUID_TEXT_LENGTH)[0]
    rows[:, 1 + _HEX_COLUMNS] = _HEX[each].reshape(len(ids), 32)
    return _ragged(rows, np.ones(rows.shape, bool))


def _texts(values: pa.StringArray) -> pa.BinaryArray:
    lengths = pc.binary_length(values).cast(pa.int64())
    return pc.binary_join_element_wise(_longs(lengths), values.cast(pa.binary()), pa.scalar(b""))


def _longs(values: pa.Int64Array) -> pa.BinaryArray:
    return _ragged(*_varints(values.to_numpy()))


def _optional_longs(values: pa.Int64Array) -> pa.BinaryArray:
    digits, kept = _varints(values.fill_null(0).to_numpy())
    given = values.is_valid().to_numpy(zero_copy_only=False)
    branch = np.where(given, avro_long(1)[0], avro_long(0)[0]).astype(np.uint8)
    rows = np.concatenate([branch[:, None], digits], axis=1)
    keep = np.concatenate([np.ones((len(values), 1), bool), kept & given[:, None]], axis=1)
    return _ragged(rows, keep)


def _varints(values: Ints) -> tuple[Bytes, Bools]:
    """Return the bytes of n Avro longs, left-aligned (n, w), and which of them are used."""
    zigzag = ((values << 1) ^ (values >> 63)).view(np.uint64)
    width = max(1, -(-int(zigzag.max(initial=0)).bit_length() // 7))
    digits = np.empty((len(values), width), np.uint8)
    kept = np.ones((len(values), width), bool)
    for i in range(width):
        rest = zigzag >> np.uint64(7 * i)
        if i:
            kept[:, i] = rest > 0
        digits[:, i] = (rest & np.uint64(0x7F)).astype(np.uint8) | ((rest > 0x7F).astype(np.uint8) << 7)
    return digits, kept


def _decimals(amounts: pa.Int64Array) -> pa.BinaryArray:
    """Encode positive amounts as the shortest big-endian two's complement, with their length first."""
    units = amounts.to_numpy()
    sizes = np.ones(len(units), np.uint8)
    for i in range(1, 8):
        sizes += units >= 1 << (8 * i - 1)
    rows = np.empty((len(units), 9), np.uint8)
    rows[:, 0] = sizes << 1
    rows[:, 1:] = units.astype(">i8").view(np.uint8).reshape(-1, 8)
    keep = np.arange(9) > 8 - sizes[:, None]
    keep[:, 0] = True
    return _ragged(rows, keep)


def _ragged(rows: Bytes, keep: Bools) -> pa.BinaryArray:
    """Return the kept bytes of each of n rows (n, w)."""
    ends = np.zeros(len(rows) + 1, np.int32)
    np.cumsum(np.count_nonzero(keep, axis=1), out=ends[1:])
    return pa.BinaryArray.from_buffers(pa.binary(), len(rows), [None, pa.py_buffer(ends), pa.py_buffer(rows[keep])])
