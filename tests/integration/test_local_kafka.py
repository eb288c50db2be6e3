"""The local Kafka: a real broker is started, stopped, killed and found again."""

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
from k2flow.kafka import local
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.kafka.process import Record, find

pytestmark = pytest.mark.integration


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[LocalKafka]:
    """A broker that is not started yet; stopped at the end."""
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


def is_gone(pid: int | None) -> bool:
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def test_lives_on_keeps_its_data_and_stops_cleanly(broker: LocalKafka) -> None:
    first = broker.start({"trades": 3})
    assert (first.state, first.topics, first.notes) == ("running", {"trades": 3}, ())
    send(broker.bootstrap, "trades", ["a", "b"])

    again = LocalKafka(broker.home, broker.port).start({"trades": 5, "more": 1})
    assert again.pid == first.pid
    assert again.topics == {"trades": 3, "more": 1}
    assert again.notes == ("topic trades has 3 partitions, 5 were asked for: it is left as it is",)

    listening = {
        connection.laddr.ip
        for connection in psutil.Process(first.pid).net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    }
    assert listening == {"127.0.0.1"}

    broker.stop()
    assert broker.status().state == "stopped"
    assert is_gone(first.pid)

    broker.start()
    assert read(broker.bootstrap, "trades", 2) == ["a", "b"]


def test_starts_again_after_a_kill_with_what_it_acknowledged(broker: LocalKafka) -> None:
    pid = broker.start({"trades": 1}).pid
    assert pid is not None
    send(broker.bootstrap, "trades", ["a", "b", "c"])
    process = psutil.Process(pid)
    os.kill(pid, signal.SIGKILL)
    process.wait(20)

    assert broker.status().state == "stopped"
    assert broker.start().pid != pid
    assert read(broker.bootstrap, "trades", 3) == ["a", "b", "c"]


def test_is_started_once_by_many_at_once(broker: LocalKafka) -> None:
    def start(_: int) -> int | None:
        return LocalKafka(broker.home, broker.port).start({"trades": 2}).pid

    with ThreadPoolExecutor(4) as pool:
        pids = set(pool.map(start, range(4)))
    assert len(pids) == 1
    assert broker.status().topics == {"trades": 2}


def test_survives_the_process_that_started_it(broker: LocalKafka) -> None:
    script = (
        "import sys; from pathlib import Path; from k2flow.sandbox.kafka.local import LocalKafka;"
        "LocalKafka(Path(sys.argv[1]), int(sys.argv[2])).start()"
    )
    subprocess.run([sys.executable, "-c", script, str(broker.home), str(broker.port)], check=True, timeout=120)
    assert broker.status().state == "running"


def test_as_a_context_manager_stops_what_it_started(tmp_path: Path) -> None:
    with LocalKafka(tmp_path / "kafka", free_port()) as kafka:
        assert kafka.status().state == "running"
        with LocalKafka(kafka.home, kafka.port):
            pass
        assert kafka.status().state == "running"
        with pytest.raises(KafkaError, match=f"runs on port {kafka.port}, not 9"):
            LocalKafka(kafka.home, 9).start()
    assert kafka.status().state == "stopped"


def test_names_who_has_the_port(broker: LocalKafka) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", broker.port))
        other.listen()
        with pytest.raises(KafkaError, match=rf"port {broker.port} is taken by .*process {os.getpid()}"):
            broker.start()


def test_shows_the_log_of_a_broker_that_does_not_come_up(broker: LocalKafka) -> None:
    broker.start()
    broker.stop()
    properties = broker.home / "data" / "meta.properties"
    properties.write_text(properties.read_text().replace("node.id=1", "node.id=7"))
    with pytest.raises(KafkaError, match=r"did not come up(.|\n)*Stored node id 7"):
        broker.start()
    assert broker.status().state == "stopped"


def test_a_failed_download_is_explained(broker: LocalKafka, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("JGO_CACHE_DIR", str(tmp_path / "jgo"))
    monkeypatch.setenv("M2_REPO", str(tmp_path / "m2"))
    for name in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{free_port()}")
    with pytest.raises(KafkaError, match="could not be downloaded"):
        broker.start()


def test_never_takes_a_recycled_process_id_for_the_broker(broker: LocalKafka) -> None:
    nap = "import time; print(flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", nap], stdout=subprocess.PIPE) as other:
        try:
            assert other.stdout is not None
            other.stdout.readline()  # its command line can be read from now on
            created = psutil.Process(other.pid).create_time()
            broker.home.mkdir(parents=True)
            Record(other.pid, created, broker.port, 1).write(broker.home / "broker.json")
            broker.stop()
            assert other.poll() is None
            assert broker.status().state == "stopped"
            assert find(Record(other.pid, created - 60, 1, 1), nap) is None
            assert find(Record(other.pid, created, 1, 1), nap) is not None
        finally:
            other.kill()


def test_is_killed_if_it_does_not_stop(broker: LocalKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    pid = broker.start().pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)  # it cannot react to SIGTERM
    monkeypatch.setattr(local, "STOP_SECONDS", 1.0)
    broker.stop()
    assert is_gone(pid)
