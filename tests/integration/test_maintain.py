"""Maintenance of real tables: what it removes, what stays, and that flows and readers do not notice it."""

import os
import resource
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.exceptions import CommitFailedException
from pyiceberg.table import Table

from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import CommittedRange
from k2flow.iceberg.rewrite import ATTEMPTS
from k2flow.iceberg.snapshots import KEEP_SNAPSHOTS, readers_tag
from k2flow.iceberg.tables import TableDefinition, candles_definition, create, definitions, gold_definition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.lease import LEASE, LEASE_SECONDS, MaintenanceLeases
from k2flow.maintain.plans import LiveFile, is_closed, live_files
from k2flow.maintain.run import MaintenanceRun
from k2flow.maintain.storage import TableStorage, reachable_files
from k2flow.query.connection import connect_to
from k2flow.sandbox.producer import ProduceOptions
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import MessageStream
from tests.candles import one_candle
from tests.gold import Gold
from tests.integration.conftest import fill
from tests.integration.forked import Forked
from tests.integration.harness import ROOT, Lake, assert_tables, batches, read_topic
from tests.integration.test_audit import audited
from tests.oracle import expect

NewLake = Callable[..., Lake]

LAYERS = ("bronze", "silver", "dlq", "gold")
NOW = Timing(orphan_seconds=0, reader_seconds=0)
CONCURRENT_SECONDS = float(os.environ.get("CONCURRENT_SECONDS", "8"))
"""How long a flow, maintenance and readers run at once."""


def maintain(lake: Lake, *arguments: str, code: int = 0) -> str:
    """Return the output of `k2flow maintain`."""
    done = lake.command("maintain", *arguments)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def definition(lake: Lake, layer: str) -> TableDefinition:
    return definitions(find_exchange(lake.exchange))[lake.table(layer).name()[-1]]


def run_maintenance(lake: Lake, layer: str, timing: Timing = NOW) -> list[str]:
    return [action.what for action in MaintenanceRun(lake.catalog(), definition(lake, layer), timing).run()]


def send_days(lake: Lake, days: int, a_day: int) -> None:
    """Send `a_day` messages of each of the last `days` days, with bad messages and duplicates."""
    sender = Sender({"bootstrap.servers": lake.bootstrap}, lake.topic)
    for day in range(days, 0, -1):
        start = datetime.now(UTC) - timedelta(days=day)
        options = ProduceOptions(count=a_day, rate=a_day / 86_400, bad=0.05, duplicates=0.03, seed=day, start=start)
        for messages in MessageStream("BINANCE", options, options.start_us()).chunks():
            sender.send(messages)
    sender.finish()


def by_day(table: Table) -> Counter[date]:
    column = table.schema().find_column_name(table.spec().fields[0].source_id)
    return Counter(table.scan(selected_fields=(column,)).to_arrow()[column].to_pylist())


