"""A wrong value in any column of any layer's table is found, in real tables with a broker in memory."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.types import StringType

from k2flow.audit import AuditReport, Severity
from k2flow.audit.coverage import columns_by_check
from k2flow.audit.report import Finding, Reading, Verdict
from k2flow.exchange import find_exchange
from k2flow.layers import BRONZE, DLQ, GOLD, LAYERS, SILVER, Field, Layer
from k2flow.maintain.storage import path_of
from tests.audited_lake import COPY, RAW, AuditedLake, add_field, other_value

pytestmark = pytest.mark.xdist_group("audit_columns")

WRONG: dict[str, Callable[[Any], Any]] = {
    "partition": lambda _: 7,
    "offset": lambda _: 1_000_000,
    "ingestion_timestamp": lambda written: written + timedelta(days=1),
    "failed_at": lambda written: written + timedelta(days=1),
}
"""The wrong values of columns whose least change is no damage. Of write times only the day is checked."""


OF_FILES = ("file_partition", "file_order")
"""The checks that count files. All others count rows."""


def finest_check(layer: Layer, column: str) -> str:
    """Return the check that covers a column: one that counts rows, if there is one."""
    covering = [check for check, columns in columns_by_check(layer).items() if column in columns]
    return min(covering, key=lambda check: check in OF_FILES)


def damaged_together(layer: Layer) -> Iterator[tuple[Layer, list[str]]]:
    """Yield the columns of a layer in groups: one audit shows for all columns of a group that they are compared.

    A wrong value also changes what is derived from it. So derived columns are apart, and those of whole files alone.
    """
    groups: dict[str, list[str]] = {}
    for column in layer.columns:
        check = finest_check(layer, column)
        groups.setdefault(column if check in OF_FILES else str(check == "derived_column"), []).append(column)
    yield from ((layer, columns) for columns in groups.values())


GROUPS = [each for layer in (*LAYERS, COPY) for each in damaged_together(layer)]


@pytest.fixture(scope="module")
def whole_lake(tmp_path_factory: pytest.TempPathFactory) -> AuditedLake:
    """The tables of Binance, and two more layers."""
    exchange = replace(find_exchange("binance"), layers=(*LAYERS, COPY, RAW))
    return AuditedLake(tmp_path_factory.mktemp("covered"), exchange)


@pytest.fixture
def lake(whole_lake: AuditedLake) -> Iterator[AuditedLake]:
    with whole_lake.restored():
        yield whole_lake


def test_undamaged_tables_have_no_violation(lake: AuditedLake) -> None:
    report = lake.audit()
    assert report.verdict is Verdict.HOLDS, report.findings
    (note,) = report.findings
    assert (note.check, note.severity, note.table) == ("rows_not_checked", Severity.NOTE, "raw_binance_trades")
    assert "avro_payload" in note.text


@pytest.mark.parametrize(("layer", "columns"), GROUPS, ids=[f"{layer.name}-{columns[0]}" for layer, columns in GROUPS])
def test_wrong_value_in_any_column_is_found(lake: AuditedLake, layer: Layer, columns: Sequence[str]) -> None:
    """Each column is wrong in another row of one table. The checks that cover the columns count all these rows."""
    lake.damage_each(layer, {column: wrong_value(layer, column) for column in columns})
    report = lake.audit()
    wrong = Counter(finest_check(layer, column) for column in columns)
    found = Counter[str]()
    for finding in in_table(report, layer, lake):
        found[finding.check] += finding.count
    assert {check: found[check] for check in wrong} == wrong, report.findings
    assert report.verdict is Verdict.BROKEN


def test_reworded_dead_letter_is_a_note(lake: AuditedLake) -> None:
    damage(lake, DLQ, "detail")
    report = lake.audit()
    assert found(report, DLQ, lake) == {"dlq_reworded"}
    assert report.verdict is Verdict.HOLDS


def damage(lake: AuditedLake, layer: Layer, column: str) -> None:
    lake.damage(layer, column, wrong_value(layer, column))


def wrong_value(layer: Layer, column: str) -> Callable[[Any], Any]:
    kind = layer.arrow_schema.field(column).type
    wrong = None if column == "ingestion_timestamp" and layer.event_time != column else WRONG.get(column)
    return wrong or (lambda value: other_value(value, kind))


def in_table(report: AuditReport, layer: Layer, lake: AuditedLake) -> list[Finding]:
    table = layer.table(lake.exchange.name)
    return [finding for finding in report.findings if finding.table == table]


def found(report: AuditReport, layer: Layer, lake: AuditedLake) -> set[str]:
    return {finding.check for finding in in_table(report, layer, lake)}


def test_column_added_to_gold_in_one_place_is_audited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One `Field` is enough: the flow writes it, and the audit finds a wrong value in it, and in any other."""
    venue = Field("venue", StringType(), derive=lambda trades: trades.column("exchange"))
    add_field(monkeypatch, GOLD, venue)
    lake = AuditedLake(tmp_path, replace(find_exchange("binance")))
    assert lake.table(GOLD).scan().to_arrow()["venue"].unique().to_pylist() == ["BINANCE"]
    assert lake.audit().findings == []
    lake.damage_each(GOLD, {column: wrong_value(GOLD, column) for column in ("venue", "price")})
    report = lake.audit()
    counts = {finding.check: finding.count for finding in report.findings}
    assert counts == {"derived_column": 1, "gold_unexpected": 1}, report.findings
    assert all(finding.samples for finding in report.findings)


