"""Kafka Connect with Iceberg's own sink: one distributed worker.

Settings are the best that were found: a control topic of one partition that a restarted coordinator reads from its
beginning, a task for each of two cores, and the heap of Kafka's own start script. Larger polls took more memory and no
less CPU. Transforms of Kafka and of Iceberg turn the times of a record into Silver's, and derive the partition.
"""

import time
from collections.abc import Mapping
from pathlib import Path

from bench.peers.java import HADOOP, LOG_END, JavaProcess, answers, ask, jar
from bench.peers.lake import create_tables, rows_in
from bench.peers.messages import Topic
from bench.peers.peer import COMMIT_SECONDS, JavaPeer
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.iceberg.tables import definitions
from k2flow.kafka.admin import Admin
from k2flow.layers import SILVER
from k2flow.sandbox.kafka.jars import KAFKA_VERSION, download
from k2flow.sandbox.kafka.local import free_port

ICEBERG_VERSION = "1.12.0"
CONVERTER_VERSION = "2.6.13.Final"
WORKER = f"org.apache.kafka:connect-runtime:{KAFKA_VERSION}+org.slf4j:slf4j-simple:2.0.17"
SINK = "+".join(f"org.apache.iceberg:iceberg-{name}:{ICEBERG_VERSION}" for name in ("kafka-connect", "parquet"))
TRANSFORMS = f"org.apache.iceberg:iceberg-kafka-connect-transforms:{ICEBERG_VERSION}"
CONVERTER = f"io.apicurio:apicurio-registry-utils-converter:{CONVERTER_VERSION}"
WORKERS_OWN = ("connect-", "kafka-clients-")
"""Jars that a plugin takes from the worker."""
OPTIONS = ("-Xms256m", "-Xmx2g", "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn")
SESSION_SECONDS = 10
"""After so long the broker gives the partitions of a killed task to another one."""
STALL_SECONDS = 6 * COMMIT_SECONDS
"""Without a commit for so long, the rest is not coming: a commit waits 30 s for each task."""


