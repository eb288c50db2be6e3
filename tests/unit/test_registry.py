"""Writer schemas from a registry: resolved to TradeV2, waited for, and never a reason to reject a message."""

import gc
import json
import logging
import ssl
import subprocess
import sys
import threading
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pytest
import trustme

from k2flow.config.settings import REGISTRY_PROPERTIES, load_settings, property_origins
from k2flow.errors import RegistryError, SchemaError, SettingsError
from k2flow.exchange import Exchange, Rule
from k2flow.trades import bad_ids, registry_lookup
from k2flow.trades import registry as registry_module
from k2flow.trades.decode import DecodedBatch, TradeDecoder
from k2flow.trades.registry import FixedSchemas, RegistrySchemas, Schemas, open_schemas
from k2flow.trades.registry_lookup import NoSchemaError, UnknownSchemaError
from k2flow.trades.schema import canonical, trade_schema
from k2flow.trades.stored_schemas import StoredSchemas
from tests.messages import BINANCE, decode, details, evolved, ids, messages, reasons, value, written
from tests.registry import NO_SUCH_PATH, Registry

WAITING = "waiting, no message is rejected for it"


def wait_until(holds: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@contextmanager
def stop_once(holds: Callable[[], bool], stop: threading.Event) -> Iterator[None]:
    """Set `stop` as soon as the condition holds. A fixed time may pass before the client is even imported."""

    def watch() -> None:
        wait_until(holds)
        stop.set()

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        watcher.join()


@pytest.fixture
def registry() -> Iterator[Registry]:
    made = Registry()
    with made.running():
        yield made


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all pauses short: what a test waits for comes as soon as it can."""
    monkeypatch.setattr(registry_lookup, "_FIRST_DELAY", 0.001)
    monkeypatch.setattr(registry_lookup, "_MAX_OUTAGE_DELAY", 0.01)
    monkeypatch.setattr(registry_lookup, "_MAX_DELAY", 0.01)


def at_once(registry: Registry, wait_seconds: float = 0, stored: Mapping[int, str] | None = None) -> RegistrySchemas:
    """Return schemas for which an id is bad at the first answer that others get and it does not."""
    return RegistrySchemas({"url": registry.url}, threading.Event(), wait_seconds, stored)


def test_writer_schema_is_resolved_to_tradev2(registry: Registry) -> None:
    """Missing fields get their defaults, unknown ones go into vendor_data, numbers are promoted, all in one batch."""
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
    decoded = decode(values, RegistrySchemas({"url": registry.url + "/"}, threading.Event()))
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


def test_unknown_fields_do_not_change_validity(registry: Registry) -> None:
    """An unknown field must be readable, but its value does not matter; rules see only TradeV2."""
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
        decoded = decode(values, RegistrySchemas({"url": registry.url}, threading.Event()), exchange)
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


def test_schema_is_fetched_once(registry: Registry) -> None:
    """An id never changes its meaning. That an id is bad is remembered for a while."""
    registry.register(1, trade_schema())
    decoder = TradeDecoder(BINANCE, at_once(registry))
    for _ in range(3):
        decoded = decoder.decode(messages([value(), value(9)]))
        assert reasons(decoded) == {1: "unknown_schema"}
    assert len(registry.asked) == 2


def test_schema_that_is_missing_or_not_a_trade_is_unknown(registry: Registry) -> None:
    """Not found, not Avro, or not TradeV2: the dead letter has the reason. Good messages are trades."""
    registry.register(1, trade_schema())
    registry.register(2, evolved(symbol=None))
    registry.register(3, {"type": "record", "name": "TradeV2", "fields": [{"name": "x", "type": "int"}]})
    registry.register(4, "string")
    registry.register(5, trade_schema(), schemaType="PROTOBUF")
    registry.answers[6] = (200, json.dumps({"schema": "{not json"}).encode())
    registry.register(7, ["null", trade_schema()])
    decoded = decode([value(i) for i in range(1, 9)], at_once(registry))
    assert reasons(decoded) == dict.fromkeys(range(1, 8), "unknown_schema")
    assert ids(decoded) == list(range(2, 9))
    shown = details(decoded)
    assert "symbol" in shown[0]
    assert "it is a union, not a record" in shown[5]
    assert "schema id 8 is not in the registry" in shown[-1]
    assert all(f"schema id {i}" in text for i, text in enumerate(shown, 2))
    assert "PROTOBUF" in shown[3]


def test_registry_outage_is_waited_for(caplog: pytest.LogCaptureFixture) -> None:
    """Decoding continues, with every trade, when the registry is back."""
    registry = Registry()
    registry.register(1, trade_schema())
    results: list[DecodedBatch] = []
    decoder = TradeDecoder(BINANCE, RegistrySchemas({"url": registry.url}, threading.Event()))
    thread = threading.Thread(target=lambda: results.append(decoder.decode(messages([value(), value()]))))
    with caplog.at_level(logging.WARNING):
        thread.start()
        wait_until(lambda: "waiting" in caplog.text)
        assert thread.is_alive()
        with registry.running():
            thread.join(30)
    (decoded,) = results
    assert decoded.trades.rows.num_rows == 2
    assert decoded.dead_letters.rows.num_rows == 0
    assert WAITING in caplog.text
    assert registry.url in caplog.text


def test_waiting_flow_can_be_stopped(caplog: pytest.LogCaptureFixture) -> None:
    """Its message is neither decoded nor rejected, and the next start reads it again."""
    registry, stop = Registry(), threading.Event()
    decoder = TradeDecoder(BINANCE, RegistrySchemas({"url": registry.url}, stop))
    with stop_once(lambda: WAITING in caplog.text, stop), pytest.raises(RegistryError, match="no schema 1 yet"):
        decoder.decode(messages([value()]))


def test_flow_that_waits_for_a_bad_id_can_be_stopped(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    stop = threading.Event()
    decoder = TradeDecoder(BINANCE, RegistrySchemas({"url": registry.url}, stop, 600))
    with stop_once(lambda: "asking again for" in caplog.text, stop), pytest.raises(RegistryError, match="no schema 9"):
        decoder.decode(messages([value(9)]))


GARBAGE = [
    *((200, body) for body in (b"<html>a captive portal</html>", b"", b"[]", b"null", b'"text"', b"{}", b"\xff")),
    *((200, body) for body in (b'{"schema": null}', b'{"schema": 5}', b'{"schema": {"type": "string"}}')),
    *((status, b"{}") for status in (204, 301, 302, 400, 401, 403, 404, 407, 408, 418, 422, 429, 500, 502, 503, 504)),
    (404, b"<html>no such page</html>"),
    NO_SUCH_PATH,
]
"""What something else than a registry answers."""


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("garbage", GARBAGE, ids=str)
def test_answer_of_something_else_is_waited_out(
    registry: Registry, caplog: pytest.LogCaptureFixture, garbage: tuple[int, bytes]
) -> None:
    """If no id is answered, it is an outage, whatever the answers: no message is rejected for it."""
    registry.every_answer = garbage
    registry.register(7, trade_schema())
    results: list[DecodedBatch] = []
    decoder = TradeDecoder(BINANCE, at_once(registry, 60))
    thread = threading.Thread(target=lambda: results.append(decoder.decode(messages([value(7)]))))
    thread.start()
    wait_until(lambda: caplog.text.count(WAITING) >= 3)
    assert "dead letter" not in caplog.text
    registry.every_answer = None
    thread.join(30)
    (decoded,) = results
    assert decoded.trades.rows.num_rows == 1


ABSURD = 2**32 - 1
REFUSALS = [(s, b) for s, b in GARBAGE if s not in (301, 302, 401, 403, 407, 408, 429)]


@pytest.mark.parametrize("schema_id", [0, 9, 2**31 - 1, 2**31, ABSURD])
def test_id_that_the_registry_does_not_have_is_bad(
    registry: Registry, caplog: pytest.LogCaptureFixture, schema_id: int
) -> None:
    """Other messages of the batch are trades. The log names the first message that waits, the detail the answer."""
    registry.register(1, trade_schema())
    decoded = decode([value(), value(schema_id), value(), value(schema_id)], at_once(registry, 0.05))
    assert reasons(decoded) == {1: "unknown_schema", 3: "unknown_schema"}
    assert all(f"schema id {schema_id}" in text and "HTTP status code 404" in text for text in details(decoded))
    assert f"its messages are dead letters, first {BINANCE.settings.topic}[1] offset 101" in caplog.text


@pytest.mark.parametrize("answer", REFUSALS, ids=str)
def test_id_for_which_alone_the_registry_has_no_schema_is_bad(registry: Registry, answer: tuple[int, bytes]) -> None:
    registry.register(1, trade_schema())
    registry.answers[ABSURD] = answer
    decoded = decode([value(ABSURD), value()], at_once(registry))
    assert reasons(decoded) == {0: "unknown_schema"}
    assert f"schema id {ABSURD}: the registry answers for others, but has none" in details(decoded)[0]


def test_bad_id_is_found_where_others_are_only_known_by_heart(registry: Registry) -> None:
    """A registry that answers every unknown id alike has the id of a good message."""
    registry.register(1, trade_schema())
    del registry.answers["/schemas/types"]
    registry.other_answer = (404, b"not here")
    assert reasons(decode([value(ABSURD), value()], at_once(registry))) == {0: "unknown_schema"}


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("status", "hint"),
    [(401, "denies access: check the credentials"), (403, "denies access"), (429, "is busy"), (302, "redirects: set")],
)
def test_denied_or_busy_id_is_waited_for(
    registry: Registry, caplog: pytest.LogCaptureFixture, status: int, hint: str
) -> None:
    """Rights and load may change: the answer says nothing of the id."""
    registry.register(1, trade_schema())
    registry.answers[7] = (status, b"{}")
    stop = threading.Event()
    schemas = RegistrySchemas({"url": registry.url}, stop, 0)
    with stop_once(lambda: caplog.text.count(WAITING) >= 3, stop), pytest.raises(RegistryError, match=hint):
        decode([value(), value(7)], schemas)


@pytest.mark.usefixtures("impatient")
def test_server_error_for_every_id_that_is_not_in_memory_is_an_outage(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """So a registry answers whose storage is down. It has its types, and the ids that it has answered before."""
    registry.register(1, trade_schema())
    registry.other_answer = (500, b'{"error_code": 50001, "message": "no storage"}')
    stop = threading.Event()
    schemas = RegistrySchemas({"url": registry.url}, stop, 0)
    with stop_once(lambda: caplog.text.count(WAITING) >= 3, stop), pytest.raises(RegistryError, match="no storage"):
        decode([value(), value(7)], schemas)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("late", [8, ABSURD])
def test_id_that_appears_in_time_is_no_dead_letter(registry: Registry, late: int) -> None:
    """A replica may lag behind the one that gave the id."""
    registry.register(1, trade_schema())
    results: list[DecodedBatch] = []
    decoder = TradeDecoder(BINANCE, at_once(registry, 60))
    batch = messages([value(), value(late)])
    thread = threading.Thread(target=lambda: results.append(decoder.decode(batch)))
    thread.start()
    wait_until(lambda: registry.asked.count(f"/schemas/ids/{late}") >= 3)
    registry.register(late, trade_schema())
    thread.join(30)
    (decoded,) = results
    assert decoded.trades.rows.num_rows == 2


@pytest.mark.usefixtures("impatient")
def test_outage_does_not_count_as_time_in_which_an_id_is_missing(registry: Registry) -> None:
    """A registry that fails between two 'not found' may have lost its replica: the wait begins again."""
    schemas = at_once(registry, 0.2)
    asked: list[float] = []

    def fetch(schema_id: int) -> str:
        asked.append(time.monotonic())
        if len(asked) == 3:
            raise RegistryError("down")
        raise NoSchemaError("none", "none", not_found=True, server_error=False)

    schemas.__dict__["_client"] = SimpleNamespace(fetch=fetch)
    with pytest.raises(UnknownSchemaError):
        schemas.decoder(5)
    assert asked[-1] - asked[3] >= 0.19


def test_bad_id_that_appears_heals_without_a_restart(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is asked for again at intervals, without another wait."""
    registry.register(1, trade_schema())
    decoder = TradeDecoder(BINANCE, at_once(registry, 0.01))
    batch = messages([value(), value(9)])
    assert reasons(decoder.decode(batch)) == {1: "unknown_schema"}
    registry.register(9, trade_schema())
    assert reasons(decoder.decode(batch)) == {1: "unknown_schema"}
    later = time.monotonic() + bad_ids.ASK_AGAIN_SECONDS
    monkeypatch.setattr(bad_ids, "time", SimpleNamespace(monotonic=lambda: later))
    assert reasons(decoder.decode(batch)) == {}


def test_bad_id_stays_bad_while_the_registry_is_down(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry has said so. Messages of other ids do not wait for it."""
    registry.register(1, trade_schema())
    monkeypatch.setattr(bad_ids, "ASK_AGAIN_SECONDS", 0.0)
    decoder = TradeDecoder(BINANCE, at_once(registry))
    batch = messages([value(), value(9)])
    assert reasons(decoder.decode(batch)) == {1: "unknown_schema"}
    registry.every_answer = (503, b"")
    assert reasons(decoder.decode(batch)) == {1: "unknown_schema"}
    asked = len(registry.asked)
    assert reasons(decoder.decode(batch)) == {1: "unknown_schema"}
    assert len(registry.asked) == asked


def test_flood_of_bad_ids_costs_few_waits(registry: Registry, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every message has another id. Requests, waits and memory are bounded; good messages are trades."""
    monkeypatch.setattr(registry_lookup, "MAX_ASKED", 30)
    monkeypatch.setattr(registry_lookup, "MAX_ASKED_AGAIN", 3)
    monkeypatch.setattr(bad_ids, "MAX_BAD_IDS", 20)
    registry.register(1, trade_schema())
    schemas = at_once(registry, 0.1)
    decoder = TradeDecoder(BINANCE, schemas)
    starts = (100, 1_000, 10_000, 100_000, 1_000_000)
    for first in starts:
        decoded = decoder.decode(messages([value(), *(value(i) for i in range(first, first + 200))]))
        assert reasons(decoded) == dict.fromkeys(range(1, 201), "unknown_schema")
        assert all(text.startswith("schema id ") for text in details(decoded))
        assert len(schemas._ids._bad) <= 20
    again = Counter(registry.asked)
    assert len(again) == len(starts) * 30
    assert sum(count > 1 for count in again.values()) <= len(starts) * 3


def test_waits_for_bad_ids_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three whole waits, then a tenth of the time."""
    now = 0.0
    monkeypatch.setattr(bad_ids, "time", SimpleNamespace(monotonic=lambda: now))
    allowance = bad_ids.WaitAllowance(10)
    waited = 0.0
    while now < 1000:
        wait = allowance.left()
        allowance.spend(wait)
        waited += wait
        now += wait + 1
    assert 30 + 90 < waited < 30 + 110
    now += 10_000
    assert [allowance.left(), allowance.spend(10), allowance.left()] == [10, None, 10]


def test_password_in_the_address_is_used_and_not_logged(caplog: pytest.LogCaptureFixture, registry: Registry) -> None:
    """It is sent as basic authentication, and masked wherever the address is shown."""
    registry.every_answer = (500, b"")
    address = registry.url.replace("//", "//me:hunter2@")
    thread = threading.Thread(target=RegistrySchemas({"url": address}, threading.Event()).decoder, args=(1,))
    with caplog.at_level(logging.WARNING):
        thread.start()
        wait_until(lambda: "waiting" in caplog.text)
        registry.register(1, trade_schema())
        registry.every_answer = None
        thread.join(30)
    assert "waiting" in caplog.text
    assert "hunter2" not in caplog.text


PROPERTIES = "K2FLOW_SCHEMA_REGISTRY_"


def schemas_of(monkeypatch: pytest.MonkeyPatch, url: str, **properties: str) -> Schemas:
    """Return the schemas that a flow with these settings uses."""
    monkeypatch.setenv(f"{PROPERTIES}URL", url)
    for name, value_ in properties.items():
        monkeypatch.setenv(f"{PROPERTIES}{name}", value_)
    return open_schemas(load_settings(["binance"]), threading.Event())


SIDE = {"type": "enum", "name": "TradeSide", "namespace": "market", "symbols": ["BUY", "SELL", "SELL_SHORT", "UNKNOWN"]}
OF_SIDE = {"name": "market.TradeSide", "subject": "side", "version": 2}


@pytest.mark.parametrize("name", ["market.TradeSide", "side.avsc"])
def test_references_are_resolved(registry: Registry, name: str) -> None:
    """Types of other subjects, also of their references, one that two of them share, and one inside another.

    The name of a reference means nothing: registries accept any.
    """
    kind = {"type": "enum", "name": "Kind", "symbols": ["A", "B"]}
    leg = {
        "type": "record",
        "name": "Leg",
        "namespace": "market",
        "fields": [{"name": "side", "type": "TradeSide"}, {"name": "kind", "type": kind}],
    }
    schema = evolved(side={"type": "market.TradeSide"})
    schema["fields"] += [{"name": "kind", "type": "market.Kind"}, {"name": "leg", "type": "market.Leg"}]
    of_side = {**OF_SIDE, "name": name}
    of_leg = {"name": "market.Leg", "subject": "leg", "version": 1}
    registry.register(1, schema, references=[of_leg, of_side])
    registry.register_version("leg", 1, leg, references=[of_side])
    registry.register_version("side", 2, SIDE)
    whole = json.loads(json.dumps(schema))
    whole["fields"] = [{**f, "type": SIDE} if f["name"] == "side" else f for f in whole["fields"]]
    whole["fields"][-2]["type"] = {**kind, "namespace": "market"}
    whole["fields"][-1]["type"] = {**leg, "fields": [leg["fields"][0], {"name": "kind", "type": "market.Kind"}]}
    payload = written(whole, 1, kind="B", leg={"side": "SELL", "kind": "A"})
    decoded = decode([payload, payload[:-1]], at_once(registry))
    assert reasons(decoded) == {1: "truncated"}
    (row,) = decoded.trades.rows.to_pylist()
    assert row["side"] == "BUY"
    assert ("leg", '{"side":"SELL","kind":"A"}') in row["vendor_data"]
    assert sorted(registry.asked)[-2:] == [
        f"/subjects/{name}?deleted=true" for name in ("leg/versions/1", "side/versions/2")
    ]


@pytest.mark.usefixtures("impatient")
def test_missing_reference_is_waited_for(registry: Registry) -> None:
    """It may be on its way to a replica. If it does not come, only this id is bad."""
    registry.register(1, trade_schema())
    registry.register(2, evolved(side={"type": "market.TradeSide"}), references=[OF_SIDE])
    path = "/subjects/side/versions/2"
    registry.answers[path] = (404, b'{"error_code": 40402, "message": "Version not found"}')
    decoded = decode([value(), value(2)], at_once(registry, 0.05))
    assert reasons(decoded) == {1: "unknown_schema"}
    assert "Version not found" in details(decoded)[0]
    assert registry.asked.count(f"{path}?deleted=true") >= 2
    registry.register_version("side", 2, SIDE)
    assert reasons(decode([value(), value(2)], at_once(registry))) == {}


def test_references_in_a_circle_are_an_unknown_schema(registry: Registry) -> None:
    """Of types, or only of schemas."""
    part = {"type": "record", "name": "Part", "namespace": "market", "fields": [{"name": "of", "type": "market.Whole"}]}
    whole = {
        "type": "record",
        "name": "Whole",
        "namespace": "market",
        "fields": [{"name": "has", "type": "market.Part"}],
    }
    of_part, of_whole = ({"name": n, "subject": n, "version": 1} for n in ("part", "whole"))
    registry.register(1, evolved(symbol={"type": "market.Part"}), references=[of_part])
    registry.register_version("part", 1, part, references=[of_whole])
    registry.register_version("whole", 1, whole, references=[of_part])
    decoded = decode([value()], at_once(registry))
    assert reasons(decoded) == {0: "unknown_schema"}
    assert "symbol" in details(decoded)[0]


def test_type_without_a_reference_is_an_unknown_schema(registry: Registry) -> None:
    schema = evolved(side={"type": "market.TradeSide"}, symbol={"type": "market.Symbol"})
    registry.register(1, schema, references=[OF_SIDE])
    registry.register_version("side", 2, SIDE)
    decoded = decode([value()], at_once(registry))
    assert reasons(decoded) == {0: "unknown_schema"}
    assert "schema id 1 does not resolve to TradeV2" in details(decoded)[0]
    assert "market.Symbol" in details(decoded)[0]


STORED = canonical(trade_schema())


def test_text_of_the_tables_is_used_where_the_registry_has_none(
    registry: Registry, caplog: pytest.LogCaptureFixture
) -> None:
    """A schema that was deleted, or a registry that does not answer."""
    schemas = at_once(registry, 60, {1: STORED})
    assert reasons(decode([value()], schemas)) == {}
    assert "the tables have its text" in caplog.text
    down = RegistrySchemas({"url": Registry().url}, threading.Event(), 60, {1: STORED})
    assert reasons(decode([value()], down)) == {}


def test_id_with_another_text_than_the_tables_have_is_an_error(registry: Registry) -> None:
    """Another registry gives the same ids: values would be wrong. Spaces, documentation and order mean nothing."""
    same = {"doc": "other", **trade_schema()}
    registry.answers[1] = (200, json.dumps({"schema": json.dumps(same, indent=2, sort_keys=True)}).encode())
    registry.register(2, evolved(vendor_data=None))
    registry.register(3, "string", schemaType="JSON")
    assert reasons(decode([value()], at_once(registry, 0, {1: STORED}))) == {}
    for schema_id in (2, 3):
        with pytest.raises(SchemaError, match=f"schema id {schema_id} has another schema than the one that the tables"):
            decode([value(schema_id)], at_once(registry, 0, {schema_id: STORED}))
    with pytest.raises(SchemaError, match="schema id 1 has another schema"):
        FixedSchemas((1,), {1: canonical(evolved(vendor_data=None))})


def test_texts_that_the_tables_lack_are_offered_up_to_a_limit(
    registry: Registry, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for schema_id in (1, 2, 3):
        registry.register(schema_id, trade_schema())
    schemas = at_once(registry, 0, {1: STORED})
    assert reasons(decode([value(1), value(2), value(9)], schemas)) == {2: "unknown_schema"}
    assert schemas.new_texts() == {2: STORED}
    monkeypatch.setattr(registry_module, "MAX_STORED_BYTES", 2 * len(STORED))
    assert reasons(decode([value(3)], schemas)) == {}
    assert schemas.new_texts() == {2: STORED}
    assert "take no more" in caplog.text


@pytest.mark.parametrize(
    ("address", "properties", "authorization"),
    [
        ("", {}, None),
        ("me:hunter2@", {}, "Basic bWU6aHVudGVyMg=="),
        ("", {"BASIC_AUTH_USER_INFO": "me:hunter2"}, "Basic bWU6aHVudGVyMg=="),
        ("", {"BEARER_AUTH_TOKEN": "token"}, "Bearer token"),
    ],
)
def test_credentials_are_sent(
    registry: Registry,
    monkeypatch: pytest.MonkeyPatch,
    address: str,
    properties: dict[str, str],
    authorization: str | None,
) -> None:
    registry.register(1, trade_schema())
    schemas_of(monkeypatch, registry.url.replace("//", f"//{address}"), **properties).decoder(1)
    assert registry.authorizations == [authorization]


@pytest.mark.parametrize("variable", [f"{PROPERTIES}SSL_CA_LOCATION", "REQUESTS_CA_BUNDLE"])
def test_private_authority_is_trusted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(context)
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    registry = Registry(context)
    registry.register(1, trade_schema())
    with registry.running():
        stop = threading.Event()
        stop.set()
        with pytest.raises(RegistryError, match="certificate verify failed"):
            RegistrySchemas({"url": registry.url}, stop).decoder(1)
        monkeypatch.setenv(variable, str(tmp_path / "ca.pem"))
        schemas_of(monkeypatch, registry.url).decoder(1)


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("SSL_CA_LOCATION", "/nowhere/ca.pem", "No such file"),
        ("SSL_KEY_LOCATION", "/nowhere/key.pem", "ssl.certificate.location required"),
        ("BASIC_AUTH_USER_INFO", "hunter2", "must be in the form"),
        ("BEARER_AUTH_CLIENT_ID", "me", "Missing required OAuth"),
    ],
)
def test_wrong_property_is_an_error(monkeypatch: pytest.MonkeyPatch, name: str, wrong: str, message: str) -> None:
    schemas = schemas_of(monkeypatch, "http://127.0.0.1:1", **{name: wrong})
    with pytest.raises(SettingsError, match=f"a {PROPERTIES}\\* setting is wrong: .*{message}") as caught:
        schemas.decoder(1)
    assert "hunter2" not in str(caught.value)


def test_unknown_property_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match=f"unknown setting {PROPERTIES}SSL_CA: did you mean {PROPERTIES}SSL_CA_LOC"):
        schemas_of(monkeypatch, "http://127.0.0.1:1", SSL_CA="x")


def test_properties_are_shown_with_secrets_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = (
        "BASIC_AUTH_USER_INFO",
        "BEARER_AUTH_TOKEN",
        "BEARER_AUTH_CLIENT_SECRET",
        "SSL_KEY_PASSWORD",
        "BEARER_AUTH_CREDENTIALS_SOURCE",
    )
    for name in REGISTRY_PROPERTIES:
        monkeypatch.setenv(PROPERTIES + name.upper().replace(".", "_"), "http://me:hunter2@proxy:80")
    origins = [each for each in property_origins(load_settings()) if each.name.startswith(PROPERTIES)]
    shown = {each.name.removeprefix(PROPERTIES): each.value for each in origins}
    assert len(shown) == len(REGISTRY_PROPERTIES)
    assert {name for name, value_ in shown.items() if value_ == "****"} == set(secrets)
    assert "hunter2" not in str(shown)


def test_client_is_imported_only_for_a_registry() -> None:
    code = "import sys, k2flow.trades.registry, k2flow.flow; print('confluent_kafka.schema_registry' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("source", ["fixed ids", "registry", "stored texts"])
def test_batch_is_freed_after_decoding(source: str, registry: Registry) -> None:
    """An error that is kept keeps no frame: each of a batch's bad ids would keep the batch in memory."""
    known, refused, unknown = 1, 2, 3
    other = evolved(price={"type": "double"})
    registry.register(known, trade_schema())
    registry.register(refused, other)
    stored = {f"k2flow.schema.binance.{refused}": canonical(other)}
    schemas = {
        "fixed ids": FixedSchemas((known,)),
        "registry": at_once(registry),
        "stored texts": StoredSchemas(load_settings(), stored, "binance"),
    }[source]
    decoder = TradeDecoder(BINANCE, schemas)
    gc.collect()
    gc.disable()
    try:
        for _ in range(2):
            batch = messages([value(schema_id=i) for i in (known, refused, unknown)])
            alive = weakref.ref(batch)
            assert set(reasons(decoder.decode(batch)).values()) == {"unknown_schema"}
            del batch
            assert alive() is None
    finally:
        gc.enable()
