"""Rows at both ends of time, absurd properties and damaged metadata: no command ends, no table hides another."""

import time
from collections.abc import Iterator
from datetime import UTC, date, datetime
from pathlib import Path

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from typer.testing import CliRunner

from k2flow.cli.commands import app
from k2flow.compat.pyiceberg import metadata_cache
from k2flow.config.settings import load_settings
from k2flow.errors import DataFileError, TableDiffersError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.tables import RETENTION, TARGET_FILE_SIZE, create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import GOLD_TABLE, MAX_TIME_US, MIN_TIME_US
from k2flow.maintain.actions import Timing
from k2flow.maintain.plans import day_text, live_files
from k2flow.maintain.run import MaintenanceRun
from k2flow.query.connection import connect_to
from k2flow.report import gather
from k2flow.status.collector import StatusCollector
from k2flow.status.metrics import StatusMetrics
from k2flow.status.model import Status, iso, moment

BINANCE = find_exchange("binance")
EXTREMES = (MIN_TIME_US, MIN_TIME_US + 1, 0, MAX_TIME_US - 1, MAX_TIME_US)
TOPIC = BINANCE.settings.topic
NOW = Timing(orphan_seconds=0, reader_seconds=0)


@pytest.fixture
def lake(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> Iterator[Catalog]:
    """All tables of Binance, each with two files for each extreme time in its event time and its partition."""
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", "127.0.0.1:1")
    wanted = definitions(BINANCE)
    create(catalog, wanted.values())
    for name, definition in wanted.items():
        layer = definition.layer
        committer = Committer(catalog, name, BINANCE.name, TOPIC)
        committer.fence("id")
        writer = DataFileWriter(load_table(catalog, name), definition)
        for repeat in range(2):
            rows = [_row(us, layer.event_time, layer.date_column, f"{us}-{repeat}") for us in EXTREMES]
            known = [{key: value for key, value in row.items() if key in layer.columns} for row in rows]
            files = writer.write(pa.RecordBatch.from_pylist(known, definition.arrow_schema))
            committer.commit(files, [OffsetRange(0, repeat * 5, repeat * 5 + 5, 5)])
    return catalog


def _row(us: int, time_column: str, date_column: str, name: str) -> dict[str, object]:
    at = pa.scalar(us, pa.timestamp("us", tz="UTC")).as_py()
    texts = {"message_id": name, "symbol": "BTCUSDT", "exchange": "BINANCE", "topic": TOPIC, "reason": "malformed"}
    times = {"kafka_timestamp": at, "timestamp": at, time_column: at, date_column: at.date(), "exchange_hour": at.hour}
    return {**texts, **times, "partition": 0, "offset": 0}


def test_maintenance_merges_and_expires_rows_at_both_ends_of_time(lake: Catalog) -> None:
    for name, definition in definitions(BINANCE).items():
        done = list(MaintenanceRun(lake, definition, NOW).run())
        kept = {live.day for live in live_files(load_table(lake, name), definition.layer.time_column)}
        first, last = (date.min - date(1970, 1, 1)).days, (date.max - date(1970, 1, 1)).days
        assert kept == ({first, 0, last} if name == GOLD_TABLE else {last}), (name, done)
        assert any("compaction" in str(action) and "0001-01-01" in str(action) for action in done) is (
            name == GOLD_TABLE
        )


@pytest.mark.parametrize("zone", ["Asia/Tokyo"])  # the year 9999 ends earlier there
def test_commands_show_rows_at_both_ends_of_time(
    lake: Catalog, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, zone: str
) -> None:
    monkeypatch.setenv("TZ", zone)
    time.tzset()
    try:
        page = str(tmp_path / "report.html")
        for arguments, code in (
            (["status", "binance"], 0),
            (["status", "--json"], 0),
            (["tables", "list"], 0),
            (["query", f'SELECT "timestamp", exchange_date FROM {GOLD_TABLE} ORDER BY 1'], 0),
            (["dlq", "list"], 0),
            (["maintain", "--dry-run"], 0),
            (["report", "--html", page, "--no-audit"], 0),
            (["audit", "binance"], 1),  # the rows are not what the ledgers say
        ):
            result = CliRunner().invoke(app, arguments)
            assert result.exit_code == code, (arguments, result.output, result.exception)
    finally:
        monkeypatch.undo()
        time.tzset()


def test_report_and_query_have_rows_at_both_ends_of_time(lake: Catalog) -> None:
    figures = gather(lake, load_settings(exchange_names()), [BINANCE], ())
    assert figures.traded.rows["binance"]
    with connect_to(lake) as db:
        found = db.sql(f'SELECT min("timestamp"), max("timestamp") FROM {GOLD_TABLE}').fetchone()
    assert found == (datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, 23, 59, 59, 999_999, UTC))