@contextmanager
def changed_in_place(lake: AuditedLake, layer: Layer, column: str) -> Iterator[None]:
    """Give one row of one data file another value: the file keeps its name. Restore it at the end."""
    task = next(iter(lake.table(layer).scan().plan_files()))
    path = Path(path_of(task.file.file_path))
    before, rows = path.read_bytes(), pq.read_table(path)
    field = rows.schema.field(column)
    values = rows.column(column).to_pylist()
    values[0] = other_value(values[0], field.type)
    pq.write_table(rows.set_column(rows.schema.get_field_index(column), field, pa.array(values, field.type)), path)
    yield
    path.write_bytes(before)


IN_PLACE = [
    (BRONZE, "message_key"),
    (SILVER, "price"),
    (DLQ, "payload"),
    (GOLD, "price"),
    (COPY, "price"),
    (RAW, "message_key"),  # last: no check reads its values, so the audit proves them
]


def test_file_changed_in_place_is_seen_when_it_is_read(lake: AuditedLake) -> None:
    """Damage that changes no list of files is what the documents say that a sample can miss."""
    lake.audit()
    with ExitStack() as all_changed:
        for layer, column in IN_PLACE:
            all_changed.enter_context(changed_in_place(lake, layer, column))
        missed = lake.audit(full=False, sample=0)
    assert (missed.reading, missed.verdict, missed.sampled_files) == (Reading.INCREMENTAL, Verdict.HOLDS, 0)
    for layer, column in IN_PLACE:
        with changed_in_place(lake, layer, column):
            seen = lake.audit(full=False, sample=1)
        assert "no longer has the rows that were proven" in (seen.why_full or ""), layer.name
        assert layer.table(lake.exchange.name) in (seen.why_full or "")
        assert seen.verdict is (Verdict.HOLDS if layer is RAW else Verdict.BROKEN), layer.name


def test_missing_row_of_an_extra_layer_is_found(lake: AuditedLake) -> None:
    (row,) = lake.table(COPY).scan().to_arrow().slice(5, 1).to_pylist()
    lake.table(COPY).delete(f"trade_id = '{row['trade_id']}' AND symbol = '{row['symbol']}'")
    assert "copy_missing" in found(lake.audit(), COPY, lake)
