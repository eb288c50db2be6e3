"""Messages become trades or dead letters: headers, schema ids, every message in exactly one of the two."""

from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.config.settings import load_settings
from k2flow.exchange import Exchange, Rule
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MessageBatch
from k2flow.trades.registry import FixedSchemas
from tests.messages import BINANCE, NOW_US, TRADE, decode, details, ids, messages, reasons, value
from tests.oracle import Message, classify, frozen_map, silver_row


@pytest.mark.parametrize(
    ("bad", "reason", "detail", "schema_id"),
    [
        (None, "null_payload", "the message has no value", None),
        (b"", "bad_magic", "0 bytes, fewer than the 5", None),
        (b"\0\0\0\0", "bad_magic", "4 bytes, fewer than the 5", None),
        (b"\x01" + value()[1:], "bad_magic", "first byte 0x01, not 0x00", None),
        (b"\xff\xff\xff\xff\xff", "bad_magic", "first byte 0xff, not 0x00", None),
        (value(2), "unknown_schema", "schema id 2 is not one of 1", 2),
        (value(2**31 - 1), "unknown_schema", "schema id 2147483647", 2**31 - 1),
        (value(2**31), "unknown_schema", "schema id 2147483648", -(2**31)),
        (value(2**32 - 1), "unknown_schema", "schema id 4294967295", -1),
        (b"\0\0\0\0\x01", "truncated", "message_id", 1),
        (value()[:-1], "truncated", "vendor_data", 1),
        (value() + b"\0", "trailing_bytes", "1 trailing bytes", 1),
    ],
)
def test_defect_in_header_or_bytes_affects_no_other_row(
    bad: bytes | None, reason: str, detail: str, schema_id: int | None
) -> None:
    """One dead letter has the original bytes and the id; the trades beside it are complete."""
    decoded = decode([value(trade_id="one"), bad, value(trade_id="two")])
    assert reasons(decoded) == {1: reason}
    assert detail in details(decoded)[0]
    assert ids(decoded) == [schema_id]
    assert decoded.trades.rows["trade_id"].to_pylist() == ["one", "two"]
    assert decoded.dead_letters.rows["kafka_timestamp"].to_pylist() == [datetime.fromtimestamp(NOW_US / 1e6, UTC)]


def test_trade_has_every_column_as_written() -> None:
    """`exchange_date` is the day of `timestamp`."""
    (row,) = decode([value()]).trades.rows.to_pylist()
    row["trade_conditions"], row["vendor_data"] = tuple(row["trade_conditions"]), frozen_map(row["vendor_data"])
    assert tuple(row.values()) == silver_row(TRADE)


def test_empty_batch_gives_two_empty_results() -> None:
    """It may have the offsets of transaction markers, which both results keep."""
    decoded = decode([])
    assert decoded.trades.rows.num_rows == decoded.dead_letters.rows.num_rows == 0


def test_bad_messages_are_all_dead_letters() -> None:
    """They keep the order of the messages."""
    bad = [None, b"", value(9), value()[:-3], value(price=Decimal(0))]
    assert list(reasons(decode(bad)).values()) == [
        "null_payload",
        "bad_magic",
        "unknown_schema",
        "truncated",
        "price_must_be_positive",
    ]


