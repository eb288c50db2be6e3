"""Flink with Iceberg's sink, in plain SQL: a gateway and a cluster in one Java process.

Settings are those that Flink's and Iceberg's documentation advise: checkpoints exactly once, state on the heap, objects
reused, the source shared by Silver and Gold, and no shuffle before the writers.
"""

import importlib.util
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from bench.peers.java import HADOOP, JavaProcess, answers, ask, jar
from bench.peers.lake import create_tables
from bench.peers.messages import Topic
from bench.peers.peer import COMMIT_SECONDS, JavaPeer
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.iceberg.tables import definitions
from k2flow.layers import BRONZE, GOLD, SILVER
from k2flow.sandbox.kafka.local import free_port
from k2flow.trades.schema import canonical, trade_schema

JARS = (
    "org.apache.flink:flink-sql-gateway:2.1.0",
    "org.apache.flink:flink-sql-connector-kafka:4.0.1-2.0",
    "org.apache.flink:flink-sql-avro-confluent-registry:2.1.0",
    "org.apache.iceberg:iceberg-flink-runtime-2.1:1.11.0",
    *HADOOP,
)
OPENED = ("java.io", "java.lang", "java.lang.reflect", "java.net", "java.nio", "java.text", "java.time", "java.util")
OPENED += ("java.util.concurrent", "java.util.concurrent.atomic", "java.util.concurrent.locks", "sun.nio.ch")
HEAP = "-Xmx2g"
FINISH_SECONDS = 900.0
CONFIGURATION = {
    "execution.target": "local",
    "rest.address": "127.0.0.1",
    "parallelism.default": "2",
    "taskmanager.numberOfTaskSlots": "2",
    "pipeline.object-reuse": "true",
    "state.backend.type": "hashmap",
    "execution.checkpointing.interval": f"{COMMIT_SECONDS}s",
    "execution.checkpointing.mode": "EXACTLY_ONCE",
    "execution.checkpointing.externalized-checkpoint-retention": "RETAIN_ON_CANCELLATION",
    "table.dml-sync": "true",
    "table.local-time-zone": "UTC",
    "table.exec.state.ttl": "24h",
}
TABLES = Template("""
CREATE CATALOG lake WITH ('type' = 'iceberg', 'catalog-type' = 'hadoop', 'warehouse' = 'file://$lake');

CREATE TEMPORARY TABLE messages (
    message_key STRING,
    avro_payload BYTES,
    topic STRING METADATA VIRTUAL,
    `partition` INT METADATA VIRTUAL,
    `offset` BIGINT METADATA VIRTUAL,
    kafka_timestamp TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL
) WITH ($source, 'key.format' = 'raw', 'key.fields' = 'message_key', 'value.format' = 'raw',
    'value.fields-include' = 'EXCEPT_KEY');

CREATE TEMPORARY TABLE records (
    message_id STRING NOT NULL,
    trade_id STRING NOT NULL,
    symbol STRING NOT NULL,
    exchange STRING NOT NULL,
    asset_class STRING NOT NULL,
    `timestamp` BIGINT NOT NULL,
    price DECIMAL(18, 8) NOT NULL,
    quantity DECIMAL(18, 8) NOT NULL,
    currency STRING NOT NULL,
    side STRING NOT NULL,
    trade_conditions ARRAY<STRING NOT NULL> NOT NULL,
    source_sequence BIGINT,
    ingestion_timestamp BIGINT NOT NULL,
    platform_sequence BIGINT,
    vendor_data MAP<STRING NOT NULL, STRING NOT NULL>,
    kafka_timestamp TIMESTAMP_LTZ(3) METADATA FROM 'timestamp' VIRTUAL,
    arrival AS PROCTIME()
) WITH ($source, 'value.format' = 'avro-confluent', 'value.avro-confluent.url' = '$registry',
    'value.avro-confluent.schema' = '$schema');

CREATE TEMPORARY VIEW trades AS
SELECT message_id, trade_id, symbol, exchange, asset_class, traded AS `timestamp`, price, quantity, currency, side,
    trade_conditions, source_sequence, received AS ingestion_timestamp, platform_sequence, vendor_data,
    CAST(traded AS DATE) AS exchange_date, CAST(EXTRACT(HOUR FROM traded) AS INT) AS exchange_hour, arrival
FROM (
    SELECT *, TO_TIMESTAMP_LTZ(`timestamp` / 1000, 3) AS traded,
        TO_TIMESTAMP_LTZ(ingestion_timestamp / 1000, 3) AS received
    FROM records
)
WHERE TRIM(BOTH $blanks FROM message_id) <> '' AND TRIM(BOTH $blanks FROM symbol) <> ''
    AND TRIM(BOTH $blanks FROM trade_id) <> '' AND TRIM(BOTH $blanks FROM currency) <> ''
    AND price > 0 AND quantity > 0 AND side IN ('BUY', 'SELL') AND exchange = '$exchange' AND asset_class = 'crypto'
    AND traded < kafka_timestamp + INTERVAL '1' MINUTE AND traded >= kafka_timestamp - INTERVAL '365' DAY(3)
    AND received < kafka_timestamp + INTERVAL '365' DAY(3) AND received >= kafka_timestamp - INTERVAL '365' DAY(3);
""")
SOURCE = Template(
    "'connector' = 'kafka', 'topic' = '$topic', 'properties.bootstrap.servers' = '$bootstrap', "
    "'properties.group.id' = 'flink', 'scan.startup.mode' = 'earliest-offset', 'scan.bounded.mode' = 'latest-offset'"
)
INSERTS = Template("""EXECUTE STATEMENT SET BEGIN
INSERT INTO lake.$namespace.$bronze
SELECT message_key, avro_payload, topic, `partition`, `offset`, kafka_timestamp, CURRENT_TIMESTAMP, CURRENT_DATE
FROM messages;
INSERT INTO lake.$namespace.$silver SELECT $columns FROM trades;
INSERT INTO lake.$namespace.$gold /*+ OPTIONS('distribution-mode' = 'none') */
SELECT $columns, exchange_hour
FROM (SELECT *, ROW_NUMBER() OVER (PARTITION BY message_id ORDER BY arrival) AS copy FROM trades)
WHERE copy = 1;
END""")


