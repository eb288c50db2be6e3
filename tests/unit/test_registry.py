"""Writer schemas from a registry: resolved to TradeV2, waited for, and never a reason to reject a message."""

import json
import logging
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import date
from pathlib import Path

import pyarrow as pa
import pytest
import trustme

from k2flow.config.settings import REGISTRY_PROPERTIES, load_settings, property_origins
from k2flow.errors import RegistryError, SettingsError
from k2flow.exchange import Exchange, Rule
from k2flow.trades.decode import DecodedBatch, TradeDecoder
from k2flow.trades.registry import RegistrySchemas, Schemas, open_schemas
from k2flow.trades.schema import trade_schema
from tests.messages import BINANCE, decode, details, evolved, ids, messages, reasons, value, written
from tests.registry import Registry

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
    """An id never changes its meaning, known or not."""
    registry.register(1, trade_schema())
    schemas = RegistrySchemas({"url": registry.url}, threading.Event())
    decoder = TradeDecoder(BINANCE, schemas)
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
    registry.register(8, {**trade_schema(), "fields": [*trade_schema()["fields"], {"name": "\ud800", "type": "int"}]})
    decoded = decode([value(i) for i in range(1, 10)], RegistrySchemas({"url": registry.url}, threading.Event()))
    assert reasons(decoded) == dict.fromkeys(range(1, 9), "unknown_schema")
    assert ids(decoded) == list(range(2, 10))
    shown = details(decoded)
    assert "symbol" in shown[0]
    assert "it is a union, not a record" in shown[5]
    assert "schema id 9 is not in the registry" in shown[-1]
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


def test_waiting_flow_can_be_stopped() -> None:
    """Its message is neither decoded nor rejected, and the next start reads it again."""
    registry, stop = Registry(), threading.Event()
    decoder = TradeDecoder(BINANCE, RegistrySchemas({"url": registry.url}, stop))
    threading.Timer(0.5, stop.set).start()
    with pytest.raises(RegistryError, match="no schema 1 yet"):
        decoder.decode(messages([value()]))


def test_answer_of_something_else_is_waited_out(registry: Registry) -> None:
    """Such an answer is an outage, whatever its status: no message is rejected for it."""
    garbage = [
        *((200, body) for body in (b"<html>a captive portal</html>", b"", b"[]", b"null", b'"text"', b"{}", b"\xff")),
        *((200, body) for body in (b'{"schema": null}', b'{"schema": 5}', b'{"schema": {"type": "string"}}')),
        *((status, b"{}") for status in (204, 401, 403, 404, 429, 500, 503)),
        (404, b"<html>no such page</html>"),
        (404, b'{"error_code": 404, "message": "HTTP 404 Not Found"}'),
    ]
    registry.answers = dict(enumerate(garbage))
    results: list[DecodedBatch] = []

    def run(schema_id: int) -> None:
        decoder = TradeDecoder(BINANCE, RegistrySchemas({"url": registry.url}, threading.Event()))
        results.append(decoder.decode(messages([value(schema_id)])))

    threads = [threading.Thread(target=run, args=(schema_id,), daemon=True) for schema_id in registry.answers]
    for thread in threads:
        thread.start()
    wait_until(lambda: len(set(registry.asked)) == len(garbage))
    time.sleep(0.5)
    assert [thread.is_alive() for thread in threads] == [True] * len(garbage)
    for schema_id in range(len(garbage)):
        registry.register(schema_id, trade_schema())
    wait_until(lambda: len(results) == len(garbage), 60)
    assert [result.trades.rows.num_rows for result in results] == [1] * len(garbage)


def test_password_in_the_address_is_used_and_not_logged(caplog: pytest.LogCaptureFixture, registry: Registry) -> None:
    """It is sent as basic authentication, and masked wherever the address is shown."""
    registry.answers[1] = (500, b"")
    address = registry.url.replace("//", "//me:hunter2@")
    thread = threading.Thread(target=RegistrySchemas({"url": address}, threading.Event()).decoder, args=(1,))
    with caplog.at_level(logging.WARNING):
        thread.start()
        wait_until(lambda: "waiting" in caplog.text)
        registry.register(1, trade_schema())
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


def test_references_are_resolved(registry: Registry) -> None:
    """Types of other subjects, also of their references, and one that two of them share."""
    side = {
        "type": "enum",
        "name": "TradeSide",
        "namespace": "market",
        "symbols": ["BUY", "SELL", "SELL_SHORT", "UNKNOWN"],
    }
    leg = {
        "type": "record",
        "name": "Leg",
        "namespace": "market",
        "fields": [{"name": "side", "type": "market.TradeSide"}],
    }
    schema = evolved(side={"type": "market.TradeSide"})
    schema["fields"].append({"name": "leg", "type": "market.Leg"})
    of_side = {"name": "market.TradeSide", "subject": "side", "version": 2}
    of_leg = {"name": "market.Leg", "subject": "leg", "version": 1}
    registry.register(1, schema, references=[of_leg, of_side])
    registry.register_version("leg", 1, leg, references=[of_side])
    registry.register_version("side", 2, side)
    whole = json.loads(json.dumps(schema))
    whole["fields"] = [{**f, "type": side} if f["name"] == "side" else f for f in whole["fields"]]
    whole["fields"][-1]["type"] = leg
    payload = written(whole, 1, leg={"side": "SELL"})
    decoded = decode([payload, payload[:-1]], RegistrySchemas({"url": registry.url}, threading.Event()))
    assert reasons(decoded) == {1: "truncated"}
    (row,) = decoded.trades.rows.to_pylist()
    assert row["side"] == "BUY"
    assert ("leg", '{"side":"SELL"}') in row["vendor_data"]
    assert sorted(registry.asked)[-2:] == [
        f"/subjects/{name}?deleted=true" for name in ("leg/versions/1", "side/versions/2")
    ]


def test_missing_reference_is_waited_for(registry: Registry, caplog: pytest.LogCaptureFixture) -> None:
    """The registry knows the schema, so its messages are not rejected."""
    schema = evolved(side={"type": "market.TradeSide"})
    registry.register(1, schema, references=[{"name": "market.TradeSide", "subject": "side", "version": 2}])
    registry.answers["/subjects/side/versions/2"] = (404, b'{"error_code": 40402, "message": "Version not found"}')
    stop = threading.Event()
    with (
        stop_once(lambda: WAITING in caplog.text, stop),
        pytest.raises(RegistryError, match=r"no schema 1 yet .*Version"),
    ):
        RegistrySchemas({"url": registry.url}, stop).decoder(1)
    assert WAITING in caplog.text


def test_type_without_a_reference_is_an_unknown_schema(registry: Registry) -> None:
    schema = evolved(side={"type": "market.TradeSide"}, symbol={"type": "market.Symbol"})
    registry.register(1, schema, references=[{"name": "market.TradeSide", "subject": "side", "version": 2}])
    registry.register_version(
        "side", 2, {"type": "enum", "name": "TradeSide", "namespace": "market", "symbols": ["BUY"]}
    )
    decoded = decode([value()], RegistrySchemas({"url": registry.url}, threading.Event()))
    assert reasons(decoded) == {0: "unknown_schema"}
    assert "schema id 1 is not valid with its references" in details(decoded)[0]
    assert "market.Symbol" in details(decoded)[0]


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
        threading.Timer(0.3, stop.set).start()
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
