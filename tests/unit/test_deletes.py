"""Delete files of another engine: what each reader does with them, and that no other table is affected."""

from datetime import UTC, date, datetime
from pathlib import Path

import numpy as np
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation

from k2flow.audit.report import Severity, Verdict
from k2flow.errors import AuditError, QueryError
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.deletes import applied_deletes, delete_files
from k2flow.iceberg.manifests import data_manifests
from k2flow.iceberg.rewrite import rewrite_files
from k2flow.iceberg.tables import definitions, gold_definition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.inspection.files import ReadPlan, plan
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import BRONZE, DLQ, GOLD, GOLD_TABLE, SILVER, Layer
from k2flow.maintain.actions import Timing, due_compactions
from k2flow.maintain.plans import live_files
from k2flow.maintain.run import MaintenanceRun
from k2flow.query.connection import connect_to
from k2flow.query.sql import query_errors
from tests.audited_lake import AuditedLake
from tests.deletes import delete_equal, delete_positions
from tests.gold import HOUR, Gold

NOW = int(datetime.now(UTC).timestamp()) // HOUR
OLD = NOW - 48


@pytest.fixture
def gold(catalog: Catalog) -> Gold:
    """Gold with three rows of one hour in a file, one of a later hour in another, and a second file of the first."""
    made = Gold(catalog)
    made.add("binance", np.array([OLD, OLD, OLD, NOW]))
    made.add("binance", np.array([OLD]))
    return made


def delete_first(gold: Gold, file: DataFile, equality: bool) -> None:
    """Delete the first row of a data file as another engine does: by its key, or by its position."""
    if equality:
        delete_equal(table(gold), "message_id", ["binance-0"], file)
    else:
        delete_positions(table(gold), file, [0])


def table(gold: Gold) -> Table:
    return load_table(gold.catalog, GOLD_TABLE)


def files(gold: Gold) -> list[DataFile]:
    """Return the data files, the largest first."""
    now = table(gold)
    found = [entry.data_file for each in data_manifests(now) for entry in each.fetch_manifest_entry(now.io)]
    return sorted(found, key=lambda file: -file.record_count)


def planned(gold: Gold, layer: Layer) -> ReadPlan:
    """Return what an audit or a reprocessing would read."""
    tables = {each: load_table(gold.catalog, each.table("binance")) for each in (SILVER, GOLD)}
    pinned = PinnedTables(exchange=find_exchange("binance"), number=0, tables=tables, ledgers={}, today=date.today())
    return plan(pinned, layer)


def queried(gold: Gold, as_of: int | None = None) -> list[str]:
    with query_errors():
        rows = connect_to(gold.catalog, as_of).sql(f"SELECT message_id FROM {GOLD_TABLE}").fetchall()
    return sorted(message_id for (message_id,) in rows)


def known(gold: Gold) -> set[str]:
    """Return the keys that a flow does not write again."""
    return {key for _, arrays in gold.ids("binance").load([OLD, NOW]) for keys in arrays for key in keys.to_pylist()}


EVERY = [f"binance-{i}" for i in range(5)]


def test_position_deletes_are_applied_by_queries(gold: Gold) -> None:
    (largest, *_) = files(gold)
    path = delete_positions(table(gold), largest, [0, 2])
    assert queried(gold) == ["binance-1", "binance-3", "binance-4"]
    (deletes,) = applied_deletes(table(gold), table(gold).current_snapshot())
    assert deletes.file_path == path


