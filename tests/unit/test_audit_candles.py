"""The audit of the candles: it computes them again from Gold, names each that is wrong, and reads an hour once."""

import copy
import json
from collections.abc import Callable
from datetime import datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.audit import AuditReport, candle_rows, candles
from k2flow.audit.candle_rows import KEY, VALUES
from k2flow.audit.candles import NOTHING_PROVEN, SOURCE_KEY, ProvenHours, audit_candles
from k2flow.audit.report import Reading, Severity, Verdict
from k2flow.candles import updating
from k2flow.errors import AuditError
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import KEY as LEDGER
from k2flow.iceberg.rewrite import expire_snapshots
from k2flow.iceberg.snapshots import SnapshotExpiration
from k2flow.iceberg.tables import create, gold_definition
from k2flow.layers import CANDLES, CANDLES_TABLE, GOLD_TABLE
from k2flow.maintain.storage import path_of
from tests.audited_lake import AuditedLake, other_value
from tests.candles import EXACT
from tests.deletes import delete_equal
from tests.gold import Gold
from tests.property.test_candles import Flow
from tests.property.test_changes import FIRST_HOUR

HOURS = 3
EVERYTHING = ProvenHours({}, 1.0, 0)
Rows = list[dict[str, Any]]


def add_trades(gold: Gold, seed: int, hours: range = range(HOURS), count: int = 60) -> None:
    """Commit trades of two symbols in some hours, several at one time, and some of these with one id."""
    chance = np.random.default_rng(seed)
    for exchange in ("binance", "kraken"):
        seconds = FIRST_HOUR * 3600 + chance.choice(list(hours), count) * 3600 + chance.integers(0, 240, count)
        amounts = [pa.array([Decimal(int(n)).scaleb(-8) for n in chance.integers(1, 10**18, count)]) for _ in range(2)]
        gold.start(exchange)
        gold.add(
            exchange,
            seconds // 3600,
            timestamp=pa.array(seconds * 1_000_000).cast(pa.timestamp("us", "UTC")),
            trade_id=pa.array([f"{chance.integers(8, 13)}" for _ in range(count)]),
            symbol=pa.array(chance.choice(["BTC", "ETH"], count)),
            price=amounts[0].cast(pa.decimal128(18, 8)),
            quantity=amounts[1].cast(pa.decimal128(18, 8)),
            side=pa.array(chance.choice(["BUY", "SELL"], count)),
        )


