"""The batch consumer, compared with confluent-kafka's own consumer of one message at a time."""

import logging
import random
import time
import uuid
from collections.abc import Mapping

import pytest
from confluent_kafka import Consumer, KafkaError, Message, Producer, TopicPartition

from k2flow import errors
from k2flow.errors import SettingsError
from k2flow.kafka.consumer import BatchConsumer, FetchedMessages, PartitionEvent
from k2flow.kafka.properties import DEFAULTS, FORCED
from k2flow.sandbox.kafka.local import LocalKafka, free_port

PARTITIONS = 3
Row = tuple[int, int, int, bytes | None, bytes | None]


@pytest.fixture
def topic(kafka: LocalKafka) -> str:
    name = f"batches.{uuid.uuid4().hex}"
    kafka.start({name: PARTITIONS})
    return name


def test_batches_equal_single_messages(kafka: LocalKafka, topic: str) -> None:
    chance = random.Random(7)
    kinds = [
        lambda: None,
        lambda: b"",
        lambda: b"x",
        lambda: chance.randbytes(chance.randrange(1, 300)),
        lambda: chance.randbytes(chance.randrange(1, 90_000)),
    ]
    shares = [1, 1, 1, 20, 1]
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "compression.type": "zstd", "linger.ms": 20})
    for _ in range(5_000):
        key, value = (chance.choices(kinds, shares)[0]() for _ in range(2))
        time_ms = chance.choice([1, 1_700_000_000_000])
        producer.produce(topic, value, key, partition=chance.randrange(PARTITIONS), timestamp=time_ms)
        producer.poll(0)
    assert producer.flush(60) == 0
    expected = one_by_one(kafka.bootstrap, topic, 5_000)
    for limit in (1, 7, 20_000):
        consumer = open_consumer(kafka.bootstrap)
        consumer.assign(topic, dict.fromkeys(range(PARTITIONS), 0))
        rows: list[Row] = []
        while len(rows) < len(expected):
            rows += rows_of(consumer.consume(limit, 5))
        consumer.close()
        assert in_order(rows) == in_order(expected)


def test_null_messages_and_an_empty_batch(kafka: LocalKafka, topic: str) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for _ in range(10):
        producer.produce(topic, None, None, partition=0)
    assert producer.flush(60) == 0
    consumer = open_consumer(kafka.bootstrap)
    assert len(consumer.consume(100, 0)) == 0
    consumer.assign(topic, {0: 0})
    rows: list[Row] = []
    while len(rows) < 10:
        rows += rows_of(consumer.consume(100, 5))
    assert [row[3:] for row in rows] == [(None, None)] * 10
    consumer.close()


def test_schema_ids_in_headers_are_read(kafka: LocalKafka, topic: str) -> None:
    """Also if the value begins with a 0 byte; the last header of a name counts, whatever else there is."""
    ours, other = "__value_schema_id", ("apicurio.value.globalId", b"\0" * 7 + b"\5")
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    produced: list[tuple[bytes | None, list[tuple[str, bytes | None]]]] = [
        (b"Habc", [("trace", b"x"), (ours, b"\1" + b"g" * 16), other]),
        (b"\0\0\0\0\1a", [(ours, b"\1" + b"g" * 16)]),
        (b"Habc", []),
        (b"Habc", [("trace", b"x")]),
        (b"Habc", [other]),
        (b"", [other]),
        (None, [other]),
        (b"H", [(ours, b"old"), (ours, None)]),
        (b"H", [(ours, b"x" * 10_000)]),
        (b"\0*BIN-1", [other]),
        (b"\0\0\0\0\2a", []),
        (b"\0\0\0\0", [other]),
    ]
    for value, headers in produced:
        producer.produce(topic, value, partition=1, headers=headers)
    assert producer.flush(60) == 0
    consumer = open_consumer(kafka.bootstrap)
    consumer.assign(topic, {1: 0})
    found: dict[int, tuple[str, bytes]] = {}
    seen = 0
    while seen < len(produced):
        got = consumer.consume(100, 5)
        found |= {int(got.offset[i]): header for i, header in got.schema_headers.items()}
        seen += len(got)
    consumer.close()
    assert found == {
        **dict.fromkeys((0, 1), (ours, b"\1" + b"g" * 16)),
        **dict.fromkeys((4, 9), other),
        7: (ours, b""),
        8: (ours, b"x" * 33),
    }


def test_partitions_can_be_added_while_reading(kafka: LocalKafka, topic: str) -> None:
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    for p in range(PARTITIONS):
        for i in range(5):
            producer.produce(topic, b"%d.%d" % (p, i), partition=p)
    assert producer.flush(60) == 0
    consumer = open_consumer(kafka.bootstrap)
    consumer.assign(topic, {0: 2})
    rows: list[Row] = []
    while len(rows) < 3:
        rows += rows_of(consumer.consume(100, 5))
    consumer.assign(topic, {1: 4, 2: 0})
    while len(rows) < 9:
        rows += rows_of(consumer.consume(100, 5))
    assert sorted(row[4] or b"" for row in rows) == sorted(
        [b"0.2", b"0.3", b"0.4", b"1.4", *(b"2.%d" % i for i in range(5))]
    )
    consumer.close()


