"""Messages into trades and failures: headers, schema ids, every message in exactly one of the two; and the registry."""

import io
import json
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import fastavro
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.config.settings import load_settings
from k2flow.errors import RegistryError
from k2flow.exchange import Exchange, Rule, find_exchange
from k2flow.layers import DLQ, SILVER
from k2flow.sandbox.kafka.local import free_port
from k2flow.trades.decode import Decoded, TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.registry import FixedSchemas, RegistrySchemas, Schemas
from k2flow.trades.schema import trade_schema
from tests.oracle import Message, frozen_map, judge, silver_row

NOW_US = 1_764_000_000_000_000
TRADE: dict[str, Any] = {
    "message_id": "6f1c8a52-6a0b-4f0c-9d2e-0c7d7f1f6f10",
    "trade_id": "BINANCE-1",
    "symbol": "BTCUSDT",
    "exchange": "BINANCE",
    "asset_class": "crypto",
    "timestamp": NOW_US,
    "price": Decimal("64000.50000000"),
    "quantity": Decimal("0.00100000"),
    "currency": "USDT",
    "side": "BUY",
    "trade_conditions": ["T"],
    "source_sequence": 7,
    "ingestion_timestamp": NOW_US + 5,
    "platform_sequence": None,
    "vendor_data": {"b": "1", "a": "2"},
}
BINANCE = find_exchange("binance")


def plain(schema: Any) -> Any:
    """A schema without the logical type of its times, whose datetimes end at the year 9999."""
    if isinstance(schema, dict):
        kept = {key: plain(value) for key, value in schema.items()}
        return "long" if schema.get("logicalType") == "timestamp-micros" else kept
    return [plain(part) for part in schema] if isinstance(schema, list) else schema


def encoded(schema: Any, record: dict[str, Any]) -> bytes:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, fastavro.parse_schema(plain(schema)), record)
    return stream.getvalue()


def value(schema_id: int = 1, **changed: Any) -> bytes:
    """The Kafka value of a good trade, but for what `changed` says."""
    return b"\0" + schema_id.to_bytes(4, "big") + encoded(trade_schema(), {**TRADE, **changed})


def messages(values: Sequence[bytes | None], kafka_us: Sequence[int | None] | None = None) -> MessageBatch:
    """Messages of the partitions 0, 1, 2, 0, ... at the offsets 100, 101, ..."""
    n = len(values)
    kafka = pa.array(kafka_us or [NOW_US] * n, pa.int64()).cast(pa.timestamp("us", "UTC"))
    rows = pa.RecordBatch.from_arrays(
        [pa.nulls(n, pa.binary()), pa.array(values, pa.binary()), kafka], schema=MESSAGE_SCHEMA
    )
    partition, offset = np.arange(n, dtype=np.int32) % 3, 100 + np.arange(n, dtype=np.int64)
    return MessageBatch(rows, partition, offset, [(p, 100, 100 + n) for p in range(3)])


def decode(
    values: Sequence[bytes | None],
    schemas: Schemas | None = None,
    exchange: Exchange = BINANCE,
    kafka_us: Sequence[int | None] | None = None,
) -> Decoded:
    """Decodes, and checks what holds for every batch: each message is in one result, beside where it came from."""
    given_ = messages(values, kafka_us)
    decoded = TradeDecoder(exchange, schemas or FixedSchemas((1,))).decode(given_)
    trades, failures = decoded.trades, decoded.failures
    for part in (trades, failures):
        part.rows.validate(full=True)
        assert part.rows.num_rows == len(part.partition) == len(part.offset)
        assert part.offsets == given_.offsets
    assert sorted([*trades.offset.tolist(), *failures.offset.tolist()]) == given_.offset.tolist()
    for part in (trades, failures):
        assert part.partition.tolist() == ((part.offset - 100) % 3).tolist()
    assert trades.rows.schema == SILVER.arrow_schema
    assert failures.rows.schema == DLQ.arrow_schema
    assert failures.offset.tolist() == sorted(failures.offset.tolist())
    assert failures.rows["partition"].to_pylist() == failures.partition.tolist()
    assert failures.rows["offset"].to_pylist() == failures.offset.tolist()
    at = trades.rows["timestamp"].cast(pa.int64()).to_pylist()
    assert at == sorted(at)
    for row in failures.rows.to_pylist():
        assert row["payload"] == values[row["offset"] - 100]
        assert row["topic"] == exchange.settings.topic
        assert row["detail"]
        assert row["failed_date"] == row["failed_at"].date()
    return decoded


