"""A deduplication key of several columns, through the tables: flow, audit, reprocessing, and a change of the key."""

from collections import defaultdict
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pytest
from typer.testing import CliRunner

from k2flow.audit import AuditReport
from k2flow.audit.report import Reading
from k2flow.cli.commands import app
from k2flow.config.settings import load_settings
from k2flow.errors import CommitError, TableDiffersError
from k2flow.exchange import DEDUP_KEY, Exchange, Rule, exchange_names, find_exchange
from k2flow.iceberg import staging
from k2flow.iceberg.dedup_key import KEY, recorded_key
from k2flow.layers import GOLD, SILVER
from k2flow.reprocess import NewKey, Outcome, replay, reprocess, set_new_key
from tests.audited_lake import AuditedLake
from tests.oracle import classify
from tests.pipeline import PipelineRun, messages_of

TRADE = ("symbol", "trade_id")
BY_TRADE = replace(find_exchange("binance"), dedup_key=TRADE)
BY_ID = replace(find_exchange("binance"))
PROPERTY = f"{KEY}binance"
Rows = dict[tuple[str, ...], list[dict[str, Any]]]


@pytest.fixture
def lake(tmp_path: Path) -> AuditedLake:
    """The messages of two handlers, half of them in the tables."""
    return two_handlers(tmp_path, BY_TRADE)


def two_handlers(folder: Path, exchange: Exchange) -> AuditedLake:
    return AuditedLake(folder, exchange, count=600, pieces=2, handlers=2, loss=0.2)


def by_key(rows: list[dict[str, Any]], key: tuple[str, ...]) -> Rows:
    found: Rows = defaultdict(list)
    for row in rows:
        found[tuple(row[name] for name in key)].append(row)
    return found


def gold(lake: AuditedLake, key: tuple[str, ...] = TRADE) -> Rows:
    """Return Gold's rows by key, after a check that each is one of Silver's."""
    rows = lake.table(GOLD).scan().to_arrow().select(SILVER.columns).to_pylist()
    silver = lake.table(SILVER).scan().to_arrow().select(SILVER.columns).to_pylist()
    assert all(row in silver for row in rows)
    return by_key(rows, key)


def keys_of_messages(lake: AuditedLake, key: tuple[str, ...]) -> set[tuple[str, ...]]:
    """Return the keys of all valid messages, decoded by the oracle."""
    decoded = (classify(message, "BINANCE", (1,)) for message in messages_of(lake.messages))
    return set(by_key([trade for reason, trade in decoded if not reason], key))


def audited(lake: AuditedLake, exchange: Exchange | None = None, full: bool = True) -> AuditReport:
    lake.exchange = exchange or lake.exchange
    return lake.audit(full, seed=1)


def change(lake: AuditedLake, exchange: Exchange, dry_run: bool = False) -> NewKey:
    with lake.environment():
        return set_new_key(lake.catalog, load_settings(exchange_names()), exchange, dry_run)


def reprocessed(lake: AuditedLake, exchange: Exchange, dry_run: bool = False) -> Outcome:
    today = datetime.now(UTC).date()
    with lake.environment():
        settings = load_settings(exchange_names())
        return reprocess(lake.catalog, settings, exchange, today - timedelta(1), today + timedelta(1), dry_run)


def set_property(lake: AuditedLake, value: str | None) -> None:
    with lake.table(GOLD).transaction() as transaction:
        transaction.remove_properties(PROPERTY) if value is None else transaction.set_properties({PROPERTY: value})


def test_gold_holds_each_trade_of_two_handlers_once(lake: AuditedLake) -> None:
    """The second start reads the keys back from Gold. The second audit reads only what is new."""
    assert lake.table(GOLD).properties[PROPERTY] == "symbol,trade_id"
    assert audited(lake).findings == []
    lake.add()
    found = gold(lake)
    assert found.keys() == keys_of_messages(lake, TRADE)
    assert {len(rows) for rows in found.values()} == {1}
    silver = by_key(lake.table(SILVER).scan().to_arrow().to_pylist(), TRADE)
    brought = [len({row["message_id"] for row in rows}) for rows in silver.values()]
    assert brought.count(2) > 200 < brought.count(1)
    report = audited(lake, full=False)
    assert report.findings == []
    assert report.reading is Reading.INCREMENTAL
    assert report.proven_rows > 0