@pytest.mark.parametrize("text", ["never", "0", str(10**30)])
def test_absurd_property_stops_one_table_only(lake: Catalog, text: str) -> None:
    for key in (RETENTION, TARGET_FILE_SIZE):
        with load_table(lake, BINANCE.silver).transaction() as change:
            change.set_properties({key: text})
    (status,) = [StatusCollector(lake, load_settings(exchange_names()), [BINANCE]).collect()]
    huge = text.isdecimal() and int(text) > 0
    assert (BINANCE.silver in status.errors) is not huge
    assert status.tables[BINANCE.bronze]
    assert status.tables[GOLD_TABLE]
    result = CliRunner().invoke(app, ["maintain"])
    assert result.exit_code == (0 if huge else 1)
    assert load_table(lake, GOLD_TABLE).current_snapshot().summary.operation.value == "replace"
    if not huge:
        with pytest.raises(TableDiffersError, match=f"is {text}, not 1 or more"):
            list(MaintenanceRun(lake, definitions(BINANCE)[BINANCE.silver], NOW).run())


@pytest.mark.parametrize("damage", [b"", b'{"format-version": 2}', None])
def test_damaged_metadata_of_one_table_hides_no_other(lake: Catalog, damage: bytes | None) -> None:
    path = Path(load_table(lake, BINANCE.bronze).metadata_location.removeprefix("file://"))
    if damage is None:
        path.unlink()
    else:
        path.write_bytes(damage)
    metadata_cache._cache.clear()  # a command of this process has read the file
    with pytest.raises(DataFileError, match="register the table again"):
        load_table(lake, BINANCE.bronze)
    status = StatusCollector(lake, load_settings(exchange_names()), [BINANCE]).collect()
    assert status.errors.keys() == {BINANCE.bronze}
    assert status.tables[BINANCE.bronze] is None
    assert status.tables[GOLD_TABLE]
    problems = status.exchanges["binance"].problems
    assert any("register the table again" in problem for problem in problems)
    assert not any("there is no table" in problem for problem in problems)
    audit = CliRunner().invoke(app, ["audit"])
    assert audit.exit_code == 2
    assert "register the table again" in audit.output
    for arguments in (["maintain"], ["status", "binance"], ["tables", "list"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 1, (arguments, result.output, result.exception)
        assert BINANCE.silver in result.output
    assert load_table(lake, GOLD_TABLE).current_snapshot().summary.operation.value == "replace"


def test_metrics_continue_after_an_unexpected_error() -> None:
    asked: list[int] = []

    def collect() -> Status:
        asked.append(1)
        if len(asked) == 1:
            raise OverflowError("a year")
        metrics.stop()
        return Status(0, 0.0, {}, {}, {})

    metrics = StatusMetrics(collect)
    metrics._stopped.wait = lambda _: None  # type: ignore[method-assign,assignment]
    metrics._run()
    assert len(asked) == 2


def test_times_of_other_programs_are_shown_within_the_years() -> None:
    assert [moment(ms) for ms in (-(10**30), 1_790_000_000_123, 10**30)] == [
        "0001-01-01 00:00:00",
        "2026-09-21 14:13:20",
        "9999-12-31 23:59:59",
    ]
    assert iso(10**30) == "9999-12-31T23:59:59.999+00:00"
    assert [day_text(day) for day in (0, 2932896, 2932897, -719163)] == [
        "1970-01-01",
        "9999-12-31",
        "2,932,897 days since 1970",
        "-719,163 days since 1970",
    ]