def test_paused_partitions_resume_without_loss_or_duplicates(kafka: LocalKafka, topic: str) -> None:
    """Messages fetched but not consumed before the pause come again, and none comes twice."""
    count = 30_000
    producer = Producer({"bootstrap.servers": kafka.bootstrap, "linger.ms": 20})
    for i in range(count):
        producer.produce(topic, b"%d" % i, partition=i % PARTITIONS)
        producer.poll(0)
    assert producer.flush(60) == 0
    consumer = open_consumer(kafka.bootstrap)
    position = dict.fromkeys(range(PARTITIONS), 0)
    consumer.assign(topic, position)
    chance = random.Random(5)
    deadline = time.monotonic() + 60
    while sum(position.values()) < count:
        assert time.monotonic() < deadline
        for partition, offset, *_ in rows_of(consumer.consume(chance.randrange(1, 2_000), 0.5)):
            assert offset == position[partition]
            position[partition] += 1
        if chance.random() < 0.5:
            aside = chance.sample(range(PARTITIONS), chance.randrange(1, PARTITIONS))
            consumer.unassign(topic, aside)
            got = consumer.consume(500, 0.05)
            assert not set(got.partition.tolist()) & set(aside)
            for partition, offset, *_ in rows_of(got):
                assert offset == position[partition]
                position[partition] += 1
            consumer.assign(topic, {p: position[p] for p in aside})
    consumer.close()


def test_partition_events_are_reported(kafka: LocalKafka, topic: str) -> None:
    """The end of a partition, and an offset that Kafka does not have."""
    consumer = open_consumer(kafka.bootstrap)
    consumer.assign(topic, {0: 0})
    consumer.assign(topic, {1: 1_000})
    events: list[PartitionEvent] = []
    wanted = {KafkaError._PARTITION_EOF, KafkaError._AUTO_OFFSET_RESET}
    deadline = time.monotonic() + 30
    while not wanted <= {event.code for event in events} and time.monotonic() < deadline:
        events += consumer.consume(100, 0.2).events
    consumer.close()
    found = {event.code: event for event in events}
    assert wanted <= found.keys()
    assert (found[KafkaError._PARTITION_EOF].partition, found[KafkaError._PARTITION_EOF].offset) == (0, 0)
    assert found[KafkaError._AUTO_OFFSET_RESET].partition == 1
    assert all(event.text for event in events)


def test_librdkafka_logs_go_to_our_log_only(
    caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """A refused connection is a line of the log, and nothing goes to standard error past it. The fetch says so too."""
    caplog.set_level(logging.DEBUG, "k2flow.kafka.consumer")
    consumer = open_consumer(f"127.0.0.1:{free_port()}")
    deadline, lost = time.monotonic() + 20, ""
    while "Connection refused" not in lost and time.monotonic() < deadline:
        lost = consumer.consume(10, 0.1).lost_connection or lost
    consumer.close()
    assert "Connection refused" in lost
    assert "Connection refused" in caplog.text
    assert "rdkafka" not in capfd.readouterr().err


@pytest.mark.parametrize("properties", [{"no.such.property": "1"}, {"fetch.max.bytes": "much"}])
def test_wrong_property_is_a_settings_error(properties: Mapping[str, str]) -> None:
    with pytest.raises(SettingsError, match=next(iter(properties))):
        BatchConsumer({"group.id": "batches", **properties})


def test_closed_consumer_raises() -> None:
    consumer = open_consumer(f"127.0.0.1:{free_port()}")
    consumer.close()
    consumer.close()
    for use in (lambda: consumer.consume(1, 0), lambda: consumer.assign("any", {0: 0})):
        with pytest.raises(errors.KafkaError, match="closed"):
            use()


def test_contradicting_properties_are_a_settings_error() -> None:
    with pytest.raises(SettingsError, match=r"max\.poll\.interval\.ms"):
        BatchConsumer({"group.id": "batches", "session.timeout.ms": "60000", "max.poll.interval.ms": "1000"})


def open_consumer(bootstrap: str) -> BatchConsumer:
    return BatchConsumer({**DEFAULTS, "bootstrap.servers": bootstrap, "group.id": "batches", **FORCED})


def rows_of(fetched: FetchedMessages) -> list[Row]:
    return list(
        zip(
            fetched.partition.tolist(),
            fetched.offset.tolist(),
            fetched.timestamp_ms.tolist(),
            fetched.key.to_pylist(),
            fetched.value.to_pylist(),
            strict=True,
        )
    )


def one_by_one(bootstrap: str, topic: str, count: int) -> list[Row]:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "singles"})
    consumer.assign([TopicPartition(topic, p, 0) for p in range(PARTITIONS)])
    rows: list[Row] = []
    while len(rows) < count:
        m: Message | None = consumer.poll(30)
        assert m is not None
        assert m.error() is None
        rows.append((m.partition(), m.offset(), m.timestamp()[1], m.key(), m.value()))
    consumer.close()
    return rows


def in_order(rows: list[Row]) -> list[Row]:
    return sorted(rows, key=lambda row: row[:2])
