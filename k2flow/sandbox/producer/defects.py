"""Bad messages: each reason code of the dead-letter tables, in every form it is likely to come in.

A bad message is made from a valid one, and has no other defect than the one it is made for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k2flow.layers import MAX_TIME_US, MIN_TIME_US
from k2flow.sandbox.producer.encode import blob, decimal, enum_index, header, long, text
from k2flow.trades.reasons import Reason
from k2flow.trades.validate import FUTURE_US, OLD_US

HOUR_US = 3_600_000_000


@dataclass(frozen=True)
class Sound:
    """A valid message: exchange, schema id, Kafka time, and the bytes of its fields in their order."""

    exchange: str
    schema_id: int
    kafka_us: int
    fields: Mapping[str, bytes]

    def value(self, **replaced: bytes) -> bytes:
        """The Kafka value, with these fields' bytes replaced."""
        return header(self.schema_id) + b"".join({**self.fields, **replaced}.values())


Defect = Callable[[Sound], bytes | None]


def _with(field: str, encoded: bytes) -> Defect:
    return lambda sound: sound.value(**{field: encoded})


def _blank(field: str) -> tuple[Defect, ...]:
    return tuple(_with(field, text(value)) for value in ("", "   ", "\t \n"))


def _enum(field: str, *symbols: str) -> tuple[Defect, ...]:
    return tuple(_with(field, long(enum_index(field, symbol))) for symbol in symbols)


def _cut(keep: Callable[[int], int]) -> Defect:
    """`keep` says how many bytes of a value of the given length are left."""

    def cut(sound: Sound) -> bytes:
        value = sound.value()
        return value[: keep(len(value))]

    return cut


def _too_long_varint(sound: Sound) -> bytes:
    return sound.value(timestamp=b"\x80" * 10 + b"\x01")


DEFECTS: Mapping[Reason, tuple[Defect, ...]] = {
    Reason.NULL_PAYLOAD: (lambda _: None,),
    Reason.BAD_MAGIC: (
        lambda _: b"",
        lambda sound: b"\x01" + sound.value()[1:],
        lambda _: b'{"symbol": "BTCUSDT", "price": "64000.1"}',
        lambda _: b"\0\0\0\0",
        lambda _: b"\0",
    ),
    Reason.UNKNOWN_SCHEMA: (lambda sound: header((sound.schema_id + 999_983) % 2**31) + sound.value()[5:],),
    Reason.TRUNCATED: (
        _cut(lambda _: 5),
        _cut(lambda size: size // 2),
        _cut(lambda size: size - 1),
        lambda sound: sound.value(message_id=long(1_000_000) + sound.fields["message_id"][1:]),
    ),
    Reason.MALFORMED: (
        _too_long_varint,
        _with("trade_id", long(-1)),
        _with("price", decimal(10**18)),
        _with("quantity", decimal(10**30)),
        _with("source_sequence", long(2) + long(1)),
    ),
    Reason.INVALID_ENUM: (
        _with("asset_class", long(4)),
        _with("side", long(7)),
    ),
    Reason.INVALID_UTF8: (
        _with("symbol", blob(b"BTC\xff\xfe")),
        _with("currency", blob(b"\xc3")),
        _with("trade_conditions", long(1) + blob(b"\xed\xa0\x80") + long(0)),
        _with("vendor_data", long(1) + long(1) + text("note") + blob(b"\xf0\x28\x8c\x28") + long(0)),
    ),
    Reason.TRAILING_BYTES: (
        lambda sound: sound.value() + b"\0",
        lambda sound: sound.value() + sound.value(),
    ),
    Reason.MESSAGE_ID_REQUIRED: _blank("message_id"),
    Reason.SYMBOL_REQUIRED: _blank("symbol"),
    Reason.TRADE_ID_REQUIRED: _blank("trade_id"),
    Reason.CURRENCY_REQUIRED: _blank("currency"),
    Reason.PRICE_MUST_BE_POSITIVE: (_with("price", decimal(0)), _with("price", decimal(-6_400_000_000_000))),
    Reason.QUANTITY_MUST_BE_POSITIVE: (_with("quantity", decimal(0)), _with("quantity", decimal(-1))),
    Reason.INVALID_SIDE: _enum("side", "SELL_SHORT", "UNKNOWN"),
    Reason.WRONG_EXCHANGE: (
        lambda sound: sound.value(exchange=text("KRAKEN" if sound.exchange != "KRAKEN" else "BINANCE")),
        lambda sound: sound.value(exchange=text(sound.exchange.lower())),
        _with("exchange", text("")),
    ),
    Reason.INVALID_ASSET_CLASS: _enum("asset_class", "equities", "futures", "options"),
    Reason.TIMESTAMP_OUT_OF_RANGE: (
        _with("timestamp", long(MAX_TIME_US + 1)),
        _with("timestamp", long(MIN_TIME_US - 1)),
        _with("ingestion_timestamp", long(2**63 - 1)),
        _with("timestamp", long(-(2**63))),
    ),
    Reason.TIMESTAMP_IN_FUTURE: (
        lambda sound: sound.value(timestamp=long(sound.kafka_us + FUTURE_US + 1)),
        lambda sound: sound.value(timestamp=long(sound.kafka_us + 24 * HOUR_US)),
    ),
    Reason.TIMESTAMP_TOO_OLD: (
        lambda sound: sound.value(timestamp=long(sound.kafka_us - OLD_US - 1)),
        lambda sound: sound.value(timestamp=long(0)),
    ),
}
REASONS = tuple(DEFECTS)


def defect(number: int) -> tuple[Reason, Defect]:
    """The defect of the number-th bad message: the reasons in turn, and of each its forms in turn."""
    reason = REASONS[number % len(REASONS)]
    forms = DEFECTS[reason]
    return reason, forms[number // len(REASONS) % len(forms)]