def test_audit_finds_a_trade_twice_and_a_trade_that_is_missing(lake: AuditedLake) -> None:
    """A second message of a trade, put into Gold by another program, is a duplicate; so is its loss a loss."""
    rows = lake.table(GOLD).scan().to_arrow()
    lost, kept = rows.slice(0, 1), rows.slice(1)
    there = set(kept.column("message_id").to_pylist())
    trades = {(row["symbol"], row["trade_id"]): row for row in kept.to_pylist()}
    other = next(
        row
        for row in lake.table(SILVER).scan().to_arrow().to_pylist()
        if row["message_id"] not in there and (row["symbol"], row["trade_id"]) in trades
    )
    hour = trades[other["symbol"], other["trade_id"]]["exchange_hour"]
    assert audited(lake).findings == []
    second = pa.Table.from_pylist([{**other, "exchange_hour": hour}], rows.schema)
    lake.table(GOLD).overwrite(pa.concat_tables([kept, second]).sort_by("timestamp"))
    for full in (False, True):
        report = audited(lake, full=full)
        assert report.reading is Reading.FULL
        found = {finding.check: finding for finding in report.findings}
        assert found["gold_duplicated"].samples[0]["trade_id"] == other["trade_id"]
        assert found["gold_missing"].samples[0]["trade_id"] == lost.column("trade_id")[0].as_py()


def test_two_exchanges_may_have_the_same_trade_ids(lake: AuditedLake) -> None:
    """Only a message id is of no other exchange."""
    rows = lake.table(GOLD).scan().to_arrow()
    at = rows.schema.get_field_index("exchange")
    kraken = rows.set_column(at, rows.schema.field("exchange"), pa.repeat("KRAKEN", len(rows)))
    lake.table(GOLD).append(kraken.slice(0, 5))
    assert audited(lake).findings == []


def test_declared_key_must_be_that_of_the_rows(lake: AuditedLake) -> None:
    advice = r"declares message_id: declare dedup_key=\('symbol', 'trade_id'\) again, or stop the flow and run"
    with lake.environment(), pytest.raises(TableDiffersError, match=advice):
        PipelineRun(lake.catalog, BY_ID)
    for dry_run in (True, False):
        with pytest.raises(TableDiffersError, match="k2flow reprocess binance --new-key"):
            reprocessed(lake, BY_ID, dry_run)
    with lake.environment(), pytest.raises(TableDiffersError, match="have the deduplication key symbol and trade_id"):
        replay(lake.catalog, load_settings(exchange_names()), BY_ID)
    report = audited(lake, BY_ID)
    assert [(each.check, each.severity) for each in report.findings] == [("gold_key", "broken")]
    assert audited(lake, BY_TRADE).findings == []
    assert audited(lake, replace(BY_TRADE, dedup_key=TRADE[::-1])).findings == []  # the order does not matter


def test_proof_under_another_key_is_dropped(tmp_path: Path) -> None:
    lake = two_handlers(tmp_path, BY_ID)
    assert audited(lake).findings == []
    change(lake, BY_TRADE)
    report = audited(lake, BY_TRADE, full=False)
    assert [each.check for each in report.findings] == ["proof_dropped"]
    assert report.reading is Reading.FULL
    assert audited(lake, full=False).reading is Reading.INCREMENTAL


@pytest.mark.parametrize("text", ["message_id", "symbol", "nothing", "", "symbol,symbol"])
def test_property_that_another_program_has_written_is_refused(lake: AuditedLake, text: str) -> None:
    """The audit says so, and the rows can be set right under the declared key."""
    set_property(lake, text)
    with lake.environment(), pytest.raises(TableDiffersError, match=r"property k2flow\.dedup-key\.binance"):
        PipelineRun(lake.catalog, BY_TRADE)
    report = audited(lake)
    assert "gold_key" in report.checks()
    assert change(lake, BY_TRADE).rows_removed == 0
    assert lake.table(GOLD).properties[PROPERTY] == "symbol,trade_id"
    assert audited(lake).findings == []


def test_table_of_an_earlier_version_has_the_default_key(tmp_path: Path) -> None:
    lake = two_handlers(tmp_path, BY_ID)
    set_property(lake, None)
    assert audited(lake).findings == []
    with lake.environment(), pytest.raises(TableDiffersError, match="have the deduplication key message_id"):
        PipelineRun(lake.catalog, BY_TRADE)
    lake.add()
    assert lake.table(GOLD).properties[PROPERTY] == "message_id"
    assert recorded_key({}, "binance") is None


def half(trades: pa.RecordBatch) -> pa.BooleanArray:
    """Accept the messages of half of the ids: of many trades, one of two."""
    return pc.less(pc.utf8_slice_codeunits(trades.column("message_id"), 0, 1), "8")


