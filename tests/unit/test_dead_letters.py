"""The explanation of a dead letter, for every defect that the producer writes."""

from dataclasses import replace
from datetime import UTC, datetime

import numpy as np
import pytest

from k2flow.avro.decoder import AvroDecoder
from k2flow.exchange import find_exchange
from k2flow.reprocess.dead_letters import DeadLetter, explain, hex_dump
from k2flow.sandbox.producer.defects import DEFECTS, Defect, ValidMessage
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.market import Market
from k2flow.trades.reasons import Reason
from k2flow.trades.registry import FixedSchemas, Schemas
from k2flow.trades.schema import trade_schema

NOW_US = 1_760_000_000_000_000
NAMES = [field["name"] for field in trade_schema()["fields"]]
BYTES = {Reason.TRUNCATED, Reason.MALFORMED, Reason.INVALID_ENUM, Reason.INVALID_UTF8, Reason.TRAILING_BYTES}


@pytest.fixture(scope="module")
def valid() -> ValidMessage:
    rng = np.random.default_rng(5)
    trades, _ = Market("BINANCE", rng, NOW_US, 0).trades(np.array([NOW_US]))
    return ValidMessage("BINANCE", 1, NOW_US, encode(trades, 1).row(0))


def letter(payload: bytes | None, schema_id: int | None = 1) -> DeadLetter:
    time = datetime.fromtimestamp(NOW_US / 1e6, UTC)
    return DeadLetter("topic", 0, 7, time, payload, schema_id, "as_it_was", "", time)


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, all_of in DEFECTS.items() for make in all_of])
def test_defect_is_explained(valid: ValidMessage, reason: Reason, make: Defect) -> None:
    payload = make(valid)
    readable = payload is not None and payload[:1] == b"\0" and len(payload) >= 5
    schema_id = int.from_bytes(payload[1:5], "big") if payload and readable else None
    given = letter(payload, schema_id)
    if reason is Reason.TIMESTAMP_IMPLAUSIBLE:  # the rule of messages without a usable Kafka timestamp
        given = replace(given, kafka_timestamp=None)
    explained = explain(given, find_exchange("binance"), FixedSchemas((1,)))
    assert explained.reason == reason.code
    names = [name for name, _, _, _ in explained.fields]
    assert names == NAMES[: len(names)]
    edges = [5, *(end for _, _, _, end in explained.fields)]
    assert [begin for _, _, begin, _ in explained.fields] == edges[:-1]
    if reason in BYTES:
        assert explained.position is not None
        assert edges[-1] <= explained.position <= len(payload or b"")
        assert (len(names) == len(NAMES)) == (reason is Reason.TRAILING_BYTES)
    elif readable and reason is not Reason.UNKNOWN_SCHEMA:
        assert explained.position is None
        assert names == NAMES


def test_dead_letter_that_is_valid_today(valid: ValidMessage) -> None:
    explained = explain(letter(valid.value()), find_exchange("binance"), FixedSchemas((1,)))
    assert (explained.reason, explained.detail, explained.position) == (None, "", None)
    values = {name: value for name, value, _, _ in explained.fields}
    assert values["exchange"] == "BINANCE"
    assert list(values) == NAMES


def test_schema_that_fastavro_refuses_shows_fewer_fields(valid: ValidMessage) -> None:
    odd = {"name": "odd", "type": "int", "default": "not a number"}
    schema = {**trade_schema(), "fields": [*trade_schema()["fields"][:3], odd, *trade_schema()["fields"][3:]]}

    class OneSchema(Schemas):
        def decoder(self, schema_id: int) -> AvroDecoder:
            return AvroDecoder(schema, trade_schema())

    explained = explain(letter(valid.value()[:20]), find_exchange("binance"), OneSchema())
    assert explained.reason == "truncated"
    explained = explain(letter(valid.value()), find_exchange("binance"), OneSchema())
    assert [name for name, *_ in explained.fields] == NAMES[:3]


def test_hex_dump_marks_the_defect() -> None:
    assert hex_dump(b"\x00AB", 1) == [f"     0  {' 00 [41] 42 ':<64}  .AB"]
    assert hex_dump(b"A", 1)[-1] == "     1  [end]"
    assert len(hex_dump(bytes(40), None)) == 3
