"""The rules for values: each alone, their order, their bounds; the rules of an exchange after them."""

from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.exchange import Exchange, Rule, find_exchange
from k2flow.layers import FIRST_TRADE_US, MAX_TIME_US, MIN_TIME_US
from k2flow.trades.reasons import FIRST_EXCHANGE_RULE, Reason
from k2flow.trades.validate import Validator
from tests.oracle import broken_rule

NOW_US = 1_764_000_000_000_000
MINUTE_US = 60_000_000
YEAR_US = 365 * 86_400 * 1_000_000
LEAST = Decimal("0.00000001")
MOST = Decimal("9999999999.99999999")
GOOD: dict[str, Any] = {
    "message_id": "6f1c8a52-6a0b-4f0c-9d2e-0c7d7f1f6f10",
    "trade_id": "BINANCE-1",
    "symbol": "BTCUSDT",
    "exchange": "BINANCE",
    "asset_class": "crypto",
    "timestamp": NOW_US,
    "price": Decimal("64000.5"),
    "quantity": Decimal("0.001"),
    "currency": "USDT",
    "side": "BUY",
    "trade_conditions": [],
    "source_sequence": None,
    "ingestion_timestamp": NOW_US,
    "platform_sequence": None,
    "vendor_data": None,
}
TYPES: dict[str, pa.DataType] = {
    **{name: pa.string() for name in GOOD},
    **dict.fromkeys(("price", "quantity"), pa.decimal128(18, 8)),
    **dict.fromkeys(("timestamp", "ingestion_timestamp"), pa.timestamp("us", "UTC")),
    **dict.fromkeys(("source_sequence", "platform_sequence"), pa.int64()),
    "trade_conditions": pa.list_(pa.string()),
    "vendor_data": pa.map_(pa.string(), pa.string()),
}
BINANCE = find_exchange("binance")
BLANKS = ["", " ", "\t\r\n", "\u00a0", "\u2003\u3000", "\u1680 \u2028\u2029\u205f", "\u0085\x0b\x0c\x1f"]
NOT_BLANKS = ["x", " x ", "\u00a0x", "\u3000.", "\u200b", "\ufeff", "\x00", "\x7f", "é", "₿"]
TEXTS = {
    "message_id": Reason.MESSAGE_ID_REQUIRED,
    "symbol": Reason.SYMBOL_REQUIRED,
    "trade_id": Reason.TRADE_ID_REQUIRED,
    "currency": Reason.CURRENCY_REQUIRED,
}


def batch(*rows: dict[str, Any]) -> pa.RecordBatch:
    """Return good trades with the changes of each row. Times are microseconds since 1970."""
    columns = []
    for name, kind in TYPES.items():
        values = [row.get(name, GOOD[name]) for row in rows]
        columns.append(
            pa.array(values, pa.int64()).cast(kind) if pa.types.is_timestamp(kind) else pa.array(values, kind)
        )
    return pa.RecordBatch.from_arrays(columns, names=list(TYPES))


def times(values: Sequence[int | None]) -> pa.TimestampArray:
    return pa.array(values, pa.int64()).cast(pa.timestamp("us", "UTC"))