def test_each_table_keeps_exactly_its_days(new_lake: NewLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each day is a batch. Gold keeps all of them, and the audit still holds."""
    lake = new_lake(partitions=1)
    kept = {"bronze": 7, "silver": 12, "dlq": 5}
    settings = {
        **batches(300),
        "K2FLOW_BINANCE_TRIGGER_SECONDS": "3600",
        "K2FLOW_BINANCE_SILVER_RETENTION_DAYS": str(kept["silver"]),
        "K2FLOW_BINANCE_DLQ_RETENTION_DAYS": str(kept["dlq"]),
    }
    send_days(lake, days=21, a_day=300)
    flow = [sys.executable, "-m", "tests.integration.day_a_batch", "21", "binance"]
    environment = lake.environment(**settings, K2FLOW_UNTIL_CAUGHT_UP="1")
    subprocess.run(flow, cwd=ROOT, env=environment, check=True, capture_output=True, timeout=120)
    before = {layer: by_day(lake.table(layer)) for layer in LAYERS}
    today = datetime.now(UTC).date()
    assert sorted(before["bronze"]) == [today - timedelta(days=n) for n in range(20, -1, -1)]
    gold = connect_to(lake.catalog()).sql(f"SELECT * FROM {GOLD_TABLE} ORDER BY message_id, timestamp").fetchall()
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    done = lake.command("maintain", "--orphan-older-than", "0s", "--reader-grace", "0s", **settings)
    assert done.returncode == 0, done.stderr
    for layer, days in kept.items():
        first = today - timedelta(days=days)
        assert by_day(lake.table(layer)) == Counter({d: n for d, n in before[layer].items() if d >= first}), layer
    assert (
        connect_to(lake.catalog()).sql(f"SELECT * FROM {GOLD_TABLE} ORDER BY message_id, timestamp").fetchall() == gold
    )
    assert audited(lake, **settings)["verdict"] == "holds"
    assert maintain_again(lake, settings) == "nothing to do\n"


def maintain_again(lake: Lake, settings: dict[str, str]) -> str:
    return lake.command("maintain", "--orphan-older-than", "1h", **settings).stdout


def test_tables_stay_small_after_hours_of_commits(new_lake: NewLake) -> None:
    """Few files, few snapshots, no orphan files, little metadata; the same rows."""
    lake = new_lake(partitions=3)
    send_days(lake, days=1, a_day=4_500)
    lake.catch_up(**batches(40), K2FLOW_LOG_LEVEL="WARNING")
    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    assert len(live_files(lake.table("gold"), "timestamp")) > 110
    for layer in LAYERS:
        run_maintenance(lake, layer)
        table = lake.table(layer)
        target = int(table.properties["write.target-file-size-bytes"])
        files = live_files(table, definition(lake, layer).layer.time_column)
        small = Counter(live.partition for live in files if live.file.file_size_in_bytes < target // 2)
        closed = {live.partition for live in files if is_closed(live, datetime.now(UTC))}
        assert all(count == 1 for partition, count in small.items() if partition in closed)
        assert len(table.metadata.snapshots) <= KEEP_SNAPSHOTS + 5
        listed = {path for path, _, _ in TableStorage(table).list_files()}
        assert listed == reachable_files(table)
        assert Path(table.metadata_location.removeprefix("file://")).stat().st_size < 1_000_000
    assert_tables(lake, expected)
    assert audited(lake)["verdict"] == "holds"
    fill(lake, count=500, bad=0.02, duplicates=0.05, seed=9)
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_dry_run_changes_nothing_and_shows_what_is_due(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    send_days(lake, days=1, a_day=500)
    lake.catch_up(**batches(50))
    before = {layer: lake.table(layer).metadata_location for layer in LAYERS}
    listed = sorted(lake.home.rglob("*"))
    shown = maintain(lake, "--dry-run", "--orphan-older-than", "0s")
    assert "due" in shown
    assert "compaction" in shown
    assert before == {layer: lake.table(layer).metadata_location for layer in LAYERS}
    assert [path for path in sorted(lake.home.rglob("*")) if "catalog.db" not in path.name] == [
        path for path in listed if "catalog.db" not in path.name
    ]
    did = maintain(lake, GOLD_TABLE)
    assert "compaction" in did
    assert "unknown table" in maintain(lake, "nonsense", code=1)


def test_files_in_flight_and_files_of_readers_stay(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    send_days(lake, days=1, a_day=500)
    lake.catch_up(**batches(50))
    table = lake.table("gold")
    read_before = paths(lake)
    in_flight = Path(table.metadata.location.removeprefix("file://")) / "data" / "in-flight.parquet"
    in_flight.write_bytes(b"a worker has just written this")
    foreign = in_flight.with_name("notes.txt")
    foreign.write_text("of another program")
    now = time.time()
    assert "compaction" in run_maintenance(lake, "gold", Timing(600, 300, lambda: now))
    replaced = read_before - paths(lake)
    assert replaced
    run_maintenance(lake, "gold", Timing(600, 300, lambda: now + 299))
    assert all(path.exists() for path in {*replaced, in_flight})
    fill(lake, count=2_000, seed=4)
    lake.catch_up(**batches(15), K2FLOW_LOG_LEVEL="WARNING")  # more snapshots than maintenance keeps
    for path in {*replaced, in_flight}:
        os.utime(path, (now - 700, now - 700))  # the age of files follows the storage's clock
    run_maintenance(lake, "gold", Timing(600, 300, lambda: now + 700))
    assert not any(path.exists() for path in {*replaced, in_flight})
    assert foreign.exists()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_compaction_of_more_files_than_may_be_open(catalog: Catalog) -> None:
    """Late trades give an hour many files, each with a few rows from the whole hour."""
    gold = Gold(catalog)
    for _ in range(3):
        gold.add("binance", np.full(5, 490_000))
    list(MaintenanceRun(catalog, gold_definition(), NOW).run())
    table = load_table(catalog, GOLD_TABLE)
    writer = DataFileWriter(table, gold_definition())
    (one,) = live_files(table, "timestamp")
    rows = pq.read_table(one.file.file_path.removeprefix("file://"), partitioning=None).cast(
        gold_definition().arrow_schema
    )
    times = pa.array(490_000 * 3_600_000_000 + np.arange(15) * 60_000_000).cast(pa.timestamp("us", "UTC"))
    rows = rows.set_column(rows.schema.get_field_index("timestamp"), rows.schema.field("timestamp"), times)
    written = [file for _ in range(200) for file in writer.write(rows.combine_chunks().to_batches()[0])]
    files = [LiveFile(file, one.partition, 490_000 * 3_600_000_000) for file in written]
    limit, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 40, most))
    try:
        (new,) = Compactor(table, gold_definition()).compact(files)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (limit, most))
    assert new.record_count == 200 * 15


def test_candles_are_maintained_beside_their_flow_but_not_compacted(catalog: Catalog) -> None:
    """Each hour is one file, which the flow replaces. What another program adds waits until the flow does."""
    create(catalog, [candles_definition()])
    writer = DataFileWriter(load_table(catalog, CANDLES_TABLE), candles_definition())
    flow = Committer(catalog, CANDLES_TABLE, "candles", GOLD_TABLE)
    flow.fence(str(uuid.uuid4()))
    files = [file for _ in range(2) for file in writer.write(one_candle(490_000))]
    flow.overwrite(files, {}, {0: CommittedRange(0, 2, 2)})
    table = load_table(catalog, CANDLES_TABLE)
    head = table.metadata.current_snapshot_id
    assert head is not None
    table.manage_snapshots().create_tag(head, readers_tag(1, head)).commit()
    done = [action.what for action in MaintenanceRun(catalog, candles_definition(), NOW).run()]
    assert done == ["snapshots"]  # the tag
    assert set(load_table(catalog, CANDLES_TABLE).refs()) == {"main"}
    days = {file.file_path: 490_000 // 24 for file in files}
    flow.overwrite(writer.write(one_candle(490_000)), days, {0: CommittedRange(0, 3, 3)})
    assert load_table(catalog, CANDLES_TABLE).scan().to_arrow().num_rows == 1


@pytest.mark.parametrize("refused", [1, ATTEMPTS])
@pytest.mark.parametrize("landed", [True, False])
def test_refused_compaction_keeps_its_files_if_it_landed(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch, refused: int, landed: bool
) -> None:
    """A proxy may repeat a request whose answer was lost. The catalog refuses the second one."""
    gold = Gold(catalog)
    for _ in range(3):
        gold.add("binance", np.full(5, 490_000))
    real, calls = type(catalog).commit_table, 0

    def refuse(self: Catalog, *args: Any, **kwargs: Any) -> object:
        nonlocal calls
        calls += 1
        if calls > refused:
            return real(self, *args, **kwargs)
        if landed and calls == refused:
            real(self, *args, **kwargs)
        raise CommitFailedException("the head has moved")

    monkeypatch.setattr(type(catalog), "commit_table", refuse)
    run = MaintenanceRun(catalog, gold_definition(), Timing())
    done = [action.what for action in run._compact()]
    assert done == (["compaction"] if landed or refused < ATTEMPTS else [])
    table = load_table(catalog, GOLD_TABLE)
    assert table.scan().to_arrow().num_rows == 15
    added = {path for path, _, _ in TableStorage(table).list_files() if not path.endswith(".gz")}
    assert added <= reachable_files(table)


def paths(lake: Lake) -> set[Path]:
    """Return Gold's data files."""
    return {Path(live.file.file_path.removeprefix("file://")) for live in live_files(lake.table("gold"), "timestamp")}


def test_one_process_holds_the_lease_of_a_table(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=100)
    lake.catch_up()
    catalog, now = lake.catalog(), [1_000.0]
    first, second = MaintenanceLeases(catalog, lambda: now[0]), MaintenanceLeases(catalog, lambda: now[0])
    second._process = type(second._process)("another-host", 1, 1.0)
    assert first.acquire(GOLD_TABLE) is None
    assert second.acquire(GOLD_TABLE) == first._process
    now[0] += LEASE_SECONDS + 1
    assert second.acquire(GOLD_TABLE) is None
    assert first.acquire(GOLD_TABLE) == second._process
    now[0] -= 3 * LEASE_SECONDS
    assert first.acquire(GOLD_TABLE) is None  # the other host's clock is far ahead
    now[0] += 3 * LEASE_SECONDS
    assert second.acquire(GOLD_TABLE) is None
    assert "process 1 on another-host maintains it" not in maintain(lake, GOLD_TABLE)  # its lease ended long ago
    assert LEASE not in lake.table("gold").properties


def test_maintenance_killed_at_any_moment_loses_nothing(new_lake: NewLake) -> None:
    """The next run continues, and no row is lost or duplicated."""
    lake = new_lake(partitions=1)
    send_days(lake, days=1, a_day=3_000)
    lake.catch_up(**batches(60), K2FLOW_LOG_LEVEL="WARNING")
    arguments = ["maintain", "--orphan-older-than", "0s", "--reader-grace", "0s"]
    with Path(os.devnull).open("wb") as nowhere:
        for i in range(3):
            process = Forked("k2flow", arguments, lake.environment(), ROOT, (nowhere.fileno(), nowhere.fileno()))
            time.sleep(0.5 + 0.4 * i)
            process.kill()
            process.wait()
    maintain(lake, "--orphan-older-than", "0s", "--reader-grace", "0s")
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert audited(lake)["verdict"] == "holds"


@contextmanager
def maintaining(lake: Lake) -> Any:
    """Repeat maintenance runs, which must end without error."""
    command = [
        sys.executable,
        "-m",
        "k2flow",
        "maintain",
        "--every",
        "1s",
        "--reader-grace",
        "20s",
        "--orphan-older-than",
        "20s",
    ]
    with (lake.home / "maintain.log").open("w+") as log:
        process = subprocess.Popen(command, cwd=ROOT, env=lake.environment(), stdout=log, stderr=log)
        try:
            yield
            deadline = time.monotonic() + 60
            while "compaction" not in (lake.home / "maintain.log").read_text() and time.monotonic() < deadline:
                time.sleep(0.1)  # it may still be importing
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
            assert "compaction" in (lake.home / "maintain.log").read_text()
        finally:
            process.kill()
            process.wait()


def test_flow_maintenance_and_readers_at_once(new_lake: NewLake) -> None:
    """No reader misses a file or sees a wrong count, and the flow commits without delay."""
    lake = new_lake(partitions=3)
    send_days(lake, days=1, a_day=2_000)
    lake.catch_up(**batches(100), K2FLOW_LOG_LEVEL="WARNING")
    wrong: list[str] = []
    reads: Counter[str] = Counter()
    over = threading.Event()
    readers = [
        threading.Thread(target=keep_reading, args=(lake, name, over, reads, wrong))
        for name in ("duckdb", "pyiceberg", "polars")
    ]
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow, maintaining(lake):
        for reader in readers:
            reader.start()
        fill(lake, count=int(CONCURRENT_SECONDS * 200), rate=200, bad=0.02, duplicates=0.03, seed=8)
        over.set()
        for reader in readers:
            reader.join()
        flow.signal(signal.SIGTERM)
        log = flow.wait()
        assert flow.codes() == [0], log
    lake.catch_up()  # the flow committed the messages it had read, not those sent just before the signal
    assert not wrong, wrong[:3]
    assert all(reads[name] > 1 for name in ("duckdb", "pyiceberg", "polars")), reads
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert audited(lake)["verdict"] == "holds"


def keep_reading(lake: Lake, name: str, over: threading.Event, reads: Counter[str], wrong: list[str]) -> None:
    """Read Gold repeatedly: each row once, and never fewer rows than before."""
    before = 0
    catalog = lake.catalog()
    while not over.is_set():
        try:
            rows, ids = READERS[name](catalog)
        except Exception as error:  # noqa: BLE001 - a reader must see no error at all
            wrong.append(f"{name}: {error!r}")
            return
        if rows != ids or rows < before:
            wrong.append(f"{name}: {rows} rows, {ids} ids, {before} before")
            return
        before = rows
        reads[name] += 1


def count_by_duckdb(catalog: Any) -> tuple[int, int]:
    connection: duckdb.DuckDBPyConnection = connect_to(catalog)
    rows, ids = connection.sql(f"SELECT count(*), count(DISTINCT message_id) FROM {GOLD_TABLE}").fetchall()[0]
    return rows, ids


def count_by_pyiceberg(catalog: Any) -> tuple[int, int]:
    ids = catalog.load_table(f"market_data.{GOLD_TABLE}").scan(selected_fields=("message_id",)).to_arrow()["message_id"]
    return len(ids), len(ids.unique())


def count_by_polars(catalog: Any) -> tuple[int, int]:
    frame = pl.scan_iceberg(catalog.load_table(f"market_data.{GOLD_TABLE}")).select("message_id").collect()
    return frame.height, frame["message_id"].n_unique()


READERS = {"duckdb": count_by_duckdb, "pyiceberg": count_by_pyiceberg, "polars": count_by_polars}
