"""`k2flow status`, from before the first table until after the broker is gone."""

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from confluent_kafka import Producer
from pyiceberg.catalog import Catalog
from pyiceberg.io import FileIO
from pyiceberg.manifest import DataFile, ManifestEntry, ManifestFile
from pyiceberg.table.snapshots import Operation

from k2flow.config.settings import load_settings
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import STAGED_KEY
from k2flow.iceberg.manifests import data_manifests
from k2flow.iceberg.replace import RewriteFiles
from k2flow.iceberg.rewrite import commit_change, set_property
from k2flow.iceberg.tables import gold_definition
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import Timing
from k2flow.maintain.lease import MaintenanceLeases
from k2flow.maintain.run import MaintenanceRun
from k2flow.status import collector as collector_module
from k2flow.status.collector import StatusCollector
from k2flow.status.model import FlowState, Level
from tests.gold import Gold
from tests.integration.conftest import fill
from tests.integration.harness import ROOT, Lake

NewLake = Callable[..., Lake]

NOWHERE = "127.0.0.1:9"  # nothing listens there
STATUS = (sys.executable, "-m", "k2flow", "status")
LAYERS = ("bronze", "silver", "dlq", "gold")


def status_output(lake: Lake, *arguments: str, code: int = 0, **extra: str) -> str:
    """Return the output of `k2flow status` for the lake's exchange."""
    done = lake.command("status", lake.exchange, *arguments, **extra)
    assert done.returncode == code, f"{done.returncode}\n{done.stdout}\n{done.stderr}"
    assert "Traceback" not in done.stderr
    return done.stdout or done.stderr


def new_collector(catalog: Catalog, topic: str, bootstrap: str, monkeypatch: pytest.MonkeyPatch) -> StatusCollector:
    """Return a collector of Binance's status, with settings read again."""
    monkeypatch.setenv("K2FLOW_BINANCE_TOPIC", topic)
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", bootstrap)
    return StatusCollector(catalog, load_settings(("binance",)), [replace(find_exchange("binance"))])


def test_status_from_no_tables_to_a_dead_broker(new_lake: NewLake, monkeypatch: pytest.MonkeyPatch) -> None:
    lake = new_lake(partitions=3)
    collector = new_collector(lake.catalog(), lake.topic, lake.bootstrap, monkeypatch)
    fill(lake, count=1_000, bad=0.05, duplicates=0.03, seed=3)
    before = collector.collect().exchanges["binance"]
    assert before.flow.state is FlowState.NEVER
    assert before.problems == ("there are no tables yet: start the flow, or run `k2flow tables create binance`",)
    lake.catch_up()
    found = collector.collect()
    caught_up = found.exchanges["binance"]
    layers, letters = caught_up.layers, caught_up.dead_letters
    assert (caught_up.flow.state, caught_up.problems) == (FlowState.STOPPED, ())
    for layer in LAYERS:
        each = layers[layer]
        assert each is not None
        assert (each.level, each.lag, each.lag_seconds, each.messages) == (Level.OK, 0, 0.0, 1_000)
    bronze, silver, dlq = layers["bronze"], layers["silver"], layers["dlq"]
    assert bronze and silver and dlq  # noqa: PT018
    assert letters
    assert (bronze.rows, silver.rows + dlq.rows) == (1_000, 1_000)
    assert letters.letters_read == letters.hour_letters == dlq.rows > 0
    assert letters.share == letters.hour_share == dlq.rows / 1_000
    assert sum(letters.reasons.values()) == letters.letters_read
    table = found.tables["bronze_binance_trades"]
    assert table
    assert table.rows == 1_000
    fill(lake, count=500, seed=4)
    waiting = collector.collect().to_dict()["exchanges"]["binance"]["layers"]
    for layer in LAYERS:
        partitions = waiting[layer]["partitions"]
        assert waiting[layer]["lag"] == 500
        assert 0 < waiting[layer]["lag_seconds"] < 60
        assert waiting[layer]["lag_seconds"] == max(each["lag_seconds"] for each in partitions)
        assert [each["lag"] for each in partitions] == [each["high"] - each["next"] for each in partitions]
    gone = json.loads(status_output(lake, "--json", K2FLOW_KAFKA_BOOTSTRAP_SERVERS=NOWHERE))["exchanges"]["binance"]
    assert gone["kafka_problem"].startswith(f"no Kafka broker answers at {NOWHERE} (")
    silver_row = gone["layers"]["silver"]
    assert (silver_row["level"], silver_row["lag"], silver_row["rows"]) == ("unknown", None, silver.rows)