def test_batch_may_have_several_schema_ids(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ids of K2FLOW_SCHEMA_IDS mean TradeV2, up to the largest. The trades of all are sorted by time together."""
    monkeypatch.setenv("K2FLOW_SCHEMA_IDS", "1, 7,4294967295")
    schemas = FixedSchemas(load_settings(["binance"]).schema_ids)
    times = [NOW_US - 10, NOW_US - 30, NOW_US - 20, NOW_US - 40, NOW_US - 50, NOW_US - 30]
    used = [1, 7, 2**32 - 1, 8, 1, 1]
    decoded = decode(
        [value(i, timestamp=t, trade_id=str(n)) for n, (i, t) in enumerate(zip(used, times, strict=True))], schemas
    )
    assert reasons(decoded) == {3: "unknown_schema"}
    assert details(decoded) == ["schema id 8 is not one of 1, 7, 4294967295"]
    assert decoded.trades.rows["trade_id"].to_pylist() == ["4", "1", "5", "2", "0"]
    assert (decoded.trades.offset - 100).tolist() == [4, 1, 5, 2, 0]


def test_trades_are_sorted_by_time() -> None:
    """Equal times keep the order of the messages; each trade keeps its partition and offset."""
    times = [5, 3, 9, 3, 1, 9, 3]
    decoded = decode([value(timestamp=NOW_US + t, trade_id=str(i)) for i, t in enumerate(times)])
    assert decoded.trades.rows["trade_id"].to_pylist() == ["4", "1", "3", "6", "0", "2", "5"]
    assert decoded.trades.offset.tolist() == [104, 101, 103, 106, 100, 102, 105]


@pytest.mark.parametrize(
    ("changed", "reason", "detail"),
    [
        ({"message_id": " "}, "message_id_required", "message_id = ' '"),
        ({"symbol": "\u3000"}, "symbol_required", r"symbol = '\u3000'"),
        ({"price": Decimal("-0.00000001")}, "price_must_be_positive", "price = -1E-8"),
        ({"quantity": Decimal(0)}, "quantity_must_be_positive", "quantity = 0E-8"),
        ({"side": "SELL_SHORT"}, "invalid_side", "side = 'SELL_SHORT'"),
        ({"exchange": "x" * 1000}, "wrong_exchange", f"exchange = '{'x' * 199}... (1002 characters)"),
        ({"asset_class": "options"}, "invalid_asset_class", "asset_class = 'options'"),
        (
            {"timestamp": 2**63 - 1},
            "timestamp_out_of_range",
            f"timestamp = {2**63 - 1} us since 1970, ingestion_timestamp = {NOW_US + 5} us since 1970",
        ),
        (
            {"timestamp": NOW_US + 60_000_001},
            "timestamp_in_future",
            f"timestamp = {NOW_US + 60_000_001} us since 1970, Kafka timestamp = {NOW_US} us",
        ),
        ({"timestamp": 0}, "timestamp_too_old", f"timestamp = 0 us since 1970, Kafka timestamp = {NOW_US} us"),
    ],
)
def test_detail_of_a_broken_rule_shows_the_value(changed: dict[str, Any], reason: str, detail: str) -> None:
    """It names the column, and cuts long values."""
    decoded = decode([value(), value(**changed), value()])
    assert reasons(decoded) == {1: reason}
    assert details(decoded) == [detail]
    assert ids(decoded) == [1]


def test_rule_of_an_exchange_gives_its_own_reason() -> None:
    """The detail shows the column that the rule names."""
    rule = Rule("too_small", "quantity", lambda trades: pa.compute.greater(trades["quantity"], Decimal("0.01")))
    exchange = Exchange("binance", "BINANCE", BINANCE.declared, (rule,))
    decoded = decode([value(), value(quantity=Decimal(1))], exchange=exchange)
    assert reasons(decoded) == {0: "too_small"}
    assert details(decoded) == ["quantity = 0.00100000"]


@pytest.mark.parametrize(
    ("time_us", "day"),
    [
        (1_230_940_800_000_000, date(2009, 1, 3)),
        (1_763_942_399_999_999, date(2025, 11, 23)),
        (1_763_942_400_000_000, date(2025, 11, 24)),
        (253_402_300_799_999_999, date(9999, 12, 31)),
    ],
)
def test_exchange_date_is_right_far_from_now(time_us: int, day: date) -> None:
    """It is the day in UTC, from the first day that a trade may have to the last."""
    whole = value(timestamp=time_us, ingestion_timestamp=time_us)
    (row,) = decode([whole], kafka_us=[time_us]).trades.rows.to_pylist()
    assert row["exchange_date"] == day
    assert row["timestamp"] == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)


def test_sliced_batch_decodes_like_a_whole_one() -> None:
    """The buffers of Arrow's slices begin elsewhere."""
    whole = messages([value(trade_id=str(i)) if i % 3 else (None, b"\1\2", value(5))[i // 3 % 3] for i in range(18)])
    for start, length in ((1, 7), (4, 0), (5, 13)):
        own = slice(start, start + length)
        part = MessageBatch(whole.rows.slice(start, length), whole.partition[own], whole.offset[own], whole.offsets)
        decoded = TradeDecoder(BINANCE, FixedSchemas((1,))).decode(part)
        wanted = [i for i in range(start, start + length) if i % 3]
        assert decoded.trades.rows["trade_id"].to_pylist() == [str(i) for i in wanted]
        assert (decoded.trades.offset - 100).tolist() == wanted
        assert len(decoded.dead_letters.offset) == length - len(wanted)


GOOD_VALUES = st.builds(
    lambda id_, time_us, text: value(id_, timestamp=time_us, trade_id=text),
    st.sampled_from([1, 3, 2**31 + 5]),
    st.sampled_from([NOW_US, NOW_US - 1, NOW_US + 60_000_000, NOW_US - 86_400_000_000]),
    st.text(min_size=1, max_size=4).filter(str.strip),
)
BAD_VALUES = st.one_of(
    st.none(),
    st.binary(max_size=6),
    st.builds(lambda whole, cut: whole[: cut % len(whole)], GOOD_VALUES, st.integers(0, 1000)),
    st.builds(lambda whole, tail: whole + tail, GOOD_VALUES, st.binary(min_size=1, max_size=3)),
    st.builds(
        lambda whole, at, byte: whole[: at % len(whole)] + bytes([byte]) + whole[at % len(whole) + 1 :],
        GOOD_VALUES,
        st.integers(0, 1000),
        st.integers(0, 255),
    ),
    st.sampled_from([value(2), value(symbol=""), value(side="UNKNOWN"), value(timestamp=0), value(price=Decimal(-1))]),
)


@given(st.lists(st.tuples(st.one_of(GOOD_VALUES, BAD_VALUES), st.sampled_from([NOW_US, None])), max_size=12))
def test_any_batch_decodes_like_single_messages(rows: list[tuple[bytes | None, int | None]]) -> None:
    """Each message is in exactly one result: with the oracle's reason, or as the oracle's trade at its own offset."""
    schema_ids = (1, 3, 2**31 + 5)
    decoded = decode([v for v, _ in rows], FixedSchemas(schema_ids), kafka_us=[kafka for _, kafka in rows])
    wanted = [
        classify(Message(0, i, None, v, None if kafka is None else kafka // 1000), "BINANCE", schema_ids)
        for i, (v, kafka) in enumerate(rows)
    ]
    assert reasons(decoded) == {i: reason for i, (reason, _) in enumerate(wanted) if reason}
    for offset, row in zip((decoded.trades.offset - 100).tolist(), decoded.trades.rows.to_pylist(), strict=True):
        row["trade_conditions"], row["vendor_data"] = tuple(row["trade_conditions"]), frozen_map(row["vendor_data"])
        assert tuple(row.values()) == silver_row(wanted[offset][1])
