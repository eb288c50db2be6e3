"""The local Kafka: a real broker is started, stopped, killed and found by other processes."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil
import pytest
from confluent_kafka import Consumer, Producer, TopicPartition

from k2flow.errors import KafkaError
from k2flow.sandbox.kafka import local
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.kafka.process import BrokerRecord, find_process


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[LocalKafka]:
    """Yield a broker that is not started yet. Stop it at the end."""
    kafka = LocalKafka(tmp_path / "kafka", free_port())
    yield kafka
    kafka.stop()


def send(bootstrap: str, topic: str, values: list[str]) -> None:
    producer = Producer({"bootstrap.servers": bootstrap, "acks": "all"})
    for value in values:
        producer.produce(topic, value, partition=0)
    assert producer.flush(20) == 0


def read(bootstrap: str, topic: str, count: int) -> list[str]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "test", "enable.auto.commit": False})
    consumer.assign([TopicPartition(topic, 0, 0)])
    messages = consumer.consume(count, timeout=20)
    consumer.close()
    return [(message.value() or b"").decode() for message in messages]


def has_ended(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_broker_keeps_its_data_and_stops_cleanly(broker: LocalKafka) -> None:
    first = broker.start({"trades": 3})
    assert (first.state, first.topics, first.notes) == ("running", {"trades": 3}, ())
    send(broker.bootstrap, "trades", ["a", "b"])

    again = LocalKafka(broker.home, broker.port).start({"trades": 5, "more": 1})
    assert again.pid == first.pid
    assert again.topics == {"trades": 3, "more": 1}
    assert again.notes == ("topic trades has 3 partitions, not 5: it is left unchanged",)

    listening = {
        connection.laddr.ip
        for connection in psutil.Process(first.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    broker.stop()
    assert broker.status().state == "stopped"
    assert has_ended(first.pid)

    broker.start()
    assert read(broker.bootstrap, "trades", 2) == ["a", "b"]


def test_acknowledged_messages_survive_a_kill(broker: LocalKafka) -> None:
    pid = broker.start({"trades": 1}).pid
    assert pid is not None
    send(broker.bootstrap, "trades", ["a", "b", "c"])
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    process.wait(20)

    assert broker.status().state == "stopped"
    assert broker.start().pid != pid
    assert read(broker.bootstrap, "trades", 3) == ["a", "b", "c"]


def test_concurrent_starts_start_one_broker(broker: LocalKafka) -> None:
    def start(_: int) -> int | None:
        return LocalKafka(broker.home, broker.port).start({"trades": 2}).pid

    with ThreadPoolExecutor(4) as pool:
        pids = set(pool.map(start, range(4)))
    assert len(pids) == 1
    assert broker.status().topics == {"trades": 2}


def test_broker_survives_the_process_that_started_it(broker: LocalKafka) -> None:
    script = (
        "import sys; from pathlib import Path; from k2flow.sandbox.kafka.local import LocalKafka;"
        "LocalKafka(Path(sys.argv[1]), int(sys.argv[2])).start()"
    )
    subprocess.run([sys.executable, "-c", script, str(broker.home), str(broker.port)], check=True, timeout=120)
    assert broker.status().state == "running"


def test_context_manager_stops_only_its_own_broker(tmp_path: Path) -> None:
    with LocalKafka(tmp_path / "kafka", free_port()) as kafka:
        assert kafka.status().state == "running"
        with LocalKafka(kafka.home, kafka.port):
            pass
        assert kafka.status().state == "running"
        with pytest.raises(KafkaError, match=f"runs on port {kafka.port}, not 9"):
            LocalKafka(kafka.home, 9).start()
    assert kafka.status().state == "stopped"


def test_error_names_the_process_on_the_port(broker: LocalKafka) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", broker.port))
        other.listen()
        with pytest.raises(KafkaError, match=rf"port {broker.port} is in use by .*process {os.getpid()}"):
            broker.start()


def test_error_shows_the_log_of_a_broker_that_does_not_start(broker: LocalKafka) -> None:
    broker.start()
    broker.stop()
    properties = broker.home / "data" / "meta.properties"
    properties.write_text(properties.read_text().replace("node.id=1", "node.id=7"))
    with pytest.raises(KafkaError, match=r"did not start(.|\n)*Stored node id 7"):
        broker.start()
    assert broker.status().state == "stopped"


def test_error_explains_a_failed_download(broker: LocalKafka, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JGO_CACHE_DIR", str(tmp_path / "jgo"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "m2"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(KafkaError, match="could not be downloaded"):
        broker.start()


def test_reused_process_id_is_not_the_broker(broker: LocalKafka) -> None:
    nap = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", nap], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()  # its command line is complete now
            created = psutil.Process(other.pid).create_time()
            broker.home.mkdir(parents=True)
            BrokerRecord(other.pid, created, broker.port, 1).write(broker.home / "broker.json")
            broker.stop()
            assert other.poll() is None
            assert broker.status().state == "stopped"
            assert find_process(BrokerRecord(other.pid, created - 60, 1, 1), nap) is None
            assert find_process(BrokerRecord(other.pid, created, 1, 1), nap) is not None
        finally:
            other.kill()


def test_broker_that_does_not_stop_is_killed(broker: LocalKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = broker.start().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it cannot react to SIGTERM
    monkeypatch.setattr(local, "STOP_SECONDS", 1.0)
    broker.stop()
    assert has_ended(pid)