def test_open_transaction_is_lag_until_it_ends(new_lake: NewLake, monkeypatch: pytest.MonkeyPatch) -> None:
    """No reader sees its messages; the log's end is shown beside the stable end."""
    lake = new_lake(partitions=1)
    fill(lake, count=500, seed=3)
    config = {"bootstrap.servers": lake.bootstrap, "transactional.id": lake.topic, "linger.ms": 20}
    producer = Producer(config)
    producer.init_transactions(30)
    producer.begin_transaction()
    long_ago = time.time_ns() // 1_000_000 - 600_000
    for number in range(1_000):
        producer.produce(lake.topic, b"%d" % number, partition=0, timestamp=long_ago)
    assert producer.flush(30) == 0
    lake.catch_up()
    collector = new_collector(lake.catalog(), lake.topic, lake.bootstrap, monkeypatch)
    hung = collector.collect().exchanges["binance"]
    for layer in LAYERS:
        each = hung.layers[layer]
        assert each is not None
        (partition,) = each.partitions
        assert (each.level, each.lag, partition.high, partition.log_end) == (Level.STALE, 1_000, 500, 1_500)
        assert each.lag_seconds == pytest.approx(600, abs=60)
    (problem,) = hung.problems
    assert f"{lake.topic}[0]: a transaction has been open for" in problem
    shown = status_output(lake)
    assert "an open transaction hides 1,000 messages: the log ends at 1,500, readable up to 500" in shown
    producer.abort_transaction(30)
    ended = collector.collect().exchanges["binance"]
    bronze = ended.layers["bronze"]
    assert bronze is not None
    assert (bronze.level, bronze.lag, ended.problems, ended.open_transactions) == (Level.OK, 0, (), ())


