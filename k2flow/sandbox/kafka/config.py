"""Configuration of the local broker: one node, for this machine only, small and quick to start."""

from collections.abc import Mapping
from pathlib import Path

HOST = "127.0.0.1"
NODE = 1
HEAP = ("-Xms128m", "-Xmx512m")


def server_properties(
    port: int, controller_port: int, data: Path, retention_hours: float | None, more: Mapping[str, str]
) -> str:
    """Return the text of server.properties: log segments in `data`, messages kept `retention_hours` (None: forever).

    `more` overrides the other properties; its `listeners` and `advertised.listeners` are added to them.
    """
    properties: dict[str, object] = {
        "process.roles": "broker,controller",
        "node.id": NODE,
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "controller.listener.names": "CONTROLLER",
        "controller.quorum.voters": f"{NODE}@{HOST}:{controller_port}",
        "log.dirs": data,
        "auto.create.topics.enable": "false",
        "default.replication.factor": 1,
        "min.insync.replicas": 1,
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 4,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 4,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        "group.initial.rebalance.delay.ms": 0,
        "log.retention.ms": -1 if retention_hours is None else int(retention_hours * 3_600_000),
        "log.retention.bytes": -1,
        # After a kill the controller waits this long for the dead broker before it admits the new one.
        "broker.session.timeout.ms": 4000,
        "broker.heartbeat.interval.ms": 500,
        "num.network.threads": 2,
        "num.io.threads": 4,
    }
    for name, value in more.items():
        properties[name] = f"{properties[name]},{value}" if name in ("listeners", "advertised.listeners") else value
    return "".join(f"{name}={value}\n" for name, value in properties.items())


def java_options(marker: str) -> list[str]:
    """Return the options of the broker's Java. `marker` identifies the process."""
    logger = "-Dorg.slf4j.simpleLogger"
    return [
        *HEAP,
        "-XX:+UseSerialGC",
        "-Djava.net.preferIPv4Stack=true",
        "-Djava.awt.headless=true",
        f"{logger}.defaultLogLevel=warn",
        f"{logger}.log.kafka.server.KafkaRaftServer=info",
        f"{logger}.showDateTime=true",
        f"{logger}.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss",
        marker,
    ]
