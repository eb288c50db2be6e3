"""Runs flows as users do, as separate processes, and compares their tables with the oracle."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import pyarrow.parquet as pq
from confluent_kafka import Consumer, TopicPartition
from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import read
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.supervisor.plan import free_addresses
from tests.integration.forked import Forked, Started, call
from tests.oracle import Expected, Message, frozen_map

ROOT = Path(__file__).parents[2]
DEADLINE_SECONDS = 120


def batches(rows: int, exchange: str = "binance", together: int = 1) -> dict[str, str]:
    """Return settings: batches of `rows` messages, committed in groups of `together`."""
    prefix = f"K2FLOW_{exchange.upper()}_"
    return {f"{prefix}BATCH_ROWS": str(rows), f"{prefix}COMMIT_BATCHES": str(together)}


@dataclass(frozen=True)
class Lake:
    """One exchange's topic on a broker and a folder for its tables: all that a flow process needs to know."""

    exchange: str
    topic: str
    home: Path
    bootstrap: str

    def environment(self, **extra: str) -> dict[str, str]:
        """Return the environment of a flow process; its only k2flow settings are this lake's and `extra`."""
        outer = {k: v for k, v in os.environ.items() if not k.startswith(("K2FLOW_", "PYICEBERG_", "BYTEWAX_"))}
        own = {
            "K2FLOW_HOME": str(self.home),
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": self.bootstrap,
            f"K2FLOW_{self.exchange.upper()}_TOPIC": self.topic,
        }
        return {**outer, **own, **extra}

    def catalog(self) -> Catalog:
        return self._catalog

    @cached_property
    def _catalog(self) -> Catalog:
        settings = load_settings(exchange_names()).model_copy(update={"home": self.home})
        return open_catalog(settings)

    def table(self, layer: str) -> Table:
        exchange = find_exchange(self.exchange)
        names = {"bronze": exchange.bronze, "silver": exchange.silver, "dlq": exchange.dlq, "gold": GOLD_TABLE}
        names["candles"] = CANDLES_TABLE
        return load_table(self.catalog(), names[layer])

    def start(self, processes: int = 1, arguments: Sequence[str] = (), flow: str | None = None, **extra: str) -> "Flow":
        """Start `python -m bytewax.run flows.<exchange>`, or another flow, as one process or as a cluster."""
        command = [f"flows.{flow or self.exchange}", *arguments]
        addresses = ";".join(free_addresses(processes))
        logs = tempfile.TemporaryFile()  # noqa: SIM115 - the Flow closes it
        started: list[Started] = []
        for i in range(processes):
            cluster = ["-i", str(i), "-a", addresses] if processes > 1 else []
            line, environment = [*command, *cluster], self.environment(**extra)
            if "PYTHONPATH" in extra:  # only a new Python reads it
                new = [sys.executable, "-m", "bytewax.run", *line]
                started.append(subprocess.Popen(new, cwd=ROOT, env=environment, stdout=logs, stderr=logs))
            else:
                started.append(Forked("bytewax.run", line, environment, ROOT, (logs.fileno(), logs.fileno())))
        return Flow(started, logs)

    def command(self, *arguments: str, module: str = "k2flow", **extra: str) -> subprocess.CompletedProcess[str]:
        """Run `python -m k2flow`, or another module, with these arguments."""
        done = call(module, arguments, self.environment(**extra), ROOT, DEADLINE_SECONDS)
        return subprocess.CompletedProcess(done.args, done.returncode, done.stdout.decode(), done.stderr.decode())

    def catch_up(self, processes: int = 1, flow: str | None = None, **extra: str) -> str:
        """Run the flow, or another one, until it has caught up and return its log. Fail if the flow fails."""
        with self.start(processes, flow=flow, K2FLOW_UNTIL_CAUGHT_UP="1", **extra) as running:
            log = running.wait()
            assert running.codes() == [0] * processes, log
        return log


class Flow:
    """Running processes; as a context manager it kills those that are left at the end."""

    def __init__(self, processes: Sequence[Started], logs: IO[bytes]) -> None:
        self.processes = processes
        self._logs = logs

    def __enter__(self) -> "Flow":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._logs.close()

    def signal(self, number: signal.Signals) -> None:
        for process in self.processes:
            process.send_signal(number)

    def log(self) -> str:
        """Return the output of all processes so far."""
        return os.pread(self._logs.fileno(), os.fstat(self._logs.fileno()).st_size, 0).decode()

    def wait_for_log(self, text: str, count: int = 1, seconds: float = DEADLINE_SECONDS) -> None:
        """Wait until the output contains `text` at least `count` times."""
        deadline = time.monotonic() + seconds
        while self.log().count(text) < count:
            assert time.monotonic() < deadline, f"{text!r} was not printed within {seconds} s:\n{self.log()}"
            time.sleep(0.05)

    def wait(self, seconds: float = DEADLINE_SECONDS) -> str:
        """Wait until all processes have ended and return their output."""
        try:
            for process in self.processes:
                process.wait(seconds)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"process {process.pid} has not ended after {seconds} s:\n{self.log()}") from None
        return self.log()

    def codes(self) -> list[int | None]:
        return [process.returncode for process in self.processes]