def test_reprocessed_trades_come_from_the_messages_that_are_valid(lake: AuditedLake) -> None:
    """If Gold's message of a trade is bad today, the other handler's takes its place. Without the rule, all return."""
    lake.add()
    strict = replace(BY_TRADE, rules=(Rule("half", "message_id", half),))
    before = gold(lake)
    planned = reprocessed(lake, strict, dry_run=True)
    done = reprocessed(lake, strict)
    assert done.ambiguous == 0
    assert {name: (t.rows_removed, t.rows_added) for name, t in done.tables.items()} == {
        name: (t.rows_removed, t.rows_added) for name, t in planned.tables.items()
    }
    after = gold(lake)
    assert all(len(rows) == 1 and rows[0]["message_id"][0] < "8" for rows in after.values())
    silver = by_key(lake.table(SILVER).scan().to_arrow().to_pylist(), TRADE)
    assert after.keys() == silver.keys()
    switched = [key for key in after if after[key] != before[key]]
    assert len(switched) == done.tables["gold"].rows_added > 30
    assert audited(lake, strict).findings == []
    restored = reprocessed(lake, BY_TRADE)
    assert restored.moved == {("half", "valid"): restored.tables["dlq"].rows_removed}
    assert gold(lake).keys() == before.keys()
    assert audited(lake, BY_TRADE).findings == []


def test_replayed_dead_letters_of_a_trade_that_gold_has_are_duplicates(tmp_path: Path) -> None:
    strict = replace(BY_TRADE, rules=(Rule("half", "message_id", half),))
    lake = two_handlers(tmp_path, strict)
    lake.add()
    before = gold(lake)
    with lake.environment():
        done = replay(lake.catalog, load_settings(exchange_names()), BY_TRADE)
    added = done.tables["gold"].rows_added
    assert 0 < added < done.tables["silver"].rows_added
    after = gold(lake)
    assert {key: rows for key, rows in after.items() if key in before} == before
    assert len(after) == len(before) + added
    assert after.keys() == keys_of_messages(lake, TRADE)
    assert audited(lake, BY_TRADE).findings == []


def test_new_key_replaces_the_rows_of_gold_both_ways(tmp_path: Path) -> None:
    lake = two_handlers(tmp_path, BY_ID)
    ids = gold(lake, DEDUP_KEY)
    planned = change(lake, BY_TRADE, dry_run=True)
    assert gold(lake, DEDUP_KEY) == ids
    done = change(lake, BY_TRADE)
    assert done == replace(planned, published=True)
    trades = gold(lake)
    assert {len(rows) for rows in trades.values()} == {1}
    assert trades.keys() == set(by_key([row for rows in ids.values() for row in rows], TRADE))
    assert (done.rows_removed, done.rows_added) == (len(ids) - len(trades), 0)
    assert done.rows_removed > 30
    assert audited(lake, BY_TRADE).findings == []
    lake.add()  # the next start
    assert gold(lake).keys() == keys_of_messages(lake, TRADE)
    back = change(lake, BY_ID)
    assert (back.before, back.after, back.rows_removed) == (TRADE, DEDUP_KEY, 0)
    assert gold(lake, DEDUP_KEY).keys() == keys_of_messages(lake, DEDUP_KEY)
    assert audited(lake, BY_ID).findings == []
    assert change(lake, BY_ID) == NewKey("binance", DEDUP_KEY, DEDUP_KEY, 0, 0, published=False)


@pytest.mark.parametrize("options", [[], ["--from", "2026-01-30", "--new-key"], ["--to", "2026-01-30", "--new-key"]])
def test_reprocess_takes_days_or_a_new_key(options: list[str]) -> None:
    result = CliRunner().invoke(app, ["reprocess", "binance", *options])
    assert (result.exit_code, "give either --from" in result.output) == (2, True)


def test_new_key_that_was_committed_is_published_by_the_next_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies before the commit changes nothing; one that dies after it has changed the key."""
    lake = two_handlers(tmp_path, BY_ID)
    rows = gold(lake, DEDUP_KEY)

    def die(*_: object, **__: object) -> None:
        raise CommitError("dead")

    with monkeypatch.context() as patch:
        patch.setattr(staging.Staging, "stage", die)
        with pytest.raises(CommitError, match="dead"):
            change(lake, BY_TRADE)
    assert gold(lake, DEDUP_KEY) == rows
    assert lake.table(GOLD).properties[PROPERTY] == "message_id"
    assert audited(lake, BY_ID).findings == []
    with monkeypatch.context() as patch:
        patch.setattr(staging, "_publication", die)
        with pytest.raises(CommitError, match="dead"):
            change(lake, BY_TRADE)
    assert lake.table(GOLD).properties[PROPERTY] == "message_id"
    with lake.environment():
        assert staging.publish(lake.catalog, BY_TRADE) == "deduplication key symbol and trade_id"
    assert lake.table(GOLD).properties[PROPERTY] == "symbol,trade_id"
    lake.exchange = BY_TRADE
    lake.add()
    assert gold(lake).keys() == keys_of_messages(lake, TRADE)
    assert audited(lake).findings == []
