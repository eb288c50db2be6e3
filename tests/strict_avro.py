"""Which defect a TradeV2 record has, byte by byte and by the letter of the Avro specification.

fastavro lets some malformed records pass (varints of more than ten bytes, decimals wider than the schema) and
reports others as something else (a negative length).
"""

from typing import Any

from k2flow.trades.schema import trade_schema


class DefectFoundError(Exception):
    """Holds the reason code."""


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
    """The reason code of the first defect in the bytes of a record (without the header), or ''."""
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
    """A block whose items cannot fit into what is left is a defect at its count, before any of its items is read."""
    width = 2 if kind["type"] == "map" else 1  # of the smallest item: one byte for each text
    while count := data.long():
        if abs(count) > 2**31 - 1:
            raise DefectFoundError("malformed")
        if count < 0:
            data.long()  # the size of the block, for readers that skip it
        if abs(count) > data.left() // width:
            raise DefectFoundError("truncated")
        for _ in range(abs(count)):
            if kind["type"] == "map":
                _read(data, "string")
            _read(data, kind["items" if kind["type"] == "array" else "values"])