class CandleLake:
    """Gold and its candles."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.gold = Gold(catalog)
        add_trades(self.gold, 1)
        self.flow = Flow(catalog)
        self.flow.step()

    @property
    def table(self) -> Table:
        return load_table(self.catalog, CANDLES_TABLE)

    def rows(self) -> Rows:
        found: Rows = self.table.scan().to_arrow().to_pylist()
        return sorted(
            found,
            key=lambda row: [
                row[name] for name in ("exchange_date", "exchange_hour", "symbol", "open_time", "exchange")
            ],
        )

    def overwrite(self, rows: Rows) -> None:
        self.table.overwrite(pa.Table.from_pylist(rows, CANDLES.arrow_schema))

    def audit(self, proven: ProvenHours = NOTHING_PROVEN, **options: Any) -> AuditReport:
        self.report = AuditReport("now")
        self.digests = audit_candles(self.catalog, self.report, lambda *_: None, proven, **options)
        return self.report


@pytest.fixture
def lake(catalog: Catalog) -> CandleLake:
    return CandleLake(catalog)


def keys_of(rows: Rows) -> set[tuple[str, ...]]:
    return {(row["exchange"], row["symbol"], row["open_time"].isoformat()) for row in rows}


def named(report: AuditReport) -> dict[str, set[tuple[str, ...]]]:
    """Return the candles that each check names."""
    found = {}
    for finding in report.findings:
        found[finding.check] = {tuple(sample[name] for name in KEY) for sample in finding.samples}
        assert finding.severity is Severity.BROKEN
        assert finding.count == len(found[finding.check])
    return found


def test_right_candles_have_no_findings(lake: CandleLake) -> None:
    report = lake.audit()
    assert report.findings == []
    assert report.rows == 120 + len(lake.rows())
    assert report.tables[CANDLES_TABLE]["rows"] == len(lake.rows())
    assert len(lake.digests) == HOURS


def change(rows: Rows, at: int, **values: Any) -> Rows:
    rows[at] |= values
    return [rows[at]]


def price_changed(rows: Rows) -> tuple[str, Rows]:
    return "candles_differ", change(rows, 4, high=rows[4]["high"] + Decimal("0.00000001"))


def minute_removed(rows: Rows) -> tuple[str, Rows]:
    return "candles_missing", [rows.pop(3)]


def minute_added(rows: Rows) -> tuple[str, Rows]:
    """The trades lie in the first four minutes of each hour."""
    forged = {**rows[-1], "symbol": "ZZZ", "open_time": rows[-1]["open_time"].replace(minute=30)}
    rows.append(forged)
    return "candles_unexpected", [forged]


def open_and_close_swapped(rows: Rows) -> tuple[str, Rows]:
    at = next(i for i, row in enumerate(rows) if row["open"] != row["close"])
    return "candles_differ", change(rows, at, open=rows[at]["close"], close=rows[at]["open"])


def trades_miscounted(rows: Rows) -> tuple[str, Rows]:
    return "candles_differ", change(rows, 5, trades=rows[5]["trades"] + 1)


def sum_lost(rows: Rows) -> tuple[str, Rows]:
    return "candles_differ", change(rows, 5, quote_volume=None)


def candle_repeated(rows: Rows) -> tuple[str, Rows]:
    rows.insert(3, dict(rows[3]))
    return "candles_duplicated", [rows[3]]


def everything_removed(rows: Rows) -> tuple[str, Rows]:
    """More candles than a finding of another check names."""
    gone = rows[:]
    rows.clear()
    return "candles_missing", gone


DAMAGE: list[Callable[[Rows], tuple[str, Rows]]] = [
    price_changed, minute_removed, minute_added, open_and_close_swapped, trades_miscounted, sum_lost, candle_repeated,
    everything_removed,
]  # fmt: skip


def test_damaged_candles_are_named(lake: CandleLake) -> None:
    right = lake.rows()
    for damage in DAMAGE:
        rows = copy.deepcopy(right)
        check, wrong = damage(rows)
        lake.overwrite(rows)
        assert named(lake.audit()) == {check: keys_of(wrong)}, damage.__name__


def test_a_wrong_value_in_any_column_is_named_with_the_right_one(lake: CandleLake) -> None:
    rows, wrong = lake.rows(), {}
    columns = [name for name in VALUES if name not in ("exchange_date", "exchange_hour")]  # these are the partition
    for at, name in enumerate(columns):
        right = rows[at][name]
        kind = CANDLES.arrow_schema.field(name).type
        decimal = pa.types.is_decimal(kind)
        rows[at][name] = EXACT.add(right, Decimal(1).scaleb(-kind.scale)) if decimal else other_value(right, kind)
        (key,) = keys_of([rows[at]])
        wrong[key] = f"{name} is {as_text(rows[at][name])}, not {as_text(right)}"
    lake.overwrite(rows)
    (finding,) = lake.audit().findings
    assert {tuple(sample[name] for name in KEY): sample["differs"] for sample in finding.samples} == wrong


def as_text(value: Any) -> str:
    return value.isoformat() if isinstance(value, datetime) else str(value)


def test_candle_of_another_hour_or_place_is_reported(lake: CandleLake) -> None:
    rows = lake.rows()
    (moved,) = change(rows, 0, exchange_hour=(rows[0]["exchange_hour"] + 5) % 24)
    lake.overwrite(rows)
    assert named(lake.audit()) == {"candles_differ": keys_of([moved])}
    moved["exchange_hour"] = moved["open_time"].hour
    lake.overwrite([*rows[1:5], moved, *rows[5:]])
    assert lake.audit().checks() == {"file_order"}


@pytest.mark.parametrize("text", ["{}", "no JSON", None])
def test_wrong_source_is_reported(lake: CandleLake, text: str | None) -> None:
    with lake.table.transaction() as transaction:
        transaction.remove_properties(SOURCE_KEY) if text is None else transaction.set_properties({SOURCE_KEY: text})
    (finding,) = lake.audit().findings
    assert (finding.check, finding.severity) == ("candles_source", Severity.BROKEN)
    assert f"{text or 'absent'}, and the ledger says" in finding.text


def test_forged_count_of_trades_is_reported(lake: CandleLake) -> None:
    ledger = json.loads(lake.table.properties[LEDGER + "candles"])
    ledger["partitions"]["0"]["rows"] += 1
    with lake.table.transaction() as transaction:
        transaction.set_properties({LEDGER + "candles": json.dumps(ledger)})
    assert lake.audit().checks() == {"candles_source", "head_moved"}


def test_sum_beyond_its_type_is_expected_to_be_null(catalog: Catalog) -> None:
    """101 trades at the greatest price and quantity; 100 of them have a sum of 38 digits."""
    gold, hour, most = Gold(catalog), FIRST_HOUR, Decimal(10**18 - 1).scaleb(-8)
    for symbol, count in (("FITS", 100), ("TOO_MUCH", 101)):
        gold.add(
            "binance",
            np.full(count, hour),
            trade_id=pa.array([str(i) for i in range(count)]),
            symbol=pa.repeat(symbol, count),
            price=pa.repeat(pa.scalar(most, pa.decimal128(18, 8)), count),
            quantity=pa.repeat(pa.scalar(most, pa.decimal128(18, 8)), count),
            side=pa.repeat("BUY", count),
        )
    lake = CandleLake.__new__(CandleLake)
    lake.catalog, lake.gold, lake.flow = catalog, gold, Flow(catalog)
    lake.flow.step()
    sums = {row["symbol"]: row["quote_volume"] for row in lake.rows()}
    assert sums == {"FITS": EXACT.multiply(100, EXACT.multiply(most, most)), "TOO_MUCH": None}
    assert lake.audit().findings == []


def test_audit_reads_an_hour_again_only_if_its_files_changed(lake: CandleLake) -> None:
    lake.audit()
    proven = ProvenHours(lake.digests)
    assert lake.audit(proven).rows == 0
    add_trades(lake.gold, 2, range(1, 2))
    lake.flow.step()
    before = lake.digests
    report = lake.audit(proven)
    in_hour = [row for row in lake.rows() if row["exchange_hour"] == (FIRST_HOUR + 1) % 24]
    assert report.findings == []
    assert report.rows == sum(row["trades"] for row in in_hour) + len(in_hour)
    assert [each for each in before if before[each] != lake.digests[each]] == [
        ((FIRST_HOUR + 1) // 24, (FIRST_HOUR + 1) % 24)
    ]


def test_small_parts_have_the_same_findings(lake: CandleLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """However few rows are compared at once."""
    monkeypatch.setattr(candle_rows, "PART_ROWS", 7)
    monkeypatch.setattr(candles, "BATCH_ROWS", 5)
    monkeypatch.setattr(candles, "GROUP_TRADES", 1)
    assert lake.audit().findings == []
    assert len(lake.digests) == HOURS
    rows = lake.rows()
    _, wrong = open_and_close_swapped(rows)
    lake.overwrite(rows)
    assert named(lake.audit()) == {"candles_differ": keys_of(wrong)}
    assert len(lake.digests) == HOURS - 1


def test_hour_with_a_wrong_candle_is_read_again(lake: CandleLake) -> None:
    rows = lake.rows()
    _, wrong = price_changed(rows)
    lake.overwrite(rows)
    lake.audit()
    report = lake.audit(ProvenHours(lake.digests))
    assert named(report) == {"candles_differ": keys_of(wrong)}


def test_sample_finds_a_file_that_changed_in_place(lake: CandleLake) -> None:
    lake.audit()
    file = next(iter(lake.table.scan().plan_files())).file
    path = path_of(file.file_path)
    rows = pq.read_table(path, partitioning=None)
    at = rows.schema.get_field_index("trades")
    pq.write_table(rows.set_column(at, rows.schema.field(at), pc.add(rows.column(at), 1)), path)
    assert lake.audit(ProvenHours(lake.digests)).findings == []
    report = lake.audit(EVERYTHING._replace(digests=lake.digests))
    assert report.checks() == {"candles_differ"}
    assert report.sampled_files >= 2 * HOURS


def test_late_candles_are_compared_with_their_own_gold(lake: CandleLake) -> None:
    add_trades(lake.gold, 2)
    assert lake.audit().findings == []


def test_gold_that_was_moved_back_is_a_note(lake: CandleLake) -> None:
    """The candles are right for the Gold that they are of."""
    first = load_table(lake.catalog, GOLD_TABLE).metadata.current_snapshot_id
    add_trades(lake.gold, 2)
    lake.flow.step()
    load_table(lake.catalog, GOLD_TABLE).manage_snapshots().set_current_snapshot(snapshot_id=first).commit()
    report = lake.audit()
    assert report.checks(Severity.NOTE) == {"candles_behind"}
    assert report.verdict is Verdict.HOLDS
    Flow(lake.catalog).step()
    assert lake.audit().findings == []


def test_candles_of_another_gold_are_unknown(lake: CandleLake) -> None:
    lake.catalog.drop_table(f"market_data.{GOLD_TABLE}")
    create(lake.catalog, [gold_definition()], accept_lost=True)
    lake.gold = Gold(lake.catalog)
    add_trades(lake.gold, 3)
    report = lake.audit()
    assert report.checks(Severity.UNKNOWN) == {"candles_behind"}
    assert len(report.findings) == 1
    Flow(lake.catalog).step()
    assert lake.audit().findings == []


def expire_all_but_the_head(catalog: Catalog, name: str) -> None:
    def plan(table: Table) -> SnapshotExpiration:
        head = table.metadata.current_snapshot_id
        return SnapshotExpiration(tuple(s.snapshot_id for s in table.metadata.snapshots if s.snapshot_id != head))

    expire_snapshots(catalog, name, plan)


def test_hours_that_changed_since_an_expired_snapshot_are_unknown(lake: CandleLake) -> None:
    rows = lake.rows()
    wrong = [change(rows, at, trades=0)[0] for at in (0, len(rows) - 1)]  # in the first hour, and in the last
    lake.overwrite(rows)
    add_trades(lake.gold, 2, range(2, 3))
    expire_all_but_the_head(lake.catalog, GOLD_TABLE)
    report = lake.audit()
    behind, differ = sorted(report.findings, key=lambda finding: finding.check)
    assert (behind.check, behind.severity, behind.count) == ("candles_behind", Severity.UNKNOWN, 1)
    assert [tuple(sample[name] for name in KEY) for sample in differ.samples] == [*keys_of(wrong[:1])]


def test_part_of_the_changes_is_compared_with_its_hours(lake: CandleLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many new trades are committed in parts. The candles of a part are not those of any snapshot."""
    for seed in range(3):
        add_trades(lake.gold, seed, range(seed, seed + 1))
    monkeypatch.setattr(updating, "MAX_TRADES", 1)
    behind = []
    for _ in range(8):
        lake.flow.step()
        report = lake.audit()
        assert not report.checks(), report.findings
        behind.append(sum(finding.count for finding in report.findings))
        if json.loads(lake.table.properties[SOURCE_KEY]).get("complete", True):
            break
    assert behind[0] > 0 == behind[-1]