class KafkaConnect(JavaPeer):
    """Silver alone: a sink connector writes each record into one table."""

    name = "connect"
    omits = (
        "no Bronze, no dead letters, no Gold: a sink neither keeps bytes beside fields nor removes duplicates; "
        "its topic has valid trades only, since no transform can check a value; its times end at milliseconds"
    )

    def __init__(self, topic: Topic, folder: Path, exchange: Exchange, registry: str) -> None:
        super().__init__(topic, folder)
        self._table = SILVER.table(exchange.name)
        self._definition = definitions(exchange)[self._table]
        self._registry = registry
        self._port = free_port()
        self._jars = download(WORKER, [f"connect-runtime-{KAFKA_VERSION}.jar", f"kafka-clients-{KAFKA_VERSION}.jar"])
        self._install_plugins()
        settings = "".join(f"{name}={value}\n" for name, value in self._worker().items())
        (self.folder / "worker.properties").write_text(settings)

    def tables(self) -> Mapping[str, str]:
        return {SILVER.name: self._table}

    def start(self) -> JavaProcess:
        command = ["org.apache.kafka.connect.cli.ConnectDistributed", str(self.folder / "worker.properties")]
        return JavaProcess(command, self._jars, self.folder / "log", OPTIONS)

    def answers(self) -> bool:
        return answers(f"{self._url}/connectors")

    def create_tables(self, lake: Path) -> None:
        create_tables(lake, [self._definition])
        Admin(self.topic.bootstrap).create({_control_topic(lake): 1})

    def begin(self, lake: Path) -> None:
        ask("PUT", f"{self._url}/connectors/{lake.name}/config", self._connector(lake))

    def finish(self, lake: Path) -> None:
        """Wait until all rows are committed, or none for STALL_SECONDS. Raise RuntimeError if a task fails."""
        rows, changed = 0, time.monotonic()
        while rows != self.topic.messages and time.monotonic() < changed + STALL_SECONDS:
            time.sleep(0.2)
            if (now := rows_in(lake, self._table)) != rows:
                rows, changed = now, time.monotonic()
        self._check(lake)
        ask("DELETE", f"{self._url}/connectors/{lake.name}")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _check(self, lake: Path) -> None:
        status = ask("GET", f"{self._url}/connectors/{lake.name}/status")
        failed = [each["trace"] for each in status["tasks"] if each["state"] == "FAILED"]
        if failed:
            raise RuntimeError(f"a task of Kafka Connect failed: {failed[0][:LOG_END]}")

    def _install_plugins(self) -> None:
        """Give each plugin a folder of its own: the worker loads their classes apart."""
        plugins = {
            "iceberg": [*download(SINK, [f"iceberg-kafka-connect-{ICEBERG_VERSION}.jar"]), *map(jar, HADOOP)],
            "transforms": download(TRANSFORMS, [f"iceberg-kafka-connect-transforms-{ICEBERG_VERSION}.jar"]),
            "apicurio": download(CONVERTER, [f"apicurio-registry-utils-converter-{CONVERTER_VERSION}.jar"]),
        }
        for name, jars in plugins.items():
            plugin = self.folder / "plugins" / name
            plugin.mkdir(parents=True)
            for each in jars:
                if not each.name.startswith(WORKERS_OWN):
                    (plugin / each.name).symlink_to(each)

    def _worker(self) -> Mapping[str, str]:
        topics = {f"{each}.storage": f"{self.name}-{each}" for each in ("offset", "config", "status")}
        return {
            "bootstrap.servers": self.topic.bootstrap,
            "group.id": self.name,
            "listeners": self._url,
            # A task hears of a commit only when its poll ends: in a quiet topic, that is after this time.
            "offset.flush.interval.ms": "1000",
            "plugin.path": str(self.folder / "plugins"),
            "key.converter": "org.apache.kafka.connect.storage.StringConverter",
            "value.converter": "io.apicurio.registry.utils.converter.AvroConverter",
            "value.converter.apicurio.registry.url": self._registry,
            "value.converter.apicurio.registry.as-confluent": "true",
            **{f"{name}.topic": topic for name, topic in topics.items()},
            **{f"{name}.replication.factor": "1" for name in topics},
        }

    def _connector(self, lake: Path) -> Mapping[str, str]:
        return {
            "connector.class": "org.apache.iceberg.connect.IcebergSinkConnector",
            "tasks.max": "2",
            "topics": self.topic.name,
            "consumer.override.auto.offset.reset": "earliest",
            "consumer.override.session.timeout.ms": f"{SESSION_SECONDS * 1000}",
            "iceberg.tables": f"{NAMESPACE}.{self._table}",
            "iceberg.catalog.type": "hadoop",
            "iceberg.catalog.warehouse": f"file://{lake}",
            "iceberg.control.topic": _control_topic(lake),
            "iceberg.control.commit.interval-ms": f"{COMMIT_SECONDS * 1000}",
            # By default a new coordinator reads from the end, and never commits what was written before.
            "iceberg.kafka.auto.offset.reset": "earliest",
            "iceberg.kafka.session.timeout.ms": f"{SESSION_SECONDS * 1000}",
            **transforms(),
        }


def transforms() -> Mapping[str, str]:
    """Return the settings that copy `timestamp` to `exchange_date`, then turn three numbers into times and a date."""
    types = {"exchange_date": "Date", "timestamp": "Timestamp", "ingestion_timestamp": "Timestamp"}
    settings = {
        "transforms": ",".join(["copy", *types]),
        "transforms.copy.type": "org.apache.iceberg.connect.transforms.CopyValue",
        "transforms.copy.source.field": "timestamp",
        "transforms.copy.target.field": "exchange_date",
    }
    for field, kind in types.items():
        converter = {
            "type": "org.apache.kafka.connect.transforms.TimestampConverter$Value",
            "field": field,
            "unix.precision": "microseconds",
            "target.type": kind,
        }
        settings |= {f"transforms.{field}.{name}": value for name, value in converter.items()}
    return settings


def _control_topic(lake: Path) -> str:
    return f"control-{lake.name}"
