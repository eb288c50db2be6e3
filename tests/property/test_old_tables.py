"""Work on an old table reads what is new or asked for: old manifests and data files may even be gone."""

import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

import k2flow.iceberg.append
import k2flow.iceberg.rewrite
import k2flow.status.collector
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.manifests import data_manifests, days_of
from k2flow.iceberg.rewrite import set_property
from k2flow.layers import GOLD_TABLE, HOUR_US
from k2flow.maintain import compacted
from k2flow.maintain.actions import Timing, due_actions
from k2flow.maintain.plans import OPEN_HOURS, live_files
from k2flow.maintain.run import MaintenanceRun
from k2flow.maintain.storage import path_of
from k2flow.report import Unavailable, gather
from k2flow.status.collector import StatusCollector
from tests.gold import Gold

DAY = 24
OLD_DAYS = 10
HOURS = 6  # of each old day
NOWHERE = "127.0.0.1:9"  # nothing listens there


@pytest.fixture(autouse=True)
def small_manifests(monkeypatch: pytest.MonkeyPatch) -> None:
    """A manifest of a few files counts as large, as in a table of many files."""
    monkeypatch.setattr(k2flow.iceberg.replace, "MERGE_BYTES", 1)
    monkeypatch.setattr(k2flow.iceberg.replace, "MANIFEST_ENTRIES", 4)
    monkeypatch.setattr(k2flow.iceberg.append, "MANIFEST_BYTES", 1)


def this_hour() -> int:
    return int(time.time()) // 3_600


def table_of(catalog: Catalog) -> Table:
    return load_table(catalog, GOLD_TABLE)


def run(gold: Gold, hour: int, full: bool) -> list[str]:
    """Maintain Gold as it is `hour` (since 1970) o'clock."""
    timing = Timing(clock=lambda: hour * 3_600.0)
    return [each.what for each in MaintenanceRun(gold.catalog, gold.definition, timing, full=full).run()]


def remove_before(table: Table, day: int) -> int:
    """Remove all manifests and data files that only have days (since 1970) before this one; return how many."""
    gone = [manifest for manifest in data_manifests(table) if days_of(manifest).stop <= day]
    paths = [live.file.file_path for live in live_files(table, "timestamp") if live.day < day]
    for path in [*paths, *(manifest.manifest_path for manifest in gone)]:
        Path(path_of(path)).unlink()
    return len(gone)


def test_nothing_opens_what_is_old(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """A flow's commit, the status, the report and maintenance, after the old files are gone."""
    gold, now = Gold(catalog), this_hour()
    today = now // DAY
    for day in range(today - OLD_DAYS, today - 2):
        gold.add("binance", day * DAY + np.arange(HOURS))
    run(gold, now, full=True)
    for hour in range(now - 5, now + 1):
        gold.add("binance", np.array([hour, hour - DAY]))
    assert remove_before(table_of(catalog), today - 2) >= OLD_DAYS - 2
    gold.add("binance", np.array([now]))
    monkeypatch.setattr(k2flow.status.collector, "BROKER_SECONDS", 0.1)
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", NOWHERE)
    monkeypatch.setenv("K2FLOW_BINANCE_TOPIC", "topic")
    settings, exchanges = load_settings(exchange_names()), [replace(find_exchange("binance"))]
    status = StatusCollector(catalog, settings, exchanges).collect()
    assert status.errors == {}
    assert status.tables[GOLD_TABLE].small_files == 13
    figures = gather(catalog, settings, exchanges, ["BTCUSDT"], (now - DAY) * HOUR_US)
    assert not [each for each in vars(figures).values() if isinstance(each, Unavailable)]
    assert sum(figures.traded.rows["binance"]) == 8  # of the other six hours, five are before this time
    assert figures.files[GOLD_TABLE].files == (OLD_DAYS - 2) * HOURS + 13
    assert "compaction" in run(gold, now + 2 * DAY, full=False)
    assert compacted.read_compacted(table_of(catalog)).before == (now + 2 * DAY - OPEN_HOURS) // DAY


@pytest.mark.parametrize("number", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_recent_files_are_all_that_is_due(catalog: Catalog, seed: int, number: int) -> None:
    """At each moment of a random history, the recent files give the same plans as all files."""
    chance, gold = random.Random(seed + number), Gold(catalog)
    hour = this_hour()

    def append() -> None:
        hours = [hour - chance.choice((0, 1, 2, 30, 60, 100)) for _ in range(chance.randint(1, 4))]
        gold.start("binance")
        gold.add("binance", np.array(hours))

    for step in range(20):
        if step % 3 < 2:
            append()
        else:
            run(gold, hour, full=chance.random() < 0.3)
        hour += chance.choice((0, 1, 5, 20))
        table, timing = table_of(catalog), Timing(clock=lambda now=hour: now * 3_600.0)
        everything = live_files(table, "timestamp")
        recent = compacted.recent_files(table, "timestamp", timing.now().date())
        assert {each.file.file_path for each in recent} <= {each.file.file_path for each in everything}
        assert list(due_actions(table, recent, timing)) == list(due_actions(table, everything, timing))
    assert compacted.read_compacted(table_of(catalog)) is not None
    assert len(recent) < len(everything)


def test_all_manifests_are_read_if_the_property_is_of_no_use(
    catalog: Catalog, caplog: pytest.LogCaptureFixture
) -> None:
    gold, now = Gold(catalog), this_hour()
    old = now - 10 * DAY
    gold.add("binance", old + np.arange(3))
    run(gold, now, full=True)
    noted = table_of(catalog).properties[compacted.KEY]

    def recent() -> int:
        table = table_of(catalog)
        return len(compacted.recent_files(table, "timestamp", Timing().now().date()))

    assert recent() == 0
    for text in (noted.replace('"sequence_number":', '"sequence_number":9'), noted.replace("268435456", "1"), "{"):
        assert text != noted
        set_property(catalog, GOLD_TABLE, compacted.KEY, text)
        assert recent() == 3
    assert f"property {compacted.KEY} is ignored" in caplog.text
    run(gold, now, full=False)
    assert table_of(catalog).properties[compacted.KEY] != "{"
    assert recent() == 0


def test_repeated_maintenance_lists_the_storage_rarely(catalog: Catalog) -> None:
    """The first run deletes an orphan file; a later one compacts, and leaves another orphan file for now."""
    gold, old = Gold(catalog), this_hour() - DAY
    folder = Path(path_of(table_of(catalog).location())) / "data"

    def orphan(name: str) -> Path:
        path = folder / f"{name}.parquet"
        path.write_bytes(b"")
        os.utime(path, (0, 0))
        return path

    gold.add("binance", np.array([old]))
    first = orphan("first")
    process = subprocess.Popen([sys.executable, "-m", "k2flow", "maintain", GOLD_TABLE, "--every", "1s"])
    try:
        wait_until(lambda: not first.exists())
        second = orphan("second")
        gold.add("binance", np.array([old]))
        wait_until(lambda: len(live_files(table_of(catalog), "timestamp")) == 1)
    finally:
        process.terminate()
        process.wait()
    assert second.exists()
    assert run(gold, this_hour(), full=False) == []
    assert "orphan files" in run(gold, this_hour(), full=True)
    assert not second.exists()


def wait_until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.1)
