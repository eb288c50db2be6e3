"""Incremental audits agree with full ones, whatever happened to the tables, and read everything only if they must."""

import json
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from pyiceberg.table.snapshots import Operation

from k2flow.audit.report import Reading, Verdict
from k2flow.exchange import find_exchange
from k2flow.iceberg.ledger import KEY
from k2flow.iceberg.rewrite import rewrite_files
from k2flow.iceberg.tables import definitions
from k2flow.layers import BRONZE, DLQ, LAYERS, Layer
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.plans import live_files
from k2flow.maintain.storage import path_of
from tests.audited_lake import COPY, AuditedLake, other_value

PIECES = 8
STEPS = 6


EXCHANGE = replace(find_exchange("binance"), layers=(*LAYERS, COPY))


@pytest.fixture
def lake(tmp_path: Path, seed: int) -> AuditedLake:
    return AuditedLake(tmp_path / "lake", EXCHANGE, count=800, pieces=PIECES, seed=seed)


@pytest.fixture
def lake_of_two_handlers(tmp_path: Path, seed: int) -> AuditedLake:
    exchange = replace(EXCHANGE, dedup_key=("symbol", "trade_id"))
    return AuditedLake(tmp_path / "lake", exchange, count=400, pieces=PIECES, seed=seed, handlers=2, loss=0.1)


class History:
    """Random things that happen to the tables of a lake."""

    def __init__(self, lake: AuditedLake, seed: int) -> None:
        self.lake = lake
        self.chance = random.Random(seed)

    def step(self) -> None:
        self.chance.choice((self.add, self.add, self.fall_behind, self.compact, self.compact))()

    def add(self) -> None:
        self.lake.add()

    def fall_behind(self) -> None:
        """Commit to some tables only."""
        names = self.lake.exchange.tables
        self.lake.add(without=tuple(self.chance.sample(names, self.chance.randint(1, len(names) - 1))))

    def compact(self) -> None:
        """Merge some files of a partition of some table."""
        layer = self.chance.choice(self.lake.exchange.layers)
        table = self.lake.table(layer)
        if not (files := live_files(table, layer.time_column)):
            return
        partition = self.chance.choice(files).partition
        own = [live for live in files if live.partition == partition]
        chosen = self.chance.sample(own, self.chance.randint(1, len(own)))
        definition = definitions(self.lake.exchange)[layer.table(self.lake.exchange.name)]
        new = Compactor(table, definition).compact(chosen)
        paths = [live.file.file_path for live in chosen]
        assert rewrite_files(self.lake.catalog, table.name()[-1], Operation.REPLACE, paths, new, 0)

    def damage(self) -> None:
        """Remove a row of a table, double it, or give it another value, as another program does."""
        layer = self.chance.choice(self.lake.exchange.layers)
        table = self.lake.table(layer)
        rows = table.scan().to_arrow().cast(layer.arrow_schema)
        at = self.chance.randrange(rows.num_rows)
        if self.chance.random() < 0.3:
            table.append(rows.slice(at, 1))
        elif self.chance.random() < 0.5:
            other = [rows.slice(0, at), rows.slice(at + 1)]
            table.overwrite(_in_order(pa.concat_tables(other), layer))
        else:
            names = {*layer.row_hash} - {"topic", "detail", "ingestion_timestamp", "failed_at"}
            column = self.chance.choice(sorted(names))
            kind = layer.arrow_schema.field(column).type
            self.lake.damage(layer, column, lambda value: other_value(value, kind))


def _in_order(rows: pa.Table, layer: Layer) -> pa.Table:
    return rows.sort_by([(column, "ascending") for column in layer.sorted_by]) if layer.sorted_by else rows


def proofs(lake: AuditedLake) -> Path:
    return lake.folder / "cache" / "audit"


@contextmanager
def without_trace(lake: AuditedLake) -> Iterator[None]:
    """Restore the proof at the end."""
    kept = lake.folder / "kept"
    shutil.copytree(proofs(lake), kept)
    yield
    shutil.rmtree(proofs(lake))
    kept.rename(proofs(lake))


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_incremental_audits_agree_with_full_ones(request: pytest.FixtureRequest, seed: int, number: int) -> None:
    lake: AuditedLake = request.getfixturevalue("lake_of_two_handlers" if number % 2 else "lake")
    history = History(lake, seed + number)
    lake.audit()
    for _ in range(STEPS):
        history.step()
        if history.chance.random() < 0.3:
            with lake.restored():
                history.damage()
                with without_trace(lake):
                    found = lake.audit(full=False, sample=0.2)
                    assert found.checks() == lake.audit().checks()
        if history.chance.random() < 0.6:
            report = lake.audit(full=False, sample=0.2)
            assert report.verdict is Verdict.HOLDS, report.findings
            assert report.reading is Reading.INCREMENTAL, report.why_full
            with without_trace(lake):
                assert lake.audit().verdict is Verdict.HOLDS


