"""Finds the first defect of a TradeV2 record, byte by byte, exactly as the Avro specification defines it.

fastavro accepts some malformed records (varints of more than ten bytes, decimals wider than the schema) and reports
others as another defect (a negative length).
"""

from typing import Any

from k2flow.trades.schema import trade_schema


class DefectFoundError(Exception):
    """A defect; the message is its reason code."""


class _Bytes:
    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        if count < 0:
            raise DefectFoundError("malformed")
        if count > self.left():
            raise DefectFoundError("truncated")
        self._at += count
        return self._data[self._at - count : self._at]

    def long(self) -> int:
        number = 0
        for i in range(10):
            byte = self.take(1)[0]
            number |= (byte & 0x7F) << (7 * i)
            if byte < 0x80:
                if number >= 2**64:
                    break
                return (number >> 1) ^ -(number & 1)
        raise DefectFoundError("malformed")


def defect(record: bytes) -> str:
    """Return the reason code of the first defect in a record without its header, or an empty string."""
    data = _Bytes(record)
    try:
        for field in trade_schema()["fields"]:
            _read(data, field["type"])
    except DefectFoundError as found:
        return str(found)
    return "trailing_bytes" if data.left() else ""


def _read(data: _Bytes, kind: Any) -> None:
    if isinstance(kind, list):
        branch = data.long()
        if not 0 <= branch < len(kind):
            raise DefectFoundError("malformed")
        _read(data, kind[branch])
        return
    name = kind["type"] if isinstance(kind, dict) else kind
    if name == "long":
        data.long()
    elif name == "string":
        try:
            data.take(data.long()).decode()
        except UnicodeDecodeError:
            raise DefectFoundError("invalid_utf8") from None
    elif name == "bytes":
        if abs(int.from_bytes(data.take(data.long()), "big", signed=True)) >= 10 ** kind["precision"]:
            raise DefectFoundError("malformed")
    elif name == "enum":
        if not 0 <= data.long() < len(kind["symbols"]):
            raise DefectFoundError("invalid_enum")
    elif name in ("array", "map"):
        _read_blocks(data, kind)


def _read_blocks(data: _Bytes, kind: dict[str, Any]) -> None:
    """Read blocks of items; a block whose items cannot fit in the remaining bytes is a defect at its count."""
    min_size = 2 if kind["type"] == "map" else 1  # of an item: one byte per text
    while count := data.long():
        if abs(count) > 2**31 - 1:
            raise DefectFoundError("malformed")
        if count < 0:
            data.long()  # the size of the block, for readers that skip it
        if abs(count) > data.left() // min_size:
            raise DefectFoundError("truncated")
        for _ in range(abs(count)):
            if kind["type"] == "map":
                _read(data, "string")
            _read(data, kind["items" if kind["type"] == "array" else "values"])
