"""Kafka Connect with Iceberg's own sink: one distributed worker.

The sink's documentation asks for a control topic of one partition. The worker takes the heap that Kafka's own script
gives it.
"""

import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
from pyiceberg.types import LongType

from bench.peers.java import HADOOP, JavaProcess, answers, ask, jar
from bench.peers.lake import create_tables, rows_in
from bench.peers.messages import Topic
from bench.peers.peer import COMMIT_SECONDS, JavaPeer
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.iceberg.tables import TableDefinition, definitions
from k2flow.kafka.admin import Admin
from k2flow.layers import SILVER, Field
from k2flow.sandbox.kafka.jars import KAFKA_VERSION, download
from k2flow.sandbox.kafka.local import free_port

ICEBERG_VERSION = "1.12.0"
WORKER = f"org.apache.kafka:connect-runtime:{KAFKA_VERSION}+org.slf4j:slf4j-simple:2.0.17"
PLUGINS = {
    "iceberg": "+".join(
        f"org.apache.iceberg:iceberg-{name}:{ICEBERG_VERSION}" for name in ("kafka-connect", "parquet")
    ),
    "apicurio": "io.apicurio:apicurio-registry-utils-converter:2.6.13.Final",
}
WORKERS_OWN = ("connect-", "kafka-clients-")
"""Jars that a plugin takes from the worker."""
LOGGER = "-Dorg.slf4j.simpleLogger"
OPTIONS = ("-Xms256m", "-Xmx2g", f"{LOGGER}.defaultLogLevel=warn", f"{LOGGER}.log.org.apache.iceberg.connect=info")
STALL_SECONDS = 9 * COMMIT_SECONDS
"""Without a commit for so long, the rest is not coming."""


class Connect(JavaPeer):
    """Silver alone: a sink connector writes each record as it is."""

    name = "connect"
    omits = (
        "no Bronze, no Gold: a connector neither keeps bytes beside fields nor removes duplicates; no rules, and bad "
        "messages to a topic at best; times are numbers of microseconds, since it takes them for milliseconds"
    )
    control: Mapping[str, str] = {}
    """Settings of the sink's clients of the control topic."""

    def __init__(self, topic: Topic, folder: Path, exchange: Exchange, registry: str) -> None:
        super().__init__(topic, folder)
        self._exchange = exchange
        self._registry = registry
        self._port = free_port()
        self._jars = download(WORKER, [f"connect-runtime-{KAFKA_VERSION}.jar"])
        self._install_plugins()
        (self.folder / "worker.properties").write_text(
            "".join(f"{name}={value}\n" for name, value in self._worker().items())
        )

    def tables(self) -> Mapping[str, str]:
        return {SILVER.name: SILVER.table(self._exchange.name)}

    def expected(self, layer: str) -> pa.ChunkedArray:
        return self.topic.readable

    def start(self) -> JavaProcess:
        command = ["org.apache.kafka.connect.cli.ConnectDistributed", str(self.folder / "worker.properties")]
        return JavaProcess(command, self._jars, self.folder / "log", OPTIONS)

    def answers(self) -> bool:
        return answers(f"{self._url}/connectors")

    def create_tables(self, lake: Path) -> None:
        definition = definitions(self._exchange)[self.tables()[SILVER.name]]
        create_tables(lake, [_as_received(definition)])
        Admin(self.topic.bootstrap).create({self._control_topic(lake): 1})

    def begin(self, lake: Path) -> None:
        ask("PUT", f"{self._url}/connectors/{self._connector_name(lake)}/config", self._connector(lake))

    def finish(self, lake: Path) -> None:
        """Wait until all rows are committed, or none has been for STALL_SECONDS."""
        (table,) = self.tables().values()
        rows, changed = -1, time.monotonic()
        while rows < len(self.topic.readable) and time.monotonic() < changed + STALL_SECONDS:
            time.sleep(0.2)
            if (now := rows_in(lake, table)) != rows:
                rows, changed = now, time.monotonic()
        self._raise_failure(lake)
        ask("DELETE", f"{self._url}/connectors/{self._connector_name(lake)}")

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def _connector_name(self, lake: Path) -> str:
        return f"{self.name}-{lake.name}"

    def _control_topic(self, lake: Path) -> str:
        return f"control-{self._connector_name(lake)}"

    def _raise_failure(self, lake: Path) -> None:
        status = ask("GET", f"{self._url}/connectors/{self._connector_name(lake)}/status")
        failed = [each["trace"] for each in status["tasks"] if each["state"] == "FAILED"]
        if failed:
            raise RuntimeError(f"a task of Kafka Connect failed: {failed[0][:4000]}")

    def _install_plugins(self) -> None:
        """Give each plugin a folder of its own: the worker loads their classes apart."""
        for name, coordinates in PLUGINS.items():
            plugin = self.folder / "plugins" / name
            plugin.mkdir(parents=True)
            hadoop = map(jar, HADOOP) if name == "iceberg" else ()
            for each in (*download(coordinates, ()), *hadoop):
                if not each.name.startswith(WORKERS_OWN):
                    (plugin / each.name).symlink_to(each)

    def _worker(self) -> Mapping[str, str]:
        topics = {f"{each}.storage.topic": f"{self.name}-{each}" for each in ("offset", "config", "status")}
        return {
            "bootstrap.servers": self.topic.bootstrap,
            "group.id": self.name,
            "listeners": self._url,
            "plugin.path": str(self.folder / "plugins"),
            "key.converter": "org.apache.kafka.connect.storage.StringConverter",
            "value.converter": "io.apicurio.registry.utils.converter.AvroConverter",
            "value.converter.apicurio.registry.url": self._registry,
            "value.converter.apicurio.registry.as-confluent": "true",
            **topics,
            **{f"{name.removesuffix('topic')}replication.factor": "1" for name in topics},
        }

    def _connector(self, lake: Path) -> Mapping[str, str]:
        (table,) = self.tables().values()
        return {
            "connector.class": "org.apache.iceberg.connect.IcebergSinkConnector",
            "tasks.max": "1",
            "topics": self.topic.name,
            "consumer.override.auto.offset.reset": "earliest",
            "errors.tolerance": "all",
            "iceberg.tables": f"{NAMESPACE}.{table}",
            "iceberg.catalog.type": "hadoop",
            "iceberg.catalog.warehouse": f"file://{lake}",
            "iceberg.control.topic": self._control_topic(lake),
            "iceberg.control.commit.interval-ms": str(COMMIT_SECONDS * 1000),
            **{f"iceberg.kafka.{name}": value for name, value in self.control.items()},
        }


class TunedConnect(Connect):
    """Connect with a control topic that a new coordinator reads from its beginning."""

    name = "connect-tuned"
    control: Mapping[str, str] = {"auto.offset.reset": "earliest"}


def _as_received(definition: TableDefinition) -> TableDefinition:
    """Return Silver as the sink can fill it: the fields of the record, with times as numbers, without partitions."""
    layer = definition.layer
    numbers = ("timestamp", "ingestion_timestamp")
    fields = tuple(Field(each.name, LongType() if each.name in numbers else each.type) for each in layer.fields[:-1])
    return replace(definition, layer=replace(layer, fields=fields, partitioned_by=()))
