"""Messages that are valid, or nearly so, and whose values are as odd as Avro and Kafka allow."""

import random
import string
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from tests.messages import TRADE, value

BORDERS = "\0\n\x1b\x7f\x80\u07ff\u0800\ud7ff\ue000\ufffd\uffff\U00010000\U0010ffff[/]{}'\"\\,;=%$\u202e\u0661"
MAX_AMOUNT = 10**18 - 1  # unscaled decimal(18, 8)
DAY_US = 86_400_000_000
YEAR_9999_US = 253_402_300_799_999_999
AGES_US = (0, 0, 0, 1, 59_000_000, 61_000_000, -2 * DAY_US, 364 * DAY_US, 366 * DAY_US)


@dataclass(frozen=True)
class HostileMessage:
    """A Kafka message with its timestamp in ms."""

    key: bytes | None
    value: bytes
    timestamp_ms: int


def hostile_messages(exchange: str, count: int, schema_id: int, chance: random.Random) -> Iterator[HostileMessage]:
    """Return `count` messages of the exchange with this code; each has its own message id."""
    for _ in range(count):
        kafka_us = chance.choice((time.time_ns() // 1000, time.time_ns() // 1000, YEAR_9999_US, 1000))
        traded_us = max(kafka_us - chance.choice(AGES_US), 0)
        received_us = max(kafka_us - chance.choice(AGES_US), 0)
        fields: dict[str, Any] = {
            "message_id": f"{uuid.UUID(int=chance.getrandbits(128))}{text(chance, 8)}",
            "trade_id": f"1{text(chance, 20)}",
            "symbol": f"{text(chance, 40)}X",
            "exchange": exchange,
            "timestamp": min(traded_us, YEAR_9999_US),
            "ingestion_timestamp": min(received_us, YEAR_9999_US),
            "price": amount(chance),
            "quantity": amount(chance),
            "currency": f"{text(chance, 4)}U",
            "trade_conditions": [text(chance, 9) for _ in range(chance.randrange(4))],
            "vendor_data": {text(chance, 5): text(chance, 300) for _ in range(chance.randrange(9))},
            "source_sequence": chance.choice((None, 0, -(2**63), 2**63 - 1)),
        }
        yield HostileMessage(key(chance), value(schema_id, **{**TRADE, **fields}), kafka_us // 1000)


def text(chance: random.Random, longest: int) -> str:
    """Return a text of at most `longest` characters, at the borders of Unicode's ranges or printable."""
    size = chance.randrange(longest + 1)
    alphabet = chance.choice((BORDERS, chance.choice(BORDERS), string.printable))
    return "".join(chance.choices(alphabet, k=size))


def key(chance: random.Random) -> bytes | None:
    """Return a Kafka key: none, an empty one, text, or bytes that are not UTF-8."""
    return chance.choice((None, b"", text(chance, 40).encode(), chance.randbytes(20), b"\xff" * 20))


def amount(chance: random.Random) -> Decimal:
    """Return a price or quantity within decimal(18, 8), at its limits or anywhere between."""
    return Decimal(chance.choice((1, MAX_AMOUNT, chance.randint(1, MAX_AMOUNT)))).scaleb(-8)