def reasons(decoded: Decoded) -> dict[int, str]:
    """The reason of each bad message, by its place in the batch."""
    return {row["offset"] - 100: row["reason"] for row in decoded.failures.rows.to_pylist()}


def details(decoded: Decoded) -> list[str]:
    found: list[str] = decoded.failures.rows["detail"].to_pylist()
    return found


def ids(decoded: Decoded) -> list[Any]:
    found: list[Any] = decoded.failures.rows["schema_id"].to_pylist()
    return found


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
def test_a_defect_of_header_or_bytes_leaves_its_neighbours_alone(
    bad: bytes | None, reason: str, detail: str, schema_id: int | None
) -> None:
    """One row of the dead letters with the original bytes and the id as it was read; the trades beside it are whole."""
    decoded = decode([value(trade_id="one"), bad, value(trade_id="two")])
    assert reasons(decoded) == {1: reason}
    assert detail in details(decoded)[0]
    assert ids(decoded) == [schema_id]
    assert decoded.trades.rows["trade_id"].to_pylist() == ["one", "two"]
    assert decoded.failures.rows["kafka_timestamp"].to_pylist() == [datetime.fromtimestamp(NOW_US / 1e6, UTC)]


def test_every_column_of_a_trade() -> None:
    """The values are those that were written, and `exchange_date` is the day of `timestamp`."""
    (row,) = decode([value()]).trades.rows.to_pylist()
    row["trade_conditions"], row["vendor_data"] = tuple(row["trade_conditions"]), frozen_map(row["vendor_data"])
    assert tuple(row.values()) == silver_row(TRADE)


def test_no_messages() -> None:
    """An empty batch (offsets of transaction markers alone) gives two empty results that keep its offsets."""
    decoded = decode([])
    assert decoded.trades.rows.num_rows == decoded.failures.rows.num_rows == 0


def test_all_messages_bad() -> None:
    """Nothing is a trade: every message is in the dead letters, in order."""
    bad = [None, b"", value(9), value()[:-3], value(price=Decimal(0))]
    assert list(reasons(decode(bad)).values()) == [
        "null_payload",
        "bad_magic",
        "unknown_schema",
        "truncated",
        "price_must_be_positive",
    ]


def test_several_schema_ids_in_one_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """All ids of K2FLOW_SCHEMA_IDS mean TradeV2, up to the largest; the trades are in the order of time over all."""
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


def test_trades_are_in_the_order_of_time() -> None:
    """By `timestamp`, equal ones as they came, each with its own partition and offset beside it."""
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
def test_a_broken_rule_shows_the_value(changed: dict[str, Any], reason: str, detail: str) -> None:
    """The detail names the column and the value that broke it, cut where it is long."""
    decoded = decode([value(), value(**changed), value()])
    assert reasons(decoded) == {1: reason}
    assert details(decoded) == [detail]
    assert ids(decoded) == [1]


def test_a_rule_of_the_exchange_itself() -> None:
    """It gives its own reason, and shows the column it names."""
    rule = Rule("too_small", "quantity", lambda trades: pa.compute.greater(trades["quantity"], Decimal("0.01")))
    exchange = Exchange("binance", "BINANCE", BINANCE.declared, (rule,))
    decoded = decode([value(), value(quantity=Decimal(1))], exchange=exchange)
    assert reasons(decoded) == {0: "too_small"}
    assert details(decoded) == ["quantity = 0.00100000"]


@pytest.mark.parametrize(
    ("time_us", "day"),
    [
        (-1, date(1969, 12, 31)),
        (0, date(1970, 1, 1)),
        (-86_400_000_000, date(1969, 12, 31)),
        (-86_400_000_001, date(1969, 12, 30)),
        (-62_135_596_800_000_000, date(1, 1, 1)),
        (253_402_300_799_999_999, date(9999, 12, 31)),
    ],
)
def test_the_day_of_times_far_from_now(time_us: int, day: date) -> None:
    """`exchange_date` is the day in UTC, before 1970 as well."""
    (row,) = decode([value(timestamp=time_us)], kafka_us=[None]).trades.rows.to_pylist()
    assert row["exchange_date"] == day
    assert row["timestamp"] == datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=time_us)