def test_watch_beside_a_flow(new_lake: NewLake) -> None:
    """It redraws in place on a terminal, prints lines of JSON into a pipe, and ends cleanly on Ctrl-C."""
    lake = new_lake(partitions=2)
    fill(lake, count=2_000, seed=6)
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow:
        flow.wait_for_log("gold_crypto_trades: ")
        screen = until_interrupted(lake, ("deduplication window: ", "as of "), 2)
        assert "\x1b[1A" in screen  # up, to draw over the last status
        assert "runs: process" in screen
        assert "Traceback" not in screen
        watching = subprocess.Popen(
            [*STATUS, lake.exchange, "--watch", "--every", "0.3s", "--json"],
            cwd=ROOT, env=lake.environment(), stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert watching.stdout is not None
        seen = [json.loads(watching.stdout.readline()) for _ in range(2)]
        watching.send_signal(signal.SIGINT)
        assert watching.wait(10) == 0
    assert seen[0]["at"] < seen[1]["at"]
    assert seen[1]["exchanges"]["binance"]["flow"]["state"] == "runs"
    assert seen[1]["exchanges"]["binance"]["layers"]["bronze"]["messages_per_second"] > 0
    window = seen[1]["exchanges"]["binance"]["window"]
    assert (window["workers"], window["workers_here"], window["disk_ids"], window["disk_hits"]) == (1, 1, 0, 0)
    assert window["memory_bytes"] > 15 * window["ids"] > 15 * 1_000
    assert screen.count("as of ") >= 2


def until_interrupted(lake: Lake, texts: Sequence[str], times: int) -> str:
    """Return the output of `--watch` on a terminal, interrupted after it has drawn each text that many times."""
    ours, its = pty.openpty()
    environment = lake.environment(TERM="xterm", COLUMNS="150", LINES="60")
    process = subprocess.Popen(
        [*STATUS, lake.exchange, "--watch", "--every", "0.3s"],
        cwd=ROOT, env=environment, stdin=its, stdout=its, stderr=its,
    )  # fmt: skip
    os.close(its)
    drawn, deadline = "", time.monotonic() + 30
    while any(drawn.count(text) < times for text in texts):
        assert time.monotonic() < deadline, drawn
        if select.select([ours], [], [], 0.1)[0]:
            drawn += os.read(ours, 65_536).decode(errors="replace")
    process.send_signal(signal.SIGINT)
    deadline = time.monotonic() + 10
    with suppress(OSError):  # the process has closed the terminal
        while select.select([ours], [], [], max(0.0, deadline - time.monotonic()))[0]:
            os.read(ours, 65_536)  # with a full terminal it could not end
    assert process.wait(max(0.1, deadline - time.monotonic())) == 0
    os.close(ours)
    return drawn


def test_unreachable_catalog_is_an_error(tmp_path: Path) -> None:
    lake = Lake("binance", "trades", tmp_path / "lake", NOWHERE)
    uri = {"PYICEBERG_CATALOG__K2FLOW__URI": "sqlite:////nonexistent/x.db", "PYICEBERG_CATALOG__K2FLOW__TYPE": "sql"}
    assert "the catalog or its storage cannot be used" in status_output(lake, code=1, **uri)


def without_broker(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> StatusCollector:
    """Return a collector of the status of the tables of tests.gold, without a broker."""
    monkeypatch.setattr(collector_module, "BROKER_SECONDS", 0.1)
    return new_collector(catalog, "topic", NOWHERE, monkeypatch)


def test_maintenance_and_replacement(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Maintenance due and done, the lease, a replacement of rows, and a problem are reported."""
    gold, collector = Gold(catalog), without_broker(catalog, monkeypatch)
    for _ in range(3):
        gold.add("binance", np.full(5, 490_000))
    first = collector.collect()
    exchange, table = first.exchanges["binance"], first.tables[GOLD_TABLE]
    assert table is not None
    assert [(each.what, each.removed, each.added) for each in table.due] == [("compaction", 3, 1)]
    assert (table.rows, table.files, table.small_files) == (15, 3, 3)
    assert (table.maintained, table.leader, exchange.replacement) == ((), None, None)
    assert exchange.layers["bronze"] is not None
    assert exchange.layers["bronze"].committed_at is None
    list(MaintenanceRun(catalog, gold_definition(), Timing()).run())
    assert MaintenanceLeases(catalog).acquire(GOLD_TABLE) is None
    set_property(catalog, "bronze_binance_trades", f"{STAGED_KEY}binance", json.dumps({"what": "it", "tables": {}}))
    second = collector.collect()
    exchange, table = second.exchanges["binance"], second.tables[GOLD_TABLE]
    assert table is not None
    assert table.due == ()
    assert {each.what for each in table.maintained} == {"compaction", "manifests"}
    assert table.leader is not None
    assert table.leader.pid == os.getpid()
    assert exchange.replacement is not None
    assert (exchange.replacement.what, exchange.replacement.committed) == ("it", True)
    catalog.drop_table("market_data.dlq_binance_trades")
    set_property(catalog, GOLD_TABLE, "k2flow.ledger.binance", "{")
    exchange = collector.collect().exchanges["binance"]
    assert exchange.layers["dlq"] is None
    assert "there is no table market_data.dlq_binance_trades: start the flow" in exchange.problems[0]
    assert "table property k2flow.ledger.binance is not a ledger" in exchange.problems[1]


def test_each_manifest_is_read_once(catalog: Catalog, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only metadata of a table with many files is read, and each manifest once, however often status is collected."""
    gold, collector = Gold(catalog), without_broker(catalog, monkeypatch)
    gold.add("binance", np.full(100, 490_000))
    (entry,) = data_manifests(load_table(catalog, GOLD_TABLE))[0].fetch_manifest_entry(
        load_table(catalog, GOLD_TABLE).io
    )
    many = [copied(entry.data_file, n) for n in range(2_000)]
    assert commit_change(
        catalog, GOLD_TABLE, lambda table: RewriteFiles(table, Operation.OVERWRITE, (), many)._commit()
    )
    read: list[str] = []
    fetch = ManifestFile.fetch_manifest_entry

    def counted(self: ManifestFile, io: FileIO, discard_deleted: bool = True) -> list[ManifestEntry]:
        read.append(self.manifest_path)
        return fetch(self, io, discard_deleted)

    monkeypatch.setattr(ManifestFile, "fetch_manifest_entry", counted)
    for _ in range(2):
        table = collector.collect().tables[GOLD_TABLE]
        assert table is not None
        assert table.small_files == table.files == 2_001
    assert sorted(read) == sorted(each.manifest_path for each in data_manifests(load_table(catalog, GOLD_TABLE)))


def copied(file: DataFile, n: int) -> DataFile:
    """Return the same file under another name, with all its statistics."""
    names = ("content", "file_format", "partition", "record_count", "file_size_in_bytes", "sort_order_id")
    statistics = ("column_sizes", "value_counts", "null_value_counts", "lower_bounds", "upper_bounds")
    values = {name: getattr(file, name) for name in (*names, *statistics)}
    copy = DataFile.from_args(file_path=f"{file.file_path}-{n}", **values)
    copy.spec_id = file.spec_id
    return copy