def test_gold_that_lost_rows_since_an_expired_snapshot_is_unknown(lake: CandleLake) -> None:
    load_table(lake.catalog, GOLD_TABLE).delete("message_id = 'binance-3'")
    expire_all_but_the_head(lake.catalog, GOLD_TABLE)
    report = lake.audit()
    assert [(f.check, f.severity) for f in report.findings] == [("candles_behind", Severity.UNKNOWN)]


def test_main_of_the_candles_that_was_moved_is_reported(lake: CandleLake) -> None:
    first = lake.table.metadata.current_snapshot_id
    add_trades(lake.gold, 2)
    lake.flow.step()
    lake.table.manage_snapshots().set_current_snapshot(snapshot_id=first).commit()
    assert {"head_moved"} < lake.audit().checks() <= {"head_moved", "candles_differ", "candles_missing"}
    Flow(lake.catalog).step()
    assert lake.audit().findings == []


@pytest.mark.parametrize("name", [GOLD_TABLE, CANDLES_TABLE])
def test_delete_files_of_another_engine_are_refused(lake: CandleLake, name: str) -> None:
    table = load_table(lake.catalog, name)
    delete_equal(table, "symbol", ["BTC"], next(iter(table.scan().plan_files())).file)
    if name == GOLD_TABLE:
        assert lake.audit().findings == []  # the candles are of the snapshot before
        with pytest.raises(Exception, match="rewrite its data files"):
            lake.flow.step()
    else:
        with pytest.raises(AuditError, match="rewrite its data files"):
            lake.audit()


