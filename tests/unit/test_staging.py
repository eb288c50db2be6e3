"""A replacement of rows in a real catalog: invisible until published, all or nothing."""

import time
from collections.abc import Callable
from datetime import UTC, datetime

import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog

from k2flow.errors import CommitError, FencedError
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer, staged_branch
from k2flow.iceberg.ledger import OffsetRange, read
from k2flow.iceberg.staging import Staging, publish
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.run import MaintenanceRun

BINANCE = find_exchange("binance")
TOPIC = BINANCE.settings.topic
SILVER = BINANCE.silver
REPLACED = (BINANCE.dlq, SILVER, GOLD_TABLE)


class Lake:
    """Silver with the rows a and b, from two offsets."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        wanted = definitions(BINANCE)
        create(catalog, wanted.values())
        self._definition = wanted[SILVER]
        self._writer = DataFileWriter(load_table(catalog, SILVER), self._definition)
        self.committer = Committer(catalog, SILVER, BINANCE.name, TOPIC)
        self.committer.fence("id")
        self.committer.commit(self._writer.write(self._rows("ab")), [OffsetRange(0, 0, 2, 2)])

    def _rows(self, ids: str) -> pa.RecordBatch:
        noon = datetime(2026, 3, 14, 12, tzinfo=UTC)
        values = {"timestamp": noon, "exchange": "BINANCE", "exchange_date": noon.date()}
        schema = self._definition.arrow_schema
        return pa.RecordBatch.from_pylist([{"message_id": each, **values} for each in ids], schema)

    def ids(self) -> str:
        found = load_table(self.catalog, SILVER).scan(selected_fields=("message_id",)).to_arrow()["message_id"]
        return "".join(sorted(found.to_pylist()))

    def stage(self, before: Callable[[], object] = lambda: None) -> Staging:
        """Stage the rows b, c and d in place of a and b. Their files are written, then `before` is called."""
        staging = Staging(self.catalog, BINANCE, REPLACED)
        staging.begin()
        old = [task.file.file_path for task in load_table(self.catalog, SILVER).scan().plan_files()]
        new = self._writer.write(self._rows("bcd"))
        before()
        staging.stage(SILVER, old, new)
        assert self.ids() == "ab"
        return staging


@pytest.fixture
def lake(catalog: Catalog) -> Lake:
    return Lake(catalog)


def test_replacement_is_published_with_its_ledger(lake: Lake) -> None:
    lake.stage().commit_replacement({SILVER: {0: 1}}, "it")
    assert lake.ids() == "ab"
    with pytest.raises(CommitError, match="are being replaced"):
        Committer(lake.catalog, BINANCE.bronze, BINANCE.name, TOPIC).fence("id")
    assert publish(lake.catalog, BINANCE) == "it"
    assert lake.ids() == "bcd"
    assert publish(lake.catalog, BINANCE) is None
    ledger = read(load_table(lake.catalog, SILVER).properties, BINANCE.name, TOPIC)
    assert (ledger.next_offset(0), ledger.partitions[0].rows) == (2, 3)
    assert not any(staged_branch(load_table(lake.catalog, name)) for name in BINANCE.tables)


def test_maintenance_that_has_begun_before_deletes_no_file_of_a_replacement(lake: Lake) -> None:
    """The files may be older than the age of orphan files before they are staged."""
    run = MaintenanceRun(lake.catalog, definitions(BINANCE)[SILVER], Timing(0, 0, lambda: time.time() + 60))
    lake.stage(lambda: list(run._delete_orphans())).commit_replacement({SILVER: {0: 1}}, "it")
    publish(lake.catalog, BINANCE)
    assert lake.ids() == "bcd"


def test_aborted_replacement_changes_nothing(lake: Lake) -> None:
    lake.stage().abort()
    assert publish(lake.catalog, BINANCE) is None
    assert lake.ids() == "ab"
    assert not any(staged_branch(load_table(lake.catalog, name)) for name in BINANCE.tables)


def test_replacement_fences_the_flow(lake: Lake) -> None:
    lake.stage()
    with pytest.raises(FencedError, match="has fenced writer epoch 1"):
        lake.committer.commit([], [OffsetRange(0, 2, 3, 0)])


def test_flow_that_starts_fences_the_replacement(lake: Lake) -> None:
    staging = lake.stage()
    Committer(lake.catalog, BINANCE.bronze, BINANCE.name, TOPIC).fence("id")
    with pytest.raises(FencedError):
        staging.commit_replacement({}, "it")
    assert publish(lake.catalog, BINANCE) is None
    assert lake.ids() == "ab"
