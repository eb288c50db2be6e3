"""What is told of a dead letter, for every defect that the producer makes."""

from datetime import UTC, datetime

import numpy as np
import pytest

from k2flow.exchange import find_exchange
from k2flow.reprocess.dead_letters import Letter, explain, hex_dump
from k2flow.sandbox.producer.defects import DEFECTS, Defect, ValidMessage
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.market import Market
from k2flow.trades.reasons import Reason
from k2flow.trades.registry import FixedSchemas
from k2flow.trades.schema import trade_schema

NOW_US = 1_760_000_000_000_000
NAMES = [field["name"] for field in trade_schema()["fields"]]
BYTES = {Reason.TRUNCATED, Reason.MALFORMED, Reason.INVALID_ENUM, Reason.INVALID_UTF8, Reason.TRAILING_BYTES}


@pytest.fixture(scope="module")
def valid() -> ValidMessage:
    rng = np.random.default_rng(5)
    trades, _ = Market("BINANCE", rng, NOW_US).trades(np.array([NOW_US]))
    return ValidMessage("BINANCE", 1, NOW_US, encode(trades, 1).row(0))


def letter(payload: bytes | None, schema_id: int | None = 1) -> Letter:
    time = datetime.fromtimestamp(NOW_US / 1e6, UTC)
    return Letter("topic", 0, 7, time, payload, schema_id, "as_it_was", "", time)


@pytest.mark.parametrize(("reason", "make"), [(reason, make) for reason, all_of in DEFECTS.items() for make in all_of])
def test_every_defect(valid: ValidMessage, reason: Reason, make: Defect) -> None:
    payload = make(valid)
    readable = payload is not None and payload[:1] == b"\0" and len(payload) >= 5
    schema_id = int.from_bytes(payload[1:5], "big") if payload and readable else None
    told = explain(letter(payload, schema_id), find_exchange("binance"), FixedSchemas((1,)))
    assert told.now == reason.code
    names = [name for name, _, _, _ in told.fields]
    assert names == NAMES[: len(names)]
    edges = [5, *(end for _, _, _, end in told.fields)]
    assert [begin for _, _, begin, _ in told.fields] == edges[:-1]
    if reason in BYTES:
        assert told.position is not None
        assert edges[-1] <= told.position <= len(payload or b"")
        assert (len(names) == len(NAMES)) == (reason is Reason.TRAILING_BYTES)
    elif readable and reason is not Reason.UNKNOWN_SCHEMA:
        assert told.position is None
        assert names == NAMES


def test_one_that_is_valid_by_now(valid: ValidMessage) -> None:
    told = explain(letter(valid.value()), find_exchange("binance"), FixedSchemas((1,)))
    assert (told.now, told.why, told.position) == (None, "", None)
    values = {name: value for name, value, _, _ in told.fields}
    assert values["exchange"] == "BINANCE"
    assert list(values) == NAMES


def test_the_dump_marks_a_byte() -> None:
    assert hex_dump(b"\x00AB", 1) == [f"     0  {' 00 [41] 42 ':<64}  .AB"]
    assert hex_dump(b"A", 1)[-1] == "     1  [end]"
    assert len(hex_dump(bytes(40), None)) == 3