def test_nothing_is_reported_before_the_first_commit(catalog: Catalog) -> None:
    report = AuditReport("now")
    assert audit_candles(catalog, report, lambda *_: None) == {}
    gold = Gold(catalog)
    Flow(catalog)
    add_trades(gold, 1)
    assert audit_candles(catalog, report, lambda *_: None) == {}
    assert report.findings == []


def test_earlier_hours_are_left_out(lake: CandleLake) -> None:
    rows = lake.rows()
    wrong = [change(rows, at, trades=0)[0] for at in (0, len(rows) - 1)]
    lake.overwrite(rows)
    assert named(lake.audit(first_hour=FIRST_HOUR + 2)) == {"candles_differ": keys_of(wrong[1:])}


def test_candles_are_a_part_of_each_audit(tmp_path: Path) -> None:
    """Wrong candles make no audit a full one, and do not keep the other tables from being proven."""
    lake = AuditedLake(tmp_path / "lake", find_exchange("binance"), count=200, pieces=2)
    with lake.environment():
        Flow(lake.catalog).step()
    report = lake.audit(full=False)
    assert (report.verdict, report.reading) == (Verdict.HOLDS, Reading.FULL)
    assert CANDLES_TABLE in report.tables
    lake.add()
    with lake.environment():
        Flow(lake.catalog).step()
    table = load_table(lake.catalog, CANDLES_TABLE)
    rows = table.scan().to_arrow().cast(CANDLES.arrow_schema).to_pylist()
    _, wrong = price_changed(rows)
    table.overwrite(
        pa.Table.from_pylist(rows, CANDLES.arrow_schema).sort_by([(n, "ascending") for n in CANDLES.sorted_by])
    )
    for _ in range(2):
        report = lake.audit(full=False, sample=0)
        assert report.reading is Reading.INCREMENTAL, report.why_full
        assert named(report) == {"candles_differ": keys_of(wrong)}
    since = rows[4]["open_time"] + timedelta(hours=1)
    assert named(lake.audit(full=False, since=since.replace(minute=0) - timedelta(hours=1))) == named(report)
    assert lake.audit(full=False, since=since).checks() == set()