def test_a_slice_of_a_longer_batch() -> None:
    """Arrow's slices, whose buffers begin elsewhere, decode as what they show."""
    whole = messages([value(trade_id=str(i)) if i % 3 else (None, b"\1\2", value(5))[i // 3 % 3] for i in range(18)])
    for start, length in ((1, 7), (4, 0), (5, 13)):
        own = slice(start, start + length)
        part = MessageBatch(whole.rows.slice(start, length), whole.partition[own], whole.offset[own], whole.offsets)
        decoded = TradeDecoder(BINANCE, FixedSchemas((1,))).decode(part)
        wanted = [i for i in range(start, start + length) if i % 3]
        assert decoded.trades.rows["trade_id"].to_pylist() == [str(i) for i in wanted]
        assert (decoded.trades.offset - 100).tolist() == wanted
        assert len(decoded.failures.offset) == length - len(wanted)


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
def test_any_mix_of_messages_is_decoded_as_one_by_one(rows: list[tuple[bytes | None, int | None]]) -> None:
    """Each message is in exactly one result: with the oracle's reason, or as the oracle's trade at its own offset."""
    schema_ids = (1, 3, 2**31 + 5)
    decoded = decode([v for v, _ in rows], FixedSchemas(schema_ids), kafka_us=[kafka for _, kafka in rows])
    wanted = [
        judge(Message(0, i, None, v, None if kafka is None else kafka // 1000), "BINANCE", schema_ids)
        for i, (v, kafka) in enumerate(rows)
    ]
    assert reasons(decoded) == {i: reason for i, (reason, _) in enumerate(wanted) if reason}
    for offset, row in zip((decoded.trades.offset - 100).tolist(), decoded.trades.rows.to_pylist(), strict=True):
        row["trade_conditions"], row["vendor_data"] = tuple(row["trade_conditions"]), frozen_map(row["vendor_data"])
        assert tuple(row.values()) == silver_row(wanted[offset][1])


class Registry:
    """A schema registry on a free port: `answers` by schema id are (status, body); others are 404, as Confluent's."""

    def __init__(self) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.answers: dict[int, tuple[int, bytes]] = {}
        self.asked: list[str] = []

    def register(self, schema_id: int, schema: Any, **more: str) -> None:
        self.answers[schema_id] = (200, json.dumps({"schema": json.dumps(schema), **more}).encode())

    @contextmanager
    def running(self) -> Iterator[None]:
        registry = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                registry.asked.append(self.path)
                missing = (404, b'{"error_code": 40403, "message": "Schema not found"}')
                status, body = registry.answers.get(int(self.path.rpartition("/")[2]), missing)
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *arguments: object) -> None:
                """Nothing on stderr."""

        with ThreadingHTTPServer(("127.0.0.1", self.port), Handler) as server:
            thread = threading.Thread(target=server.serve_forever, args=(0.01,))
            thread.start()
            try:
                yield
            finally:
                server.shutdown()
                thread.join()


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    with made.running():
        yield made


def evolved(**changed: Any) -> dict[str, Any]:
    """TradeV2 as another writer has it: fields by name, None for one that it lacks, or what is to be different."""
    schema = json.loads(json.dumps(trade_schema()))
    schema["fields"] = [{**f, **(changed.get(f["name"]) or {})} for f in schema["fields"] if changed.get(f["name"], f)]
    return schema  # type: ignore[no-any-return]


def written(schema: Any, schema_id: int, **changed: Any) -> bytes:
    """A trade in the bytes of a writer's schema."""
    names = [field["name"] for field in schema["fields"]]
    record = {name: part for name, part in {**TRADE, **changed}.items() if name in names}
    return b"\0" + schema_id.to_bytes(4, "big") + encoded(schema, record)


def test_the_writers_schema_is_resolved_to_tradev2(registry: Registry) -> None:
    """Lacking fields take their defaults, unknown ones go into vendor_data, numbers are promoted, all in one batch."""
    older = evolved(vendor_data=None, platform_sequence=None)
    newer = evolved()
    newer["fields"].insert(3, {"name": "fee", "type": ["null", "double"], "default": None})
    narrow = evolved(source_sequence={"type": ["null", "int"]}, timestamp={"type": {"type": "long"}})
    for schema_id, schema in ((1, trade_schema()), (2, older), (3, newer), (2**32 - 1, narrow)):
        registry.register(schema_id, schema)
    values = [
        value(),
        written(older, 2, trade_id="BINANCE-2"),
        written(newer, 3, trade_id="BINANCE-3", fee=0.5),
        written(narrow, 2**32 - 1, trade_id="BINANCE-4", source_sequence=12),
        value(trade_id="BINANCE-5"),
    ]
    decoded = decode(values, RegistrySchemas(registry.url + "/", threading.Event()))
    assert reasons(decoded) == {}
    rows = {row["trade_id"]: row for row in decoded.trades.rows.to_pylist()}
    plain_row = {**rows["BINANCE-1"]}
    own = plain_row["vendor_data"]
    for row in rows.values():
        assert row == {
            **plain_row,
            "trade_id": row["trade_id"],
            "vendor_data": {"BINANCE-2": None, "BINANCE-3": [*own, ("fee", "0.5")]}.get(row["trade_id"], own),
            "source_sequence": 12 if row["trade_id"] == "BINANCE-4" else 7,
        }
    assert sorted(registry.asked) == [f"/schemas/ids/{i}" for i in (1, 2, 3, 2**32 - 1)]


def test_unknown_fields_change_no_verdict(registry: Registry) -> None:
    """A message is bad for an unknown field that cannot be read, good whatever it holds; rules see TradeV2 alone."""
    seen: list[list[str]] = []

    def look(trades: pa.RecordBatch) -> pa.BooleanArray:
        seen.append(trades.schema.names)
        return trades["vendor_data"].is_valid()

    schema = evolved()
    schema["fields"].insert(0, {"name": "exchange_date", "type": ["null", "string"], "default": None})
    registry.register(1, schema)
    whole = written(schema, 1, exchange_date="?!")
    values = [
        whole,
        whole.replace(b"?!", b"?\xff"),
        whole[:8],
        written(schema, 1, exchange_date=None, vendor_data={}),
        written(schema, 1, exchange_date="x", vendor_data={"exchange_date": "own"}),
        written(schema, 1, exchange_date="x", vendor_data=None),
    ]
    bad = {1: "invalid_utf8", 2: "truncated", 5: "no_vendor"}
    for setting in ("keep", "ignore"):
        declared = {**BINANCE.declared, "unknown_fields": setting}
        exchange = Exchange("binance", "BINANCE", declared, (Rule("no_vendor", "vendor_data", look),))
        decoded = decode(values, RegistrySchemas(registry.url, threading.Event()), exchange)
        assert reasons(decoded) == bad
        assert details(decoded)[:2] == [
            "field `exchange_date`: invalid UTF-8 at byte 8",
            "field `exchange_date`: expected 2 bytes at byte 7, 1 left",
        ]
        kept = [("exchange_date", "?!")] if setting == "keep" else []
        own = [("b", "1"), ("a", "2")]
        assert decoded.trades.rows["vendor_data"].to_pylist() == [own + kept, [], [("exchange_date", "own")]]
        assert decoded.trades.rows["exchange_date"].to_pylist() == [date(2025, 11, 24)] * 3
    assert seen == [[field["name"] for field in trade_schema()["fields"]]] * 2


def test_a_schema_is_asked_for_once(registry: Registry) -> None:
    """An id never changes its meaning, known or not."""
    registry.register(1, trade_schema())
    schemas = RegistrySchemas(registry.url, threading.Event())
    decoder = TradeDecoder(BINANCE, schemas)
    for _ in range(3):
        decoded = decoder.decode(messages([value(), value(9)]))
        assert reasons(decoded) == {1: "unknown_schema"}
    assert len(registry.asked) == 2


def test_a_schema_that_is_not_there_or_is_no_trade(registry: Registry) -> None:
    """404, another type of schema, one that cannot become TradeV2: unknown_schema, with the reason; good ones go on."""
    registry.register(1, trade_schema())
    registry.register(2, evolved(symbol=None))
    registry.register(3, {"type": "record", "name": "TradeV2", "fields": [{"name": "x", "type": "int"}]})
    registry.register(4, "string")
    registry.register(5, trade_schema(), schemaType="PROTOBUF")
    registry.answers[6] = (200, json.dumps({"schema": "{not json"}).encode())
    registry.register(7, ["null", trade_schema()])
    registry.register(8, {**trade_schema(), "fields": [*trade_schema()["fields"], {"name": "\ud800", "type": "int"}]})
    decoded = decode([value(i) for i in range(1, 10)], RegistrySchemas(registry.url, threading.Event()))
    assert reasons(decoded) == dict.fromkeys(range(1, 9), "unknown_schema")
    assert ids(decoded) == list(range(2, 10))
    shown = details(decoded)
    assert "symbol" in shown[0]
    assert "it is a union, not a record" in shown[5]
    assert "schema id 9 is not in the registry" in shown[-1]
    assert all(f"schema id {i}" in text for i, text in enumerate(shown, 2))
    assert "PROTOBUF" in shown[3]


def test_a_registry_that_is_down_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """An outage is no reason to reject a message: decoding goes on, with every trade, when the registry is back."""
    registry = Registry()
    registry.register(1, trade_schema())
    results: list[Decoded] = []
    decoder = TradeDecoder(BINANCE, RegistrySchemas(registry.url, threading.Event()))
    thread = threading.Thread(target=lambda: results.append(decoder.decode(messages([value(), value()]))))
    with caplog.at_level(logging.WARNING):
        thread.start()
        time.sleep(1)
        assert thread.is_alive()
        with registry.running():
            thread.join(30)
    (decoded,) = results
    assert decoded.trades.rows.num_rows == 2
    assert decoded.failures.rows.num_rows == 0
    assert "waiting, no message is rejected for it" in caplog.text
    assert registry.url in caplog.text


def test_a_flow_that_waits_for_the_registry_can_be_stopped() -> None:
    """The message is neither decoded nor rejected: the error ends the flow, and the next start reads it again."""
    registry, stop = Registry(), threading.Event()
    decoder = TradeDecoder(BINANCE, RegistrySchemas(registry.url, stop))
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(RegistryError, match="no schema 1 yet"):
        decoder.decode(messages([value()]))


def test_an_answer_that_is_none_is_waited_out(registry: Registry) -> None:
    """What no registry says of a schema is an outage, whatever its status: no message is rejected for it."""
    garbage = [
        *((200, body) for body in (b"<html>a captive portal</html>", b"", b"[]", b"null", b'"text"', b"{}", b"\xff")),
        *((200, body) for body in (b'{"schema": null}', b'{"schema": 5}', b'{"schema": {"type": "string"}}')),
        *((status, b"{}") for status in (204, 401, 403, 404, 429, 500, 503)),
        (404, b"<html>no such page</html>"),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}'),
    ]
    registry.answers = dict(enumerate(garbage))
    results: list[Decoded] = []

    def run(schema_id: int) -> None:
        decoder = TradeDecoder(BINANCE, RegistrySchemas(registry.url, threading.Event()))
        results.append(decoder.decode(messages([value(schema_id)])))

    threads = [threading.Thread(target=run, args=(schema_id,)) for schema_id in registry.answers]
    for thread in threads:
        thread.start()
    time.sleep(1)
    assert [thread.is_alive() for thread in threads] == [True] * len(garbage)
    for schema_id in range(len(garbage)):
        registry.register(schema_id, trade_schema())
    for thread in threads:
        thread.join(30)
    assert [result.trades.rows.num_rows for result in results] == [1] * len(garbage)


def test_a_password_in_the_registrys_address_is_not_logged(
    caplog: pytest.LogCaptureFixture, registry: Registry
) -> None:
    """It is used, as basic authentication, and masked where the address is shown."""
    registry.answers[1] = (500, b"")
    address = registry.url.replace("//", "//me:hunter2@")
    thread = threading.Thread(target=RegistrySchemas(address, threading.Event()).decoder, args=(1,))
    with caplog.at_level(logging.WARNING):
        thread.start()
        time.sleep(0.3)
        registry.register(1, trade_schema())
        thread.join(30)
    assert "waiting" in caplog.text
    assert "hunter2" not in caplog.text