def newest_file(lake: AuditedLake, layer: Layer) -> Path:
    paths = [Path(path_of(task.file.file_path)) for task in lake.table(layer).scan().plan_files()]
    return max(paths, key=lambda path: path.stat().st_mtime_ns)


def test_pending_file_that_changed_in_place_is_not_proven_again(lake: AuditedLake) -> None:
    """A table was behind, so its messages are read again: their file must have the rows of before."""
    lake.audit()
    lake.add(without=(lake.exchange.silver,))
    assert lake.audit(full=False, sample=0).reading is Reading.INCREMENTAL
    path = newest_file(lake, BRONZE)
    rows = pq.read_table(path, partitioning=None)
    at = rows.schema.get_field_index("ingestion_timestamp")
    later = pc.add(rows.column(at), pa.scalar(1, pa.duration("us")))
    pq.write_table(rows.set_column(at, rows.schema.field(at), later.cast(rows.schema.field(at).type)), path)
    lake.add()
    report = lake.audit(full=False, sample=0)
    assert report.why_full == f"file://{path} no longer has the rows that were proven"


def test_dead_letter_of_a_valid_message_is_noticed_though_its_table_was_behind(lake: AuditedLake) -> None:
    """Bronze's and Silver's rows of the message were proven before: only the dead letter is new."""
    lake.audit()
    first = next_offset(lake)
    lake.add(without=(lake.exchange.dlq,))
    assert lake.audit(full=False, sample=0).reading is Reading.INCREMENTAL
    lake.add()
    letters = lake.table(DLQ).scan().to_arrow().cast(DLQ.arrow_schema)
    bad = {(row["partition"], row["offset"]) for row in letters.select(["partition", "offset"]).to_pylist()}
    valid = next(offset for offset in range(first, next_offset(lake)) if (0, offset) not in bad)
    forged = letters.slice(0, 1)
    for column, value in (("partition", 0), ("offset", valid)):
        field = DLQ.arrow_schema.field(column)
        forged = forged.set_column(DLQ.columns.index(column), field, pa.array([value], field.type))
    lake.table(DLQ).append(forged)
    report = lake.audit(full=False, sample=0)
    assert report.why_full in (
        f"{lake.exchange.dlq}: rows that no bad message gives",
        "ledger_rows: the table has 8 rows, its ledger counts 7",
    )
    assert "in_both" in report.checks()


def next_offset(lake: AuditedLake) -> int:
    """Return the offset of partition 0 that Bronze ends before."""
    rows = lake.table(BRONZE).scan(row_filter="partition = 0").to_arrow()
    return int(pc.max(rows["offset"]).as_py()) + 1


def test_nothing_is_proven_while_bronze_is_behind(lake: AuditedLake) -> None:
    """Bronze's rows of messages that Silver has already must still be compared with Silver when they come."""
    lake.audit()
    (proof,) = proofs(lake).glob("*/proof")
    before = proof.read_bytes()
    lake.add(without=(lake.exchange.bronze,))
    for full in (False, True):
        report = lake.audit(full=full)
        assert (report.verdict, proof.read_bytes() == before) == (Verdict.HOLDS, True), report.findings
    lake.add()
    assert lake.audit(full=False).reading is Reading.INCREMENTAL
    assert proof.read_bytes() != before


def test_partition_that_left_all_ledgers_is_noticed(lake: AuditedLake) -> None:
    """Its files are proven, and no ledger says that they are not."""
    lake.audit()
    for layer in lake.exchange.layers:
        table = lake.table(layer)
        ledger = json.loads(table.properties[KEY + lake.exchange.name])
        del ledger["partitions"]["1"]
        with table.transaction() as transaction:
            transaction.set_properties({KEY + lake.exchange.name: json.dumps(ledger)})
    report = lake.audit(full=False, sample=0)
    assert (report.why_full or "").startswith("binance: the ledgers lost ")
    assert "bronze_outside_ledger" in report.checks()
