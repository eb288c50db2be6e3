"""Reprocessing without Kafka: the tables follow the rules, and follow them back again."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pytest

from k2flow.config.settings import load_settings
from k2flow.errors import ReprocessError
from k2flow.exchange import Exchange, Rule, exchange_names, find_exchange
from k2flow.layers import DLQ, GOLD, LAYERS, SILVER
from k2flow.reprocess import Outcome, replay, reprocess
from tests.audited_lake import COPY, AuditedLake


def at_least_one(trades: pa.RecordBatch) -> pa.BooleanArray:
    quantity = trades.column("quantity")
    return pc.greater_equal(quantity, pa.scalar(Decimal(1), quantity.type))


STRICT = replace(find_exchange("binance"), rules=(Rule("too_small", "quantity", at_least_one),))


@pytest.fixture
def lake(tmp_path: Path) -> AuditedLake:
    return AuditedLake(tmp_path, replace(find_exchange("binance")), count=2_000)


def rows(lake: AuditedLake) -> dict[str, int]:
    return {layer.name: lake.table(layer).scan().count() for layer in (SILVER, DLQ, GOLD)}


def reprocessed(lake: AuditedLake, exchange: Exchange, dry_run: bool = False) -> Outcome:
    today = datetime.now(UTC).date()
    with lake.environment():
        settings = load_settings(exchange_names())
        return reprocess(lake.catalog, settings, exchange, today - timedelta(1), today + timedelta(1), dry_run)


def test_rows_follow_the_rules_and_replay_restores_them(lake: AuditedLake) -> None:
    before = rows(lake)
    planned = reprocessed(lake, STRICT, dry_run=True)
    assert rows(lake) == before
    done = reprocessed(lake, STRICT)
    assert done.published
    assert done.moved == planned.moved == {("valid", "too_small"): done.tables["dlq"].rows_added}
    for layer, table in done.tables.items():
        expected = planned.tables[layer]
        assert (table.rows_removed, table.rows_added) == (expected.rows_removed, expected.rows_added)
        assert rows(lake)[layer] == before[layer] + table.rows_added - table.rows_removed
    with lake.environment():
        restored = replay(lake.catalog, load_settings(exchange_names()), lake.exchange)
    assert restored.moved == {("too_small", "valid"): done.tables["dlq"].rows_added}
    assert rows(lake) == before
    assert lake.audit().findings == []


def test_unchanged_rules_change_nothing(lake: AuditedLake) -> None:
    outcome = reprocessed(lake, lake.exchange)
    assert (outcome.messages, outcome.moved, outcome.published) == (2_000, {}, False)


def test_layer_that_would_become_stale_is_refused(lake: AuditedLake) -> None:
    with pytest.raises(ReprocessError, match="the rows of copy cannot be replaced"):
        reprocessed(lake, replace(lake.exchange, layers=(*LAYERS, COPY)))
