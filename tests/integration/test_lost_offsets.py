"""Messages that Kafka no longer has: the flow stops, names the lost offsets, and says how to accept the loss."""

import time
from collections.abc import Callable

import pytest
from confluent_kafka import KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.integration.conftest import fill
from tests.integration.harness import Lake, assert_tables, ledger_offsets, read_topic
from tests.oracle import expect

NewLake = Callable[..., Lake]
ACCEPT = "K2FLOW_BINANCE_ACCEPT_LOST_OFFSETS"


def refused(lake: Lake, processes: int = 1) -> str:
    """Run a flow that must not start, and return its error line."""
    with lake.start(processes, K2FLOW_UNTIL_CAUGHT_UP="1") as flow:
        log = flow.wait()
        assert all(flow.codes()), log
    assert "Traceback" not in log
    return next(line for line in log.splitlines() if line.startswith("k2flow: error:"))


@pytest.mark.parametrize("processes", [1, 2])
def test_deleted_offsets_stop_the_flow_until_the_loss_is_accepted(new_lake: NewLake, processes: int) -> None:
    lake = new_lake(partitions=2)
    fill(lake, count=400, seed=1)
    lake.catch_up()
    before = ledger_offsets(lake)
    held = read_topic(lake.bootstrap, lake.topic)
    fill(lake, count=400, seed=2)
    keep_from = before["gold"][0] + 7
    admin = AdminClient({"bootstrap.servers": lake.bootstrap})
    for future in admin.delete_records([TopicPartition(lake.topic, 0, keep_from)]).values():
        future.result(30)
    error = refused(lake, processes)
    assert f"{lake.topic}[0]: offsets {keep_from - 7} to {keep_from - 1} (7 of them)" in error
    assert f"{ACCEPT}=1" in error
    assert ledger_offsets(lake) == before
    lake.catch_up(processes, **{ACCEPT: "1"})
    left = [m for m in read_topic(lake.bootstrap, lake.topic) if m.offset >= before["gold"].get(m.partition, 0)]
    assert_tables(lake, expect([*held, *left], "BINANCE"))
    lake.catch_up()


def test_recreated_topic_stops_the_flow_until_the_loss_is_accepted(new_lake: NewLake) -> None:
    lake = new_lake(partitions=2)
    fill(lake, count=300, seed=1)
    lake.catch_up()
    before = ledger_offsets(lake)["gold"]
    recreate_topic(lake)
    fill(lake, count=500, seed=2)
    error = refused(lake)
    assert "was deleted and created again" in error
    assert all(f"[{p}] before {end}" in error for p, end in before.items())
    lake.catch_up(**{ACCEPT: "1"})
    offsets = ledger_offsets(lake)
    assert all(sum(layer.values()) == 500 for layer in offsets.values()), offsets
    assert lake.table("gold").scan().count() == 800
    lake.catch_up()


def recreate_topic(lake: Lake) -> None:
    admin = AdminClient({"bootstrap.servers": lake.bootstrap})
    for future in admin.delete_topics([lake.topic]).values():
        future.result(30)
    deadline = time.monotonic() + 30
    while True:
        try:
            for future in admin.create_topics([NewTopic(lake.topic, 2, 1)]).values():
                future.result(30)
            break
        except KafkaException:  # still being deleted
            assert time.monotonic() < deadline
            time.sleep(0.2)
    while lake.topic not in admin.list_topics(timeout=30).topics:  # a new topic is not visible to every request at once
        assert time.monotonic() < deadline
        time.sleep(0.05)
