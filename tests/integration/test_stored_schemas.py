"""Schemas kept with the tables: audits and reprocessing need no registry, and never call right tables broken."""

import json
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.expressions import EqualTo

from k2flow.audit import AuditReport
from k2flow.audit.report import Severity, Verdict
from k2flow.config.settings import load_settings
from k2flow.errors import CommitError, RegistryError, ReprocessError
from k2flow.exchange import Exchange, Rule, exchange_names, find_exchange
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.tables import create, definitions
from k2flow.layers import BRONZE, DLQ, GOLD, SILVER
from k2flow.reprocess import Outcome, replay, reprocess
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MessageBatch
from k2flow.trades.registry import FixedSchemas, RegistrySchemas
from k2flow.trades.schema import canonical, trade_schema
from k2flow.trades.stored_schemas import schema_properties, stored_texts
from tests.audited_lake import AuditedLake
from tests.messages import evolved
from tests.pipeline import SchemasOf
from tests.registry import Registry
from tests.unit.test_registry import at_once

BINANCE = find_exchange("binance")
PROPERTY = "k2flow.schema.binance.{}"
RARE = 2  # the schema id of a few messages


def none(trades: pa.RecordBatch) -> pa.BooleanArray:
    return pa.array([False] * trades.num_rows)


STRICT = replace(BINANCE, rules=(Rule("no_trades", "price", none),))


def with_rare_ids(messages: MessageBatch) -> MessageBatch:
    """Give the first messages of a partition another schema id."""
    values = [
        bytes([*payload[:4], RARE, *payload[5:]]) if rare and payload and payload[:5] == b"\0\0\0\0\1" else payload
        for payload, rare in zip(messages.rows["value"].to_pylist(), (messages.offset < 20).tolist(), strict=True)
    ]
    return replace(messages, rows=messages.rows.set_column(1, "value", pa.array(values, pa.binary())))


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[Registry]:
    """A registry that has both ids. The audits of a test use it."""
    made = Registry()
    for schema_id in (1, RARE):
        made.register(schema_id, trade_schema())
    monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", made.url)
    with made.running():
        yield made


def schemas_of(registry: Registry) -> SchemasOf:
    return lambda stored: at_once(registry, 0, stored)


@pytest.fixture
def lake(tmp_path: Path, registry: Registry) -> AuditedLake:
    return AuditedLake(tmp_path, replace(BINANCE), schemas=schemas_of(registry), change=with_rare_ids)


def certain_id(messages: MessageBatch) -> str:
    """Return the id of a trade that only one message gives, with the schema that most have."""
    decoder = TradeDecoder(BINANCE, FixedSchemas((1, RARE)))
    later = decoder.decode(messages.filter(messages.offset >= 20)).trades.rows["message_id"].to_pylist()
    counts = Counter(decoder.decode(messages).trades.rows["message_id"].to_pylist())
    return next(each for each in later if counts[each] == 1)


def forget(lake: AuditedLake, schema_id: int) -> None:
    """Make the tables as those of a version that kept no schemas."""
    with lake.table(BRONZE).transaction() as transaction:
        transaction.remove_properties(PROPERTY.format(schema_id))


