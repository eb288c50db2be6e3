"""The broker is down for a while: a flow waits for it, can be stopped meanwhile, and continues afterwards."""

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from k2flow.failpoints import Point
from k2flow.process_exit import ERROR_PREFIX, EXIT_FAILED
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from tests.integration.conftest import fill
from tests.integration.harness import Lake, assert_consistent, assert_tables, batches, ledger_offsets, read_topic
from tests.integration.test_failpoints import await_stop
from tests.oracle import expect
from torture.segments import batches as batches_of
from torture.segments import flipped_bit

pytestmark = pytest.mark.xdist_group("outages")


@pytest.fixture(scope="module")
def broker(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalKafka]:
    """A broker that tests may kill."""
    with LocalKafka(tmp_path_factory.mktemp("broker"), free_port()) as kafka:
        yield kafka
        kafka.start()  # the broker may be down; stop() only stops one that this object started
    kafka.stop()


@pytest.fixture
def lake(broker: LocalKafka, tmp_path: Path, request: pytest.FixtureRequest) -> Lake:
    topic = f"binance.{request.node.name}"
    broker.start({topic: 3})
    made = Lake("binance", topic, tmp_path / "lake", broker.bootstrap)
    fill(made, count=2_000, bad=0.05, duplicates=0.1, seed=5)
    return made


def kill(broker: LocalKafka) -> None:
    pid = broker.status().pid
    assert pid is not None
    os.kill(pid, signal.SIGKILL)


def test_catching_up_survives_a_broker_restart(broker: LocalKafka, lake: Lake) -> None:
    """The flow stops after its first batch, and the broker is killed and restarted. No row is missing at the end."""
    armed = f"{Point.COMMIT_DONE}=stop@4"
    fetch_little = {"K2FLOW_KAFKA_QUEUED_MIN_MESSAGES": "1", "K2FLOW_KAFKA_MAX_PARTITION_FETCH_BYTES": "20000"}
    batch = batches(100)
    with lake.start(K2FLOW_FAILPOINTS=armed, K2FLOW_UNTIL_CAUGHT_UP="1", **fetch_little, **batch) as flow:
        await_stop(flow)
        kill(broker)
        flow.signal(signal.SIGCONT)
        wait_until(lambda: "Connection refused" in flow.log() or flow.processes[0].poll() is not None)
        time.sleep(2)
        assert flow.processes[0].poll() is None, flow.log()
        broker.start()
        log = flow.wait(60)
        assert flow.codes() == [0], log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_flow_drains_and_stops_while_the_broker_is_down(broker: LocalKafka, lake: Lake) -> None:
    """On SIGTERM the rows read are committed, and the exit code is 0."""
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="600", **batches(1500)) as flow:
        flow.wait_for_log("gold_crypto_trades: ")
        time.sleep(2)  # it has read the last 500, and the group has acknowledged the first batch
        kill(broker)
        time.sleep(1)
        flow.signal(signal.SIGTERM)
        began = time.monotonic()
        log = flow.wait(60)
        assert flow.codes() == [0], log
        assert time.monotonic() - began < 10, log
    assert sum(ledger_offsets(lake)["gold"].values()) == 2_000, log
    broker.start()
    lake.catch_up()
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_flow_that_starts_while_the_broker_is_down_waits_for_it(broker: LocalKafka, lake: Lake) -> None:
    """It says what it waits for, and SIGTERM stops it. A flow that has just found the topic waits as well."""
    with lake.start(K2FLOW_FAILPOINTS=f"{Point.OPENED}=stop", K2FLOW_UNTIL_CAUGHT_UP="1") as flow:
        await_stop(flow)
        kill(broker)
        flow.signal(signal.SIGCONT)
        with lake.start() as ended:
            ended.wait_for_log("waiting for it")
            ended.signal(signal.SIGTERM)
            log = ended.wait(20)
            assert ended.codes() == [0], log
        flow.wait_for_log("no offsets from Kafka")
        broker.start()
        log = flow.wait(60)
        assert flow.codes() == [0], log
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def test_flipped_bit_stops_the_flow_before_its_batch(broker: LocalKafka, lake: Lake) -> None:
    """The rows before the batch are committed, nothing behind it, and the error says where, at each start.

    Once Kafka has the right bytes again, the flow continues, and no row is missing.
    """
    for seed in (6, 7):
        fill(lake, count=2_000, bad=0.05, seed=seed)
    expected = expect(read_topic(lake.bootstrap, lake.topic), "BINANCE")
    broker.stop()
    damaged = list(batches_of(broker.home / "data" / f"{lake.topic}-0"))[-2]
    with flipped_bit(damaged, 0.5):
        broker.start()
        for _ in range(2):
            done = lake.command("run", "binance", "--processes", "1", "--until-caught-up")
            assert done.returncode == EXIT_FAILED, done.stderr
            assert done.stderr.count(ERROR_PREFIX) == 1, done.stderr
            assert "starting binance again" not in done.stderr
            error = done.stderr.partition(ERROR_PREFIX)[2]
            assert f"{lake.topic}[0]: offset {damaged.first_offset} cannot be read" in error
            assert "K2FLOW_BINANCE_ACCEPT_LOST_OFFSETS=1" in error
            assert {layer[0] for layer in ledger_offsets(lake).values()} == {damaged.first_offset}
        assert_consistent(lake)
        done = lake.command("audit", "binance")
        assert done.returncode == 0, done.stdout + done.stderr  # what was read is right
        broker.stop()
    broker.start()
    lake.catch_up()
    assert_tables(lake, expected)
    broker.stop()
    with flipped_bit(damaged, 0.7):
        broker.start()
        done = lake.command("audit", "binance")
        assert done.returncode == 2, done.stdout + done.stderr
        assert "Kafka's log is damaged: offset" in done.stdout
        broker.stop()
    broker.start()


def wait_until(holds: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.1)