class Flink(JavaPeer):
    """Bronze, Silver and Gold, as one job."""

    name = "flink"
    omits = "no dead letters: one message that Avro cannot decode restarts the job forever; Gold is not sorted"

    def __init__(self, topic: Topic, folder: Path, exchange: Exchange, registry: str) -> None:
        super().__init__(topic, folder)
        self._exchange = exchange
        self._registry = registry
        self._port = free_port()
        self._jars = [*_distribution(), *map(jar, JARS)]
        self._operation = ""
        (self.folder / "config.yaml").write_text("".join(f"{name}: {value}\n" for name, value in CONFIGURATION.items()))

    def tables(self) -> Mapping[str, str]:
        return {layer.name: layer.table(self._exchange.name) for layer in (BRONZE, SILVER, GOLD)}

    def start(self) -> JavaProcess:
        options = [HEAP, *(f"--add-opens=java.base/{package}=ALL-UNNAMED" for package in OPENED)]
        settings = ("address=127.0.0.1", "bind-address=127.0.0.1", f"port={self._port}", f"bind-port={self._port}")
        endpoint = [f"-Dsql-gateway.endpoint.rest.{setting}" for setting in settings]
        command = ["org.apache.flink.table.gateway.SqlGateway", *endpoint]
        environment = {"FLINK_CONF_DIR": str(self.folder)}
        return JavaProcess(command, self._jars, self.folder / "log", options, environment)

    def answers(self) -> bool:
        return answers(f"{self._url}/info")

    def create_tables(self, lake: Path) -> None:
        wanted = definitions(self._exchange)
        create_tables(lake, (wanted[name] for name in self.tables().values()))

    def begin(self, lake: Path) -> None:
        """Submit the job; it continues from the newest checkpoint, if there is one."""
        session = ask("POST", f"{self._url}/sessions", {})["sessionHandle"]
        checkpoints = lake / "checkpoints"
        settings = {"execution.checkpointing.dir": f"file://{checkpoints}"}
        complete = sorted(checkpoints.glob("*/chk-*/_metadata"), key=lambda path: path.stat().st_mtime)
        if complete:
            settings["execution.state-recovery.path"] = f"file://{complete[-1].parent}"
        for name, value in settings.items():
            self._await(self._submit(session, f"SET '{name}' = '{value}'"))
        for statement in self._definitions(lake):
            self._await(self._submit(session, statement))
        self._operation = self._submit(
            session,
            INSERTS.substitute(
                namespace=NAMESPACE, columns=", ".join(f"`{name}`" for name in SILVER.columns), **self.tables()
            ),
        )

    def finish(self, lake: Path) -> None:
        self._await(self._operation)

    @property
    def _url(self) -> str:
        return f"http://127.0.0.1:{self._port}/v1"

    def _definitions(self, lake: Path) -> Sequence[str]:
        source = SOURCE.substitute(topic=self.topic.name, bootstrap=self.topic.bootstrap)
        text = TABLES.substitute(
            lake=lake,
            source=source,
            registry=self._registry,
            schema=canonical(_without_times(trade_schema())),
            exchange=self._exchange.code,
            blanks="U&' \\0009\\000A'",
        )
        return [statement.strip() for statement in text.split(";\n") if statement.strip()]

    def _submit(self, session: str, statement: str) -> str:
        url = f"{self._url}/sessions/{session}"
        handle = ask("POST", f"{url}/statements", {"statement": statement})["operationHandle"]
        return f"{url}/operations/{handle}"

    def _await(self, operation: str) -> None:
        """Wait until a statement has ended. Raise RuntimeError with what Flink says if it failed."""
        while (status := ask("GET", f"{operation}/status")["status"]) in ("INITIALIZED", "PENDING", "RUNNING"):
            time.sleep(0.1)
        ask("GET", f"{operation}/result/0")
        if status != "FINISHED":
            raise RuntimeError(f"the statement ended as {status}")


def _distribution() -> list[Path]:
    """Return the jars of the Python package apache-flink-libraries."""
    found = importlib.util.find_spec("pyflink")
    assert found is not None
    assert found.submodule_search_locations is not None
    home = Path(next(iter(found.submodule_search_locations)))
    return sorted(home.glob("lib/*.jar"))


def _without_times(schema: Any) -> Any:
    """Return the schema with times as plain numbers: Flink takes them for milliseconds."""
    times = ("timestamp", "ingestion_timestamp")
    fields = [{**each, "type": "long"} if each["name"] in times else each for each in schema["fields"]]
    return {**schema, "fields": fields}