def down(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", Registry().url)


def reprocessed(lake: AuditedLake, exchange: Exchange) -> Outcome:
    today = datetime.now(UTC).date()
    with lake.environment():
        settings = load_settings(exchange_names())
        return reprocess(lake.catalog, settings, exchange, today - timedelta(1), today + timedelta(1))


def replayed(lake: AuditedLake, first: date | None = None) -> Outcome:
    with lake.environment():
        return replay(lake.catalog, load_settings(exchange_names()), lake.exchange, first=first)


def rows(lake: AuditedLake) -> dict[str, int]:
    return {layer.name: lake.table(layer).scan().count() for layer in (SILVER, DLQ, GOLD)}


def checks(report: AuditReport) -> dict[str, Severity]:
    return {finding.check: finding.severity for finding in report.findings}


def test_texts_survive_what_else_writes_properties(lake: AuditedLake) -> None:
    wanted = {PROPERTY.format(schema_id): canonical(trade_schema()) for schema_id in (1, RARE)}
    assert wanted.items() <= lake.table(BRONZE).properties.items()
    assert not [key for layer in (SILVER, DLQ, GOLD) for key in lake.table(layer).properties if "k2flow.schema" in key]
    create(lake.catalog, definitions(lake.exchange).values())
    reprocessed(lake, STRICT)
    assert wanted.items() <= lake.table(BRONZE).properties.items()


def test_audit_and_reprocessing_need_no_registry(lake: AuditedLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor one that has deleted the schemas, or gives the ids to others, or none at all."""
    registry = Registry()
    for schema_id in (1, RARE):
        registry.register(schema_id, evolved(vendor_data=None))
    with registry.running():
        monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", registry.url)
        assert lake.audit().findings == []
    assert lake.audit().findings == []
    monkeypatch.delenv("K2FLOW_SCHEMA_REGISTRY_URL")
    monkeypatch.setenv("K2FLOW_SCHEMA_IDS", "77")
    assert lake.audit().findings == []
    before = rows(lake)
    reprocessed(lake, STRICT)
    assert rows(lake)["silver"] == 0
    reprocessed(lake, BINANCE)
    assert rows(lake) == before
    assert lake.audit().findings == []
    assert registry.asked
    assert not {"/schemas/ids/1", f"/schemas/ids/{RARE}"} & set(registry.asked)


@pytest.mark.parametrize("deleted", [False, True])
def test_tables_whose_schema_is_gone_cannot_be_checked(
    lake: AuditedLake, registry: Registry, monkeypatch: pytest.MonkeyPatch, deleted: bool
) -> None:
    """They are not broken: the audit names the id. What it can check it does."""
    forget(lake, RARE)
    assert lake.audit().findings == []
    if deleted:
        del registry.answers[RARE]
    else:
        down(monkeypatch)
    report = lake.audit()
    assert report.verdict is Verdict.UNKNOWN
    assert {finding.severity for finding in report.findings} <= {Severity.UNKNOWN, Severity.NOTE}
    (finding,) = (each for each in report.findings if each.severity is Severity.UNKNOWN)
    assert finding.check == "schema_unknown"
    assert f"messages of schema id {RARE} cannot be checked" in finding.text
    assert finding.samples
    with lake.restored():
        lake.table(SILVER).delete(EqualTo("message_id", certain_id(lake.messages)))
        assert checks(lake.audit()).get("in_neither") is Severity.BROKEN, lake.audit().findings
    with pytest.raises(ReprocessError, match=rf"cannot be decoded any more \(schema id {RARE}: .*restore its schema"):
        reprocessed(lake, BINANCE)


def test_refused_messages_whose_schema_is_registered_later_are_noted(
    tmp_path: Path, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tables are right. A replay recovers the messages, and keeps the schema that it used."""
    known = registry.answers.pop(RARE)
    lake = AuditedLake(tmp_path, replace(BINANCE), schemas=schemas_of(registry), change=with_rare_ids)
    assert PROPERTY.format(RARE) not in lake.table(BRONZE).properties
    refused = lake.table(DLQ).scan(row_filter="reason = 'unknown_schema'").count()
    assert refused > 10
    assert lake.audit().findings == []
    down(monkeypatch)
    assert lake.audit().findings == []
    with pytest.raises(RegistryError):
        replayed(lake)
    monkeypatch.setenv("K2FLOW_SCHEMA_REGISTRY_URL", registry.url)
    assert replayed(lake).moved == {}
    registry.answers[RARE] = known
    (finding,) = lake.audit().findings
    assert (finding.check, finding.severity) == ("refused_too_early", Severity.NOTE)
    assert f"schema id {RARE} is known today: `k2flow dlq replay binance`" in finding.text
    with lake.restored():
        lake.damage(DLQ, "payload", lambda value: (value or b"") + b"?")
        assert checks(lake.audit())["dlq_changed"] is Severity.BROKEN
    before = rows(lake)
    moved = sum(count for (_, now), count in replayed(lake).moved.items() if now == "valid")
    assert 10 < moved <= refused
    assert rows(lake)["silver"] == before["silver"] + moved
    down(monkeypatch)
    assert [finding.severity for finding in lake.audit().findings] in ([], [Severity.NOTE])
    assert stored_texts(lake.table(BRONZE).properties, "binance").keys() == {1, RARE}


def test_dead_letters_stay_as_they_are_without_their_schema(lake: AuditedLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """A letter of another reason does not become `unknown_schema` because a registry is down."""
    forget(lake, 1)
    forget(lake, RARE)
    down(monkeypatch)
    before = rows(lake)
    with pytest.raises(RegistryError):
        replayed(lake)
    assert rows(lake) == before


def test_flow_continues_with_the_texts_of_its_tables(lake: AuditedLake) -> None:
    """A restart offers no text again; one that differs is refused by the commit, too."""
    bronze = lake.table(BRONZE)
    texts = stored_texts(bronze.properties, "binance")
    restarted = RegistrySchemas({"url": Registry().url}, threading.Event(), 0, texts)
    assert restarted.decoder(1).unknown_fields == ()
    assert restarted.new_texts() == {}
    committer = Committer(lake.catalog, bronze.name()[-1], "binance", lake.exchange.settings.topic)
    committer.fence("topic id")
    committer.commit([], [], schema_properties("binance", {1: texts[1], 7: texts[1]}))
    assert lake.table(BRONZE).properties[PROPERTY.format(7)] == texts[1]
    with pytest.raises(CommitError, match=r"property k2flow.schema.binance.7 has another value"):
        committer.commit([], [], schema_properties("binance", {7: json.dumps("other")}))


def test_damaged_text_is_not_used(caplog: pytest.LogCaptureFixture) -> None:
    properties = {"k2flow.schema.binance.1": "{", "k2flow.schema.binance.x": "1", "k2flow.schema.kraken.1": '"string"'}
    assert stored_texts(properties, "binance") == {}
    assert "k2flow.schema.binance.1 is not a schema" in caplog.text
    assert stored_texts(properties, "kraken") == {1: '"string"'}