def check(*rows: dict[str, Any], kafka: Sequence[int | None] | None = None, exchange: Exchange = BINANCE) -> list[int]:
    """Return the reason of each row; its Kafka time is NOW_US by default."""
    found = np.zeros(len(rows), np.uint8)
    Validator(exchange).check(batch(*rows), times(kafka or [NOW_US] * len(rows)), found)
    return found.tolist()


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({}, Reason.VALID),
        *(({name: ""}, reason) for name, reason in TEXTS.items()),
        *(({name: None}, reason) for name, reason in TEXTS.items()),
        *(({"price": price}, Reason.PRICE_MUST_BE_POSITIVE) for price in (Decimal(0), -LEAST, -MOST, None)),
        *(({"quantity": quantity}, Reason.QUANTITY_MUST_BE_POSITIVE) for quantity in (Decimal(0), -LEAST, -MOST, None)),
        *(({"price": price, "quantity": price}, Reason.VALID) for price in (LEAST, MOST)),
        *(({"side": side}, Reason.INVALID_SIDE) for side in ("SELL_SHORT", "UNKNOWN", "buy", None)),
        ({"side": "SELL"}, Reason.VALID),
        *(({"exchange": code}, Reason.WRONG_EXCHANGE) for code in ("KRAKEN", "binance", "BINANCE ", "", None)),
        *(({"asset_class": kind}, Reason.INVALID_ASSET_CLASS) for kind in ("equities", "futures", "options", None)),
        ({"timestamp": MAX_TIME_US + 1}, Reason.TIMESTAMP_OUT_OF_RANGE),
        ({"ingestion_timestamp": MIN_TIME_US - 1}, Reason.TIMESTAMP_OUT_OF_RANGE),
        ({"ingestion_timestamp": 0}, Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE),
        ({"ingestion_timestamp": NOW_US // 1000}, Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE),
        ({"ingestion_timestamp": NOW_US - YEAR_US}, Reason.VALID),
        ({"ingestion_timestamp": NOW_US - YEAR_US - 1}, Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE),
        ({"ingestion_timestamp": NOW_US + YEAR_US}, Reason.VALID),
        ({"ingestion_timestamp": NOW_US + YEAR_US + 1}, Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE),
        ({"timestamp": NOW_US + MINUTE_US + 1}, Reason.TIMESTAMP_IN_FUTURE),
        ({"timestamp": NOW_US - YEAR_US - 1}, Reason.TIMESTAMP_TOO_OLD),
    ],
)
def test_each_rule_is_reported_alone(row: dict[str, Any], reason: Reason) -> None:
    """A row that breaks one rule gets its number; the good rows around it get none."""
    assert check({}, row, {}) == [0, reason, 0]


ALL_BROKEN: list[tuple[Reason, dict[str, Any]]] = [
    *((reason, {name: " "}) for name, reason in TEXTS.items()),
    (Reason.PRICE_MUST_BE_POSITIVE, {"price": Decimal(0)}),
    (Reason.QUANTITY_MUST_BE_POSITIVE, {"quantity": Decimal(0)}),
    (Reason.INVALID_SIDE, {"side": "UNKNOWN"}),
    (Reason.WRONG_EXCHANGE, {"exchange": "KRAKEN"}),
    (Reason.INVALID_ASSET_CLASS, {"asset_class": "options"}),
    (Reason.TIMESTAMP_OUT_OF_RANGE, {"ingestion_timestamp": MAX_TIME_US + 1}),
    (Reason.TIMESTAMP_IN_FUTURE, {"timestamp": NOW_US + YEAR_US}),
    (Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE, {"ingestion_timestamp": NOW_US - 2 * YEAR_US}),
]


@pytest.mark.parametrize("first", range(len(ALL_BROKEN)))
def test_first_broken_rule_is_reported(first: int) -> None:
    """Rules are checked in the order of the reason codes."""
    row: dict[str, Any] = {}
    for _, broken in reversed(ALL_BROKEN[first:]):  # two of them need the same column
        row |= broken
    assert check(row) == [ALL_BROKEN[first][0]]
    assert [reason for reason, _ in ALL_BROKEN] == sorted(reason for reason, _ in ALL_BROKEN)


@pytest.mark.parametrize("value", BLANKS)
@pytest.mark.parametrize("name", TEXTS)
def test_white_space_is_blank(name: str, value: str) -> None:
    """Every white space of Unicode counts, as in Python's `str.isspace`."""
    assert value == "" or value.isspace()
    assert check({}, {name: value}, {}) == [0, TEXTS[name], 0]


@pytest.mark.parametrize("value", NOT_BLANKS)
def test_any_other_character_is_not_blank(value: str) -> None:
    """One character that is no white space is enough, visible or not."""
    assert check(*({name: value} for name in TEXTS)) == [0] * len(TEXTS)


@given(st.lists(st.one_of(st.none(), st.text(st.characters(categories=["Z", "Cc", "L"]), max_size=3)), max_size=8))
def test_blank_agrees_with_python(values: list[str | None]) -> None:
    """A text is blank if and only if `str.strip` leaves nothing."""
    wanted = [0 if value and value.strip() else Reason.SYMBOL_REQUIRED for value in values]
    assert check(*({"symbol": value} for value in values)) == wanted