def read_topic(bootstrap: str, topic: str, config: Mapping[str, str] | None = None) -> list[Message]:
    """Read every message of the topic with a plain consumer."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "oracle",
            "enable.auto.commit": "false",
            "auto.offset.reset": "earliest",
            "enable.partition.eof": "true",
            "isolation.level": "read_committed",
            **(config or {}),
        }
    )
    partitions = list(consumer.list_topics(topic, timeout=10).topics[topic].partitions)
    consumer.assign([TopicPartition(topic, p, 0) for p in partitions])
    messages, ended = [], set()
    deadline = time.monotonic() + DEADLINE_SECONDS
    while len(ended) < len(partitions):
        assert time.monotonic() < deadline, f"{topic} was not read within {DEADLINE_SECONDS} s"
        for m in consumer.consume(10_000, timeout=1):
            if m.error():
                ended.add(m.partition())
            else:
                ms = m.timestamp()[1] if m.timestamp()[0] else None
                messages.append(Message(m.partition(), m.offset(), m.key(), m.value(), ms))
    consumer.close()
    return messages


def assert_tables(lake: Lake, expected: Expected) -> None:
    """Assert that all four tables hold exactly the oracle's rows."""
    assert_bronze(lake, expected)
    assert_dlq(lake, expected)
    silver = rows_of(lake.table("silver"))
    assert Counter(silver) == expected.silver
    assert_gold(lake, expected)


def assert_bronze(lake: Lake, expected: Expected) -> None:
    rows = lake.table("bronze").scan().to_arrow().to_pylist()
    found = {(row["partition"], row["offset"]): row for row in rows}
    assert len(rows) == len(found), "an offset is in Bronze twice"
    assert found.keys() == expected.bronze.keys()
    for at, row in found.items():
        message = expected.bronze[at]
        key = None if message.key is None else message.key.decode("utf-8", "backslashreplace")
        assert row["message_key"] == key
        assert row["avro_payload"] == message.value
        assert row["topic"] == lake.topic
        assert milliseconds(row["kafka_timestamp"]) == message.usable_ms
        assert row["ingestion_date"] == row["ingestion_timestamp"].date()


def assert_dlq(lake: Lake, expected: Expected) -> None:
    rows = lake.table("dlq").scan().to_arrow().to_pylist()
    found = {(row["partition"], row["offset"]): (row["payload"], row["reason"]) for row in rows}
    assert len(rows) == len(found), "an offset is in the dead-letter table twice"
    wrong = {at: (found.get(at), expected.dlq.get(at)) for at in found.keys() | expected.dlq.keys()}
    wrong = {at: pair for at, pair in wrong.items() if pair[0] != pair[1]}
    assert not wrong, f"{len(wrong)} differ, for example {list(wrong.items())[:3]}"
    for row in rows:
        assert row["detail"], row
        assert row["topic"] == lake.topic
        assert row["failed_date"] == row["failed_at"].date()
        payload = row["payload"]
        unread = row["reason"] in ("null_payload", "bad_magic")
        assert row["schema_id"] == (None if unread else int.from_bytes(payload[1:5], "big", signed=True))


def assert_gold(lake: Lake, expected: Expected) -> None:
    """Assert that each id is there once, each row is in Silver, and each file holds one hour, sorted by time."""
    table = lake.table("gold")
    rows = rows_of(table)
    ids = [row[0] for row in rows]
    assert len(ids) == len(set(ids)), "an id is in Gold twice"
    assert set(ids) == expected.gold_ids
    for row in rows:
        assert row[:16] in expected.silver
        assert row[16] == row[5].hour
    for task in table.scan().plan_files():
        assert task.file.sort_order_id == table.metadata.default_sort_order_id
        file = pq.read_table(task.file.file_path.removeprefix("file://"), columns=["timestamp"], partitioning=None)
        times = file["timestamp"].to_pylist()
        assert times == sorted(times), f"{task.file.file_path} is not sorted"
        hours = {t.replace(minute=0, second=0, microsecond=0) for t in times}
        assert len(hours) == 1
        assert [(d.date().toordinal() - 719163, d.hour) for d in hours] == [tuple(task.file.partition)]


def rows_of(table: Table) -> list[tuple[Any, ...]]:
    """Return the rows of Silver or Gold in the oracle's form."""
    rows = []
    for row in table.scan().to_arrow().to_pylist():
        row["trade_conditions"] = tuple(row["trade_conditions"])
        row["vendor_data"] = frozen_map(row["vendor_data"])
        rows.append(tuple(row.values()))
    return rows


def assert_consistent(lake: Lake) -> None:
    """Assert that each table holds exactly the rows of the offsets in its ledger, however far it has come."""
    for layer in ("bronze", "silver", "dlq", "gold"):
        try:
            table = lake.table(layer)
        except CatalogError:
            continue  # no flow has created it yet
        ledger = read(table.properties, lake.exchange, lake.topic)
        columns = {"gold": ("message_id",), "silver": ("message_id",)}.get(layer, ("partition", "offset"))
        rows = [tuple(row.values()) for row in table.scan(selected_fields=columns).to_arrow().to_pylist()]
        if layer == "gold":
            assert len(rows) == len(set(rows)), f"{layer}: {len(rows) - len(set(rows))} rows are duplicated"
        else:
            assert len(rows) == sum(e.rows for e in ledger.partitions.values()), layer
        if layer in ("bronze", "dlq"):
            assert len(rows) == len(set(rows)), f"{layer}: {len(rows) - len(set(rows))} rows are duplicated"
        if layer == "bronze":
            assert set(rows) == {(p, o) for p, e in ledger.partitions.items() for o in range(e.first, e.next)}


def milliseconds(moment: Any) -> int | None:
    return None if moment is None else round(moment.timestamp() * 1000)


def ledger_offsets(lake: Lake) -> dict[str, dict[int, int]]:
    """Return the next offset of each partition, by layer."""
    found = {}
    for layer in ("bronze", "silver", "dlq", "gold"):
        ledger = read(lake.table(layer).properties, lake.exchange, lake.topic)
        found[layer] = {p: extent.next for p, extent in ledger.partitions.items()}
    return found
