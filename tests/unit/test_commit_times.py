"""The times in a table's metadata never go back, whatever the clocks: checked by the rules of Java's readers."""

import itertools
import logging
import time

import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.table.metadata import TableMetadata
from pyiceberg.types import StringType

from k2flow.compat.pyiceberg.commit_times import last_time_ms
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.rewrite import set_property
from k2flow.iceberg.staging import Staging, publish
from k2flow.iceberg.tables import create, definitions
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.run import MaintenanceRun
from k2flow.observability import clocks
from k2flow.observability.metrics import TABLE_CLOCK_OFFSET
from tests.clock import clock_ahead

BINANCE = find_exchange("binance")
TABLES = (BINANCE.dlq, BINANCE.silver, GOLD_TABLE)
MINUTE_MS = 60_000
YEAR_SECONDS = 366 * 86_400


def refused_by_java(metadata: TableMetadata) -> str | None:
    """Return why the constructor of TableMetadata in iceberg-core refuses a table, or None."""
    for what, entries in (("snapshot", metadata.snapshot_log), ("metadata", metadata.metadata_log)):
        times = [entry.timestamp_ms for entry in entries]
        if any(after - before < -MINUTE_MS for before, after in itertools.pairwise(times)):
            return f"[BUG] Expected sorted {what} log entries"
        if times and metadata.last_updated_ms - times[-1] < -MINUTE_MS:
            return f"Invalid update timestamp {metadata.last_updated_ms}: before last {what} log entry at {times[-1]}"
    return None


@pytest.fixture
def committer(catalog: Catalog) -> Committer:
    create(catalog, definitions(BINANCE).values())
    found = Committer(catalog, BINANCE.silver, BINANCE.name, BINANCE.settings.topic)
    found.fence("id")
    return found


def metadata_of(catalog: Catalog) -> TableMetadata:
    return load_table(catalog, BINANCE.silver).metadata


@pytest.mark.parametrize("seconds", [300, YEAR_SECONDS])
def test_every_commit_after_one_from_a_clock_ahead(
    catalog: Catalog, committer: Committer, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    """Fences, appends, properties, evolution, maintenance, replacements: each is later than the one before."""
    with clock_ahead(monkeypatch, seconds):
        committer.fence("id")
    ahead = last_time_ms(metadata_of(catalog))
    assert ahead > time.time() * 1000 + seconds * 900

    def replace_rows() -> None:
        staging = Staging(catalog, BINANCE, TABLES)
        staging.begin()
        staging.commit_replacement({}, "nothing")
        publish(catalog, BINANCE)

    def evolve() -> None:
        with load_table(catalog, BINANCE.silver).update_schema() as update:
            update.add_column("more", StringType())

    steps = (
        lambda: committer.fence("id"),
        lambda: committer.commit([], [OffsetRange(0, 0, 5, 0)]),
        lambda: set_property(catalog, BINANCE.silver, "a", "b"),
        evolve,
        lambda: list(MaintenanceRun(catalog, definitions(BINANCE)[BINANCE.silver], Timing()).run()),
        replace_rows,
        lambda: (
            load_table(catalog, BINANCE.silver)
            .manage_snapshots()
            .create_tag(metadata_of(catalog).current_snapshot_id or 0, "tag")
            .commit()
        ),
    )
    for step in steps:
        before = last_time_ms(metadata_of(catalog))
        step()
        after = metadata_of(catalog)
        assert refused_by_java(after) is None
        assert before <= after.last_updated_ms
    assert after.snapshot_log[-1].timestamp_ms > ahead


def test_log_that_went_back_is_put_right(
    catalog: Catalog, committer: Committer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An older k2flow, or another program, has left it so."""
    from k2flow.compat.pyiceberg import commit_times

    with monkeypatch.context() as patch:
        patch.setattr("pyiceberg.catalog.update_table_metadata", commit_times.update_table_metadata)
        patch.setattr("k2flow.iceberg.retry.in_order", lambda updates, _: updates)
        with clock_ahead(patch, 300):
            committer.fence("id")
        committer.fence("id")
    assert "Expected sorted" in (refused_by_java(metadata_of(catalog)) or "")
    committer.fence("id")
    assert refused_by_java(metadata_of(catalog)) is None


def test_clock_behind_a_table_is_reported(
    catalog: Catalog, committer: Committer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clocks, "_warned", {})
    gauge = TABLE_CLOCK_OFFSET.labels(BINANCE.silver)
    with clock_ahead(monkeypatch, 300), caplog.at_level(logging.WARNING):
        committer.fence("id")
        assert (gauge._value.get(), caplog.messages) == (0, [])
    with caplog.at_level(logging.WARNING):
        committer.fence("id")
        committer.fence("id")
    assert 290 < gauge._value.get() < 301
    (text,) = caplog.messages
    assert f"{BINANCE.silver}: its last commit is" in text
    assert "ahead of this host's clock: set the clocks of all hosts" in text


@pytest.mark.parametrize(
    ("behind", "offset", "warns"),
    [
        ([0.2, 500, 9000], 0.2, False),  # one producer has the right time
        ([300.0, 4000, 310], 300, True),  # this host is ahead of all
        ([-120.0, -130, -121], -120, True),
        ([-7200.0, 1], 1, False),
    ],
)
def test_clock_against_kafkas_time(
    behind: list[float], offset: float, warns: bool, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clocks, "_warned", {})
    clock, now = clocks.KafkaClock("binance", lambda: 1_764_000_000.0), 50.0
    with caplog.at_level(logging.WARNING):
        for number, seconds in enumerate([*behind, behind[0]]):
            at = now if number < len(behind) else now + clocks.INTERVAL_SECONDS
            clock.on_fresh_message(int((1_764_000_000 - seconds) * 1000), at)
        clock.on_fresh_message(-1, now + 500)
    assert clocks.KAFKA_CLOCK_OFFSET.labels("binance")._value.get() == pytest.approx(offset)
    assert len(caplog.messages) == warns
