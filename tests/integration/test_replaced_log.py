"""A broker's disk is restored from an older copy, and the same offsets hold other messages: none is lost in silence."""

import json
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path

import pytest
from confluent_kafka import Producer

from k2flow.errors import KafkaRefusedError
from k2flow.flow import client_check, log_check
from k2flow.flow.client_check import ClientCheck
from k2flow.flow.log_check import LogCheck
from k2flow.kafka.consumer import BatchConsumer
from k2flow.kafka.marks import find_marks
from k2flow.kafka.properties import consumer_properties
from k2flow.kafka.topic import BrokerDownError, find_watermarks, wait_for_watermarks
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from tests.integration.conftest import fill
from tests.integration.harness import Lake, assert_bronze, ledger_offsets, read_topic
from tests.oracle import expect

PARTITION_OF_TRADES = "trades", [0]
ACCEPT = "K2FLOW_BINANCE_ACCEPT_LOST_OFFSETS"
ERROR = "Kafka has other messages than those that were read: at offset 39 there was a message of time"


@pytest.fixture
def broker(tmp_path: Path) -> Iterator[LocalKafka]:
    with LocalKafka(tmp_path / "kafka", free_port()) as kafka:
        kafka.start({"trades": 1})
        yield kafka


def replace_log(kafka: LocalKafka, lake: Lake, read: Callable[[], None]) -> None:
    """Send and `read` 40 messages, restore the disk of before, and send 50 others."""
    data, copy = kafka.home / "data", kafka.home / "copy"
    kafka.stop()
    shutil.copytree(data, copy)
    kafka.start()
    fill(lake, count=40, seed=1, bad=0.1)
    read()
    kafka.stop()
    shutil.rmtree(data)
    shutil.copytree(copy, data)
    kafka.start()
    fill(lake, count=50, seed=2, bad=0.1)


def audited(lake: Lake) -> tuple[int, set[str]]:
    done = lake.command("audit", "binance", "--json")
    return done.returncode, {finding["check"] for finding in json.loads(done.stdout)["findings"]}


def test_restored_disk_stops_the_start_until_the_loss_is_accepted(broker: LocalKafka, tmp_path: Path) -> None:
    lake = Lake("binance", "trades", tmp_path / "lake", broker.bootstrap)
    replace_log(broker, lake, lambda: print(lake.catch_up()))
    old = lake.table("bronze").scan().to_arrow()
    with lake.start(K2FLOW_UNTIL_CAUGHT_UP="1") as flow:
        assert ERROR in flow.wait()
        assert flow.codes() != [0]
    code, checks = audited(lake)
    assert code == 1
    assert "kafka_log_replaced" in checks
    for failpoint in ("fence=die@3", "commit.done=die@2"):  # some tables begin the new log, others do not yet
        with lake.start(K2FLOW_UNTIL_CAUGHT_UP="1", K2FLOW_FAILPOINTS=failpoint, **{ACCEPT: "1"}) as flow:
            flow.wait()
    lake.catch_up(**{ACCEPT: "1"})
    fill(lake, count=20, seed=3, bad=0.1)
    lake.catch_up()
    assert all(ends == {0: 70} for ends in ledger_offsets(lake).values())
    read_on = [m for m in read_topic(lake.bootstrap, lake.topic) if m.offset >= 40]
    new = lake.table("bronze").scan("offset >= 40").to_arrow()
    assert Counter(new["avro_payload"].to_pylist()) == Counter(m.value for m in read_on)
    assert lake.table("bronze").scan().count() == old.num_rows + len(read_on)
    assert audited(lake) == (0, {"log_replaced"})


def test_restored_disk_stops_a_running_flow_before_it_commits(broker: LocalKafka, tmp_path: Path) -> None:
    lake = Lake("binance", "trades", tmp_path / "lake", broker.bootstrap)
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow:
        read: list[object] = []

        def wait() -> None:
            flow.wait_for_log("bronze_binance_trades: 40 rows")
            read.extend(read_topic(lake.bootstrap, lake.topic))

        replace_log(broker, lake, wait)
        assert ERROR in flow.wait()
        assert flow.codes() != [0]
    assert_bronze(lake, expect(read, "BINANCE"))  # type: ignore[arg-type]


def test_client_started_while_its_broker_stops_hears_of_the_leader(broker: LocalKafka) -> None:
    """During a shutdown a partition has no leader; librdkafka alone does not ask for it again."""
    config = {"bootstrap.servers": broker.bootstrap}
    heard: set[str] = set()
    with ThreadPoolExecutor(1) as pool:
        stopped = pool.submit(broker.stop)
        while not stopped.done():
            try:
                find_watermarks(config, *PARTITION_OF_TRADES)
            except BrokerDownError as error:
                heard.add(str(error))
    assert any("leader" in text for text in heard), heard
    broker.start()
    assert wait_for_watermarks(config, *PARTITION_OF_TRADES) == {0: (0, 0)}


def test_client_that_knows_a_later_leader_epoch_is_found(broker: LocalKafka, monkeypatch: pytest.MonkeyPatch) -> None:
    """The disk is restored to a copy with all messages that were read. The next ones only reach another client."""
    monkeypatch.setattr(client_check, "CHECK_SECONDS", 0.5)
    monkeypatch.setattr(client_check, "CONFIRM_SECONDS", 3.0)
    config = {"bootstrap.servers": broker.bootstrap}
    properties = consumer_properties(config, "stuck")
    send(broker, 40)
    copy = broker.home / "copy"
    broker.stop()
    shutil.copytree(broker.home / "data", copy)
    broker.start()
    consumer = BatchConsumer(properties)
    consumer.assign("trades", {0: 0})
    check = ClientCheck(config, properties, "trades")
    positions = {0: 0}

    def read(seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            positions[0] += len(consumer.consume(100, 0.05))
            check.on_idle_fetch()
            check.check_when_due(positions.copy)

    with closing(consumer):
        read(8)
        assert positions == {0: 40}
        broker.stop()
        shutil.rmtree(broker.home / "data")
        shutil.copytree(copy, broker.home / "data")
        broker.start()
        read(2)
        send(broker, 10)
        with pytest.raises(
            KafkaRefusedError, match=r"trades\[0\]: this client no longer gets messages from offset 40 on"
        ):
            read(60)


def test_doubt_ends_behind_a_slow_network(
    broker: LocalKafka, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The first waits are too short to connect at all."""
    monkeypatch.setattr(log_check, "WAIT_SECONDS", 0.001)
    send(broker, 3)
    properties = consumer_properties({"bootstrap.servers": broker.bootstrap}, "doubt")
    mark = find_marks(properties, "trades", [(0, 2)], 30)[0, 2]
    assert mark is not None
    check = LogCheck(properties, "trades", ACCEPT)
    check.on_error({0: mark})
    deadline = time.monotonic() + 60
    while check.doubted([0]):
        assert time.monotonic() < deadline
        check.verify([0], {0: mark})
    assert "within 0.001 s; asking again" in caplog.text
    assert "within 0.002 s; asking again" in caplog.text


def send(broker: LocalKafka, count: int) -> None:
    producer = Producer({"bootstrap.servers": broker.bootstrap})
    for i in range(count):
        producer.produce("trades", b"%d" % i)
    assert producer.flush(30) == 0
