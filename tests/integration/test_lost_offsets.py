"""Messages that Kafka no longer has: the flow stops, names the lost offsets, and says how to accept the loss."""

import json
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
AFTER_ROLLBACK = "K2FLOW_BINANCE_AFTER_ROLLBACK"


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
    with lake.start(K2FLOW_UNTIL_CAUGHT_UP="1", K2FLOW_FAILPOINTS="fence=die@3", **{ACCEPT: "1"}) as flow:
        flow.wait()  # two tables have begun with the new topic, two have not
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


def test_moved_main_stops_the_flow_until_it_reads_again(new_lake: NewLake) -> None:
    """Twenty rows of sixty are gone after a rollback. The other tables still hold their offsets."""
    lake = new_lake(partitions=1)
    roll_back(lake, "silver")
    error = refused(lake)
    assert f"{lake.topic}[0]: the ledger ends before offset 60" in error
    assert "the head's snapshot ends before offset 40" in error
    assert "does not hold the rows of its ledger" in lake.command("status", "--json").stdout
    lake.catch_up(**{AFTER_ROLLBACK: "reread"})
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))
    assert findings(lake) == (0, [])


@pytest.mark.parametrize("layer", ["bronze", "gold"])
def test_moved_main_is_an_accepted_loss(new_lake: NewLake, layer: str) -> None:
    lake = new_lake(partitions=1)
    roll_back(lake, layer)
    code, checks = findings(lake)
    assert code == 1
    assert "head_moved" in checks
    lake.catch_up(**{AFTER_ROLLBACK: "accept"})
    fill(lake, count=10, seed=3, bad=0.1)
    lake.catch_up()
    assert findings(lake) == (0, ["loss_accepted"])


def test_moved_main_stops_the_running_flow(new_lake: NewLake) -> None:
    lake = new_lake(partitions=1)
    fill(lake, count=40, seed=1, bad=0.1)
    with lake.start(K2FLOW_BINANCE_TRIGGER_SECONDS="1") as flow:
        flow.wait_for_log("silver_binance_trades: 36 rows")
        table = lake.table("silver")
        fenced = table.metadata.current_snapshot()
        assert fenced is not None
        assert fenced.parent_snapshot_id is not None
        table.manage_snapshots().rollback_to_snapshot(fenced.parent_snapshot_id).commit()
        fill(lake, count=20, seed=2, bad=0.1)
        assert "silver_binance_trades: the table does not hold the rows of its ledger" in flow.wait()
        assert flow.codes() != [0]
    lake.catch_up(**{AFTER_ROLLBACK: "reread"})
    assert_tables(lake, expect(read_topic(lake.bootstrap, lake.topic), "BINANCE"))


def roll_back(lake: Lake, layer: str) -> None:
    """Commit 40 messages, then 20, and let the table of `layer` go back to the first 40."""
    fill(lake, count=40, seed=1, bad=0.1)
    lake.catch_up()
    head = lake.table(layer).metadata.current_snapshot_id
    assert head is not None
    fill(lake, count=20, seed=2, bad=0.1)
    lake.catch_up()
    lake.table(layer).manage_snapshots().rollback_to_snapshot(head).commit()


def findings(lake: Lake) -> tuple[int, list[str]]:
    done = lake.command("audit", "binance", "--json")
    return done.returncode, sorted(finding["check"] for finding in json.loads(done.stdout)["findings"])
