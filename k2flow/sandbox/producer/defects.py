"""Bad messages of each reason code, in all its likely forms: a valid message each, with exactly one defect."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from k2flow.layers import MAX_TIME_US, MIN_TIME_US
from k2flow.sandbox.producer.encode import avro_bytes, avro_decimal, avro_long, avro_string, enum_index, wire_header
from k2flow.sandbox.producer.market import DAY_US
from k2flow.trades.reasons import Reason
from k2flow.trades.validate import FUTURE_US, OLD_US

NO_TIME_US = -1_000  # -1 ms is Kafka's time of a message without one


@dataclass(frozen=True)
class ValidMessage:
    """A valid message: exchange, schema id, Kafka time, and the bytes of its fields in their order."""

    exchange: str
    schema_id: int
    kafka_us: int
    fields: Mapping[str, bytes]

    def value(self, **replaced: bytes) -> bytes:
        """Return the Kafka value, with the bytes of the fields in `replaced` instead."""
        return wire_header(self.schema_id) + b"".join({**self.fields, **replaced}.values())


Defect = Callable[[ValidMessage], bytes | None]  # returns the Kafka value of a bad message, derived from a valid one


def _with(field: str, encoded: bytes) -> Defect:
    return lambda valid: valid.value(**{field: encoded})


def _blank(field: str) -> tuple[Defect, ...]:
    return tuple(_with(field, avro_string(value)) for value in ("", "   ", "\t \n"))


def _enum(field: str, *symbols: str) -> tuple[Defect, ...]:
    return tuple(_with(field, avro_long(enum_index(field, symbol))) for symbol in symbols)


def _cut(keep: Callable[[int], int]) -> Defect:
    """Cut the value: `keep` returns the remaining length for a length."""

    def cut(valid: ValidMessage) -> bytes:
        value = valid.value()
        return value[: keep(len(value))]

    return cut


def _too_long_varint(valid: ValidMessage) -> bytes:
    return valid.value(timestamp=b"\x80" * 10 + b"\x01")


DEFECTS: Mapping[Reason, tuple[Defect, ...]] = {
    Reason.NULL_PAYLOAD: (lambda _: None,),
    Reason.BAD_MAGIC: (
        lambda _: b"",
        lambda valid: b"\x01" + valid.value()[1:],
        lambda _: b'{"symbol": "BTCUSDT", "price": "64000.1"}',
        lambda _: b"\0\0\0\0",
        lambda _: b"\0",
    ),
    Reason.UNKNOWN_SCHEMA: (lambda valid: wire_header((valid.schema_id + 999_983) % 2**31) + valid.value()[5:],),
    Reason.TRUNCATED: (
        _cut(lambda _: 5),
        _cut(lambda size: size // 2),
        _cut(lambda size: size - 1),
        lambda valid: valid.value(message_id=avro_long(1_000_000) + valid.fields["message_id"][1:]),
    ),
    Reason.MALFORMED: (
        _too_long_varint,
        _with("trade_id", avro_long(-1)),
        _with("price", avro_decimal(10**18)),
        _with("quantity", avro_decimal(10**30)),
        _with("source_sequence", avro_long(2) + avro_long(1)),
    ),
    Reason.INVALID_ENUM: (_with("asset_class", avro_long(4)), _with("side", avro_long(7))),
    Reason.INVALID_UTF8: (
        _with("symbol", avro_bytes(b"BTC\xff\xfe")),
        _with("currency", avro_bytes(b"\xc3")),
        _with("trade_conditions", avro_long(1) + avro_bytes(b"\xed\xa0\x80") + avro_long(0)),
        _with(
            "vendor_data",
            avro_long(1) + avro_long(1) + avro_string("note") + avro_bytes(b"\xf0\x28\x8c\x28") + avro_long(0),
        ),
    ),
    Reason.TRAILING_BYTES: (lambda valid: valid.value() + b"\0", lambda valid: valid.value() + valid.value()),
    Reason.MESSAGE_ID_REQUIRED: _blank("message_id"),
    Reason.SYMBOL_REQUIRED: _blank("symbol"),
    Reason.TRADE_ID_REQUIRED: _blank("trade_id"),
    Reason.CURRENCY_REQUIRED: _blank("currency"),
    Reason.PRICE_MUST_BE_POSITIVE: (_with("price", avro_decimal(0)), _with("price", avro_decimal(-6_400_000_000_000))),
    Reason.QUANTITY_MUST_BE_POSITIVE: (_with("quantity", avro_decimal(0)), _with("quantity", avro_decimal(-1))),
    Reason.INVALID_SIDE: _enum("side", "SELL_SHORT", "UNKNOWN"),
    Reason.WRONG_EXCHANGE: (
        lambda valid: valid.value(exchange=avro_string("KRAKEN" if valid.exchange != "KRAKEN" else "BINANCE")),
        lambda valid: valid.value(exchange=avro_string(valid.exchange.lower())),
        _with("exchange", avro_string("")),
    ),
    Reason.INVALID_ASSET_CLASS: _enum("asset_class", "equities", "futures", "options"),
    Reason.TIMESTAMP_OUT_OF_RANGE: (
        _with("timestamp", avro_long(MAX_TIME_US + 1)),
        _with("timestamp", avro_long(MIN_TIME_US - 1)),
        _with("ingestion_timestamp", avro_long(2**63 - 1)),
        _with("timestamp", avro_long(-(2**63))),
    ),
    Reason.TIMESTAMP_IN_FUTURE: (
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us + FUTURE_US + 1)),
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us + DAY_US)),
    ),
    Reason.TIMESTAMP_TOO_OLD: (
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us - OLD_US - 1)),
        lambda valid: valid.value(timestamp=avro_long(0)),
    ),
    Reason.TIMESTAMP_IMPLAUSIBLE: (
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us // 1000)),
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us - OLD_US - DAY_US)),
        lambda valid: valid.value(timestamp=avro_long(valid.kafka_us + OLD_US + DAY_US)),
    ),
    Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE: (
        lambda valid: valid.value(ingestion_timestamp=avro_long(valid.kafka_us // 1000)),
        lambda valid: valid.value(ingestion_timestamp=avro_long(valid.kafka_us - OLD_US - 1)),
        lambda valid: valid.value(ingestion_timestamp=avro_long(valid.kafka_us + OLD_US + 1)),
    ),
}
REASONS = tuple(DEFECTS)


def kafka_time_of(reason: Reason, kafka_us: int) -> int:
    """Return the Kafka time (us since 1970) of a bad message: NO_TIME_US if its rule needs a message without one."""
    return NO_TIME_US if reason is Reason.TIMESTAMP_IMPLAUSIBLE else kafka_us


def pick_defect(number: int) -> tuple[Reason, Defect]:
    """Return the defect of the number-th bad message: the reasons in turn, and the forms of each in turn."""
    reason = REASONS[number % len(REASONS)]
    forms = DEFECTS[reason]
    return reason, forms[number // len(REASONS) % len(forms)]