@pytest.mark.parametrize(
    ("time", "reason"),
    [
        (NOW_US + MINUTE_US, Reason.VALID),
        (NOW_US + MINUTE_US + 1, Reason.TIMESTAMP_IN_FUTURE),
        (NOW_US - YEAR_US, Reason.VALID),
        (NOW_US - YEAR_US - 1, Reason.TIMESTAMP_TOO_OLD),
        (MIN_TIME_US, Reason.TIMESTAMP_TOO_OLD),
        (MAX_TIME_US, Reason.TIMESTAMP_IN_FUTURE),
        (MIN_TIME_US - 1, Reason.TIMESTAMP_OUT_OF_RANGE),
        (MAX_TIME_US + 1, Reason.TIMESTAMP_OUT_OF_RANGE),
        (-(2**63), Reason.TIMESTAMP_OUT_OF_RANGE),
        (2**63 - 1, Reason.TIMESTAMP_OUT_OF_RANGE),
    ],
)
def test_distance_to_kafka_time_is_exact(time: int, reason: Reason) -> None:
    """One minute ahead and 365 days behind are valid to the microsecond; no number wraps around."""
    assert check({"timestamp": time}) == [reason]


FIRST = FIRST_TRADE_US


@pytest.mark.parametrize("kafka", [None, 0, NOW_US // 1_000_000, NOW_US // 1000, FIRST - 1000, -1])
@pytest.mark.parametrize(
    ("time", "received", "reason"),
    [
        (NOW_US, NOW_US, Reason.VALID),
        (FIRST, FIRST, Reason.VALID),
        (FIRST - 1, FIRST - 1, Reason.TIMESTAMP_IMPLAUSIBLE),
        (NOW_US // 1000, NOW_US // 1000, Reason.TIMESTAMP_IMPLAUSIBLE),
        (NOW_US // 1000, NOW_US, Reason.TIMESTAMP_IMPLAUSIBLE),
        (NOW_US, NOW_US // 1000, Reason.TIMESTAMP_IMPLAUSIBLE),
        (NOW_US, NOW_US + YEAR_US, Reason.VALID),
        (NOW_US, NOW_US + YEAR_US + 1, Reason.TIMESTAMP_IMPLAUSIBLE),
        (NOW_US + YEAR_US, NOW_US, Reason.VALID),
        (NOW_US + YEAR_US + 1, NOW_US, Reason.TIMESTAMP_IMPLAUSIBLE),
        (MIN_TIME_US, MAX_TIME_US, Reason.TIMESTAMP_IMPLAUSIBLE),
        (MAX_TIME_US, MAX_TIME_US, Reason.VALID),
        (MAX_TIME_US + 1, NOW_US, Reason.TIMESTAMP_OUT_OF_RANGE),
        (NOW_US, MIN_TIME_US - 1, Reason.TIMESTAMP_OUT_OF_RANGE),
    ],
)
def test_without_usable_kafka_time_the_two_times_must_agree(
    kafka: int | None, time: int, received: int, reason: Reason
) -> None:
    """A null, and a Kafka time before Bitcoin's first block, decide nothing; the neighbour is compared with its own."""
    rows = [{"timestamp": time, "ingestion_timestamp": received}, {"timestamp": NOW_US + YEAR_US}]
    assert check(*rows, kafka=[kafka, NOW_US]) == [reason, Reason.TIMESTAMP_IN_FUTURE]


def test_first_usable_kafka_time() -> None:
    """From 2009-01-03 on Kafka's time counts, to the millisecond."""
    assert check({"timestamp": 0}, {"timestamp": 0}, kafka=[FIRST, FIRST - 1000]) == [
        Reason.TIMESTAMP_TOO_OLD,
        Reason.TIMESTAMP_IMPLAUSIBLE,
    ]


def test_sliced_arrays_are_read_from_their_offset() -> None:
    """A slice of a longer batch gives the same reasons as its rows alone."""
    rows: list[dict[str, Any]] = [{**broken, "trade_conditions": ["x"]} for _, broken in ALL_BROKEN]
    rows += [{}, {"symbol": None}, {"price": None}]
    whole = batch(*rows)
    kafka = times([NOW_US] * (len(rows) - 1) + [None])
    wanted = np.zeros(len(rows), np.uint8)
    Validator(BINANCE).check(whole, kafka, wanted)
    for start in range(len(rows)):
        for end in range(start, len(rows) + 1):
            found = np.zeros(end - start, np.uint8)
            Validator(BINANCE).check(whole.slice(start, end - start), kafka.slice(start, end - start), found)
            assert found.tolist() == wanted[start:end].tolist()


def test_earlier_reason_is_kept() -> None:
    """A row with bad bytes keeps that reason, whatever its values are."""
    rows = [{"symbol": ""}, {"symbol": ""}, {}, {}]
    found = np.array([Reason.TRUNCATED, 0, Reason.MALFORMED, 0], np.uint8)
    Validator(BINANCE).check(batch(*rows), times([NOW_US] * 4), found)
    assert found.tolist() == [Reason.TRUNCATED, Reason.SYMBOL_REQUIRED, Reason.MALFORMED, 0]


def test_empty_batch_has_no_reasons() -> None:
    """No rule fails on zero rows."""
    assert check() == []


CURRENCIES = pa.array(["USD", "EUR"])
RULES = (
    Rule("currency_not_listed", "currency", lambda t: pc.is_in(t["currency"], CURRENCIES)),
    Rule("sequence_must_grow", "source_sequence", lambda t: pc.greater(t["source_sequence"], 10)),
)
COINBASE = replace(BINANCE, name="coinbase", code="COINBASE", rules=RULES)


def test_exchange_rules_follow_the_common_ones() -> None:
    """They keep the order of their declaration and their own names."""
    good = {"exchange": "COINBASE", "currency": "EUR", "source_sequence": 11}
    rows = [
        good,
        {**good, "currency": "USDT"},
        {**good, "source_sequence": 10},
        {**good, "currency": "USDT", "source_sequence": 10},
        {**good, "currency": "USDT", "exchange": "BINANCE"},
    ]
    first, second = FIRST_EXCHANGE_RULE, FIRST_EXCHANGE_RULE + 1
    assert check(*rows, exchange=COINBASE) == [0, first, second, first, Reason.WRONG_EXCHANGE]
    validator = Validator(COINBASE)
    assert (validator.rule(first).reason, validator.rule(first).columns) == ("currency_not_listed", ("currency",))
    assert validator.rule(second).reason == "sequence_must_grow"
    with pytest.raises(KeyError):
        validator.rule(second + 1)


def test_null_from_a_rule_is_invalid() -> None:
    """A row of unknown validity is a dead letter, and not lost."""
    row = {"exchange": "COINBASE", "currency": "USD", "source_sequence": None}
    assert check({**row, "source_sequence": 11}, row, exchange=COINBASE) == [0, FIRST_EXCHANGE_RULE + 1]


TIMES = (NOW_US, NOW_US + 2 * MINUTE_US, NOW_US - 2 * YEAR_US, NOW_US // 1000, FIRST - 1, MAX_TIME_US, MAX_TIME_US + 1)
ANY_ROW = st.fixed_dictionaries(
    {},
    optional={
        **dict.fromkeys(TEXTS, st.sampled_from(["", " ", "x"])),
        "price": st.decimals(-1, 1, places=8),
        "side": st.sampled_from(["BUY", "SELL", "UNKNOWN"]),
        "exchange": st.sampled_from(["BINANCE", "KRAKEN"]),
        "asset_class": st.sampled_from(["crypto", "futures"]),
        **dict.fromkeys(("timestamp", "ingestion_timestamp"), st.sampled_from(TIMES)),
    },
)


@given(st.lists(st.tuples(ANY_ROW, st.sampled_from([None, NOW_US, NOW_US // 1000, 0])), max_size=6))
def test_any_batch_is_validated_like_single_rows(rows: list[tuple[dict[str, Any], int | None]]) -> None:
    """The reasons equal those of plain rules, one message at a time."""
    wanted = [broken_rule({**GOOD, **row}, None if kafka is None else kafka // 1000, "BINANCE") for row, kafka in rows]
    found = check(*(row for row, _ in rows), kafka=[kafka for _, kafka in rows])
    assert [Reason(number).code if number else "" for number in found] == wanted