def test_equality_deletes_are_one_line_of_a_query_and_other_tables_are_read(gold: Gold) -> None:
    """DuckDB would delete the row of the other hour too."""
    before = table(gold).current_snapshot()
    assert before is not None
    path = delete_equal(table(gold), "exchange", ["BINANCE"], files(gold)[0])
    with pytest.raises(QueryError, match="equality deletes") as error:
        queried(gold)
    for part in (path, f"market_data.{GOLD_TABLE}", "rewrite_data_files"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
    assert connect_to(gold.catalog).sql("SELECT count(*) FROM silver_binance_trades").fetchone() == (0,)
    assert queried(gold, before.snapshot_id) == EVERY


def test_table_with_damaged_metadata_leaves_the_others_readable(gold: Gold, caplog: pytest.LogCaptureFixture) -> None:
    path = Path(load_table(gold.catalog, "silver_binance_trades").metadata_location.removeprefix("file://"))
    path.write_bytes(b"{")
    assert queried(gold) == EVERY
    assert "silver_binance_trades" in caplog.text


@pytest.mark.parametrize("positions", [True, False])
def test_deleted_trade_does_not_come_again(gold: Gold, positions: bool) -> None:
    """The flow knows its key while the data file is in the table."""
    largest = files(gold)[0]
    delete_first(gold, largest, equality=not positions)
    assert known(gold) == set(EVERY)
    gold.add("binance", np.array([OLD]))
    assert known(gold) == {*EVERY, "binance-5"}


def test_updated_trade_is_known_once(gold: Gold) -> None:
    """An upsert deletes a row and adds the new one in the same commit, which the delete does not reach."""
    largest = files(gold)[0]
    definition = definitions(find_exchange("binance"))[GOLD_TABLE]
    found = table(gold).scan("message_id = 'binance-1'").to_arrow().cast(definition.arrow_schema)
    (updated,) = DataFileWriter(table(gold), definition).write(found.combine_chunks().to_batches()[0])
    delete_equal(table(gold), "message_id", ["binance-1"], largest, updated)
    assert known(gold) == set(EVERY)


@pytest.mark.parametrize("equality", [True, False])
def test_audit_and_reprocessing_refuse_only_the_table(gold: Gold, equality: bool) -> None:
    largest = files(gold)[0]
    if equality:
        path = delete_equal(table(gold), "message_id", ["binance-0"], largest)
    else:
        path = delete_positions(table(gold), largest, [0])
    assert planned(gold, SILVER).rows == 0
    with pytest.raises(AuditError, match=r"gold_crypto_trades has a delete file of another engine") as error:
        planned(gold, GOLD)
    assert path in str(error.value)


@pytest.mark.parametrize("equality", [True, False])
def test_deletes_that_apply_to_no_file_are_no_problem(gold: Gold, equality: bool) -> None:
    """An engine that has rewritten the data files leaves them behind."""
    largest = files(gold)[0]
    delete_first(gold, largest, equality)
    removed = [file.file_path for file in files(gold) if file.partition == largest.partition]
    assert rewrite_files(gold.catalog, GOLD_TABLE, Operation.DELETE, removed, [], 0)
    gold.add("binance", np.array([OLD]))
    now = table(gold)
    assert delete_files(now, now.current_snapshot()) == 1
    assert applied_deletes(now, now.current_snapshot()) == []
    assert queried(gold) == ["binance-3", "binance-5"]
    assert planned(gold, GOLD).rows == 2


def test_maintenance_does_not_compact_rows_that_another_engine_deletes(gold: Gold) -> None:
    """Nor those that it deletes while the files are merged: the new ones would bring the rows back."""
    timing = Timing()
    first = table(gold)
    (due,) = due_compactions(first, live_files(first, "timestamp"), timing)
    largest = files(gold)[0]
    delete_equal(first, "message_id", ["binance-0"], largest)
    now = table(gold)
    assert due_compactions(now, live_files(now, "timestamp"), timing) == []
    removed = [live.file.file_path for live in due.files]
    assert not rewrite_files(gold.catalog, GOLD_TABLE, Operation.REPLACE, removed, files(gold)[-1:], 0)
    assert table(gold).metadata.current_snapshot_id == now.metadata.current_snapshot_id


@pytest.mark.parametrize("equality", [True, False])
def test_commits_and_maintenance_never_bring_a_row_back(gold: Gold, equality: bool) -> None:
    """Flows merge manifests, and maintenance rewrites them: both keep the delete files."""
    largest = files(gold)[0]
    delete_first(gold, largest, equality)
    for _ in range(8):
        gold.add("binance", np.array([OLD]))
    assert list(MaintenanceRun(gold.catalog, gold_definition(), Timing(orphan_seconds=0, reader_seconds=0)).run())
    now = table(gold)
    assert len(applied_deletes(now, now.current_snapshot())) == 1
    if not equality:
        assert queried(gold) == sorted([*EVERY[1:], *(f"binance-{i}" for i in range(5, 13))])
    assert [live.file.record_count for live in live_files(now, "timestamp")].count(3) == 1


@pytest.fixture(scope="module")
def audited(tmp_path_factory: pytest.TempPathFactory) -> AuditedLake:
    return AuditedLake(tmp_path_factory.mktemp("lake"), find_exchange("binance"), count=100)


@pytest.mark.parametrize("layer", [BRONZE, SILVER, DLQ, GOLD], ids=lambda layer: layer.name)
def test_audit_is_incomplete_with_the_other_tables_audited(audited: AuditedLake, layer: Layer) -> None:
    with audited.restored() as lake:
        assert lake.audit().verdict is Verdict.HOLDS
        found = lake.table(layer)
        (largest, *_) = [e.data_file for m in data_manifests(found) for e in m.fetch_manifest_entry(found.io)]
        path = delete_equal(found, layer.columns[0], [None], largest)
        report = lake.audit()
    assert report.verdict is Verdict.UNKNOWN
    (finding,) = [each for each in report.findings if each.severity is Severity.UNKNOWN]
    assert finding.check == "unreadable"
    assert path in finding.text
    assert (report.rows > 0) is (layer is not DLQ)
