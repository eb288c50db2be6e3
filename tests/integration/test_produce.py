"""The producer and the replay with a real Kafka: the topic matches the manifest."""

import uuid
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pytest
from confluent_kafka import Consumer, TopicPartition

from k2flow.errors import KafkaError, ProduceError
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce
from k2flow.sandbox.producer.replay import Target, replay
from tests.oracle import Message, classify
from tests.strict_avro import defect

SAMPLE = Path(__file__).parents[1] / "data" / "kraken_btcusd_trades.csv"


@pytest.fixture
def topic(kafka: LocalKafka) -> str:
    name = f"trades.{uuid.uuid4().hex}"
    kafka.start({name: 3})
    return name


def config(kafka: LocalKafka, **more: str) -> dict[str, str]:
    return {"bootstrap.servers": kafka.bootstrap, **more}


def read(kafka: LocalKafka, manifest: Manifest) -> list[Message]:
    """Read the messages at the manifest's offsets."""
    consumer = Consumer(config(kafka, **{"group.id": "test", "enable.auto.commit": "false"}))
    ranges = manifest.partitions
    consumer.assign([TopicPartition(manifest.topic, number, found.first) for number, found in ranges.items()])
    messages: list[Message] = []
    while len(messages) < manifest.sent:
        some = consumer.consume(min(10_000, manifest.sent - len(messages)), timeout=20)
        assert some
        for m in some:
            assert not m.error()
            _, time_ms = m.timestamp()
            if (m.offset() or 0) < ranges[m.partition() or 0].next:
                messages.append(Message(m.partition() or 0, m.offset() or 0, m.key(), m.value(), time_ms))
    consumer.close()
    return messages


def reason(message: Message, exchange: str) -> str:
    value = message.value or b""
    found = defect(value[5:]) if value[:5] == b"\0\0\0\0\x01" else ""
    return found or classify(message, exchange, (1,))[0]


def test_topic_matches_the_manifest(kafka: LocalKafka, topic: str) -> None:
    progress: list[int] = []
    options = ProduceOptions(count=30_000, bad=0.02, duplicates=0.03, seed=4)
    manifest = produce("BINANCE", topic, config(kafka), options, progress.append)
    assert sum(progress) == manifest.sent == 30_000

    messages = read(kafka, manifest)
    assert {number: found.sent for number, found in manifest.partitions.items()} == Counter(
        message.partition for message in messages
    )
    assert all(found.next - found.first == found.sent for found in manifest.partitions.values())
    reasons = Counter(reason(message, "BINANCE") for message in messages)
    assert reasons.pop("") == manifest.silver == 29_400
    assert reasons == manifest.bad
    good = [message for message in messages if not reason(message, "BINANCE")]
    assert len({classify(message, "BINANCE", (1,))[1]["message_id"] for message in good}) == manifest.gold
    partitions: dict[bytes | None, set[int]] = {}
    for message in messages:
        partitions.setdefault(message.key, set()).add(message.partition)
    assert partitions.pop(None) == {0, 1, 2}
    assert all(len(found) == 1 for found in partitions.values())


def test_same_options_give_the_same_messages_at_the_next_offsets(kafka: LocalKafka, topic: str) -> None:
    start = datetime.now(UTC) - timedelta(hours=1)
    options = ProduceOptions(count=2000, bad=0.1, duplicates=0.1, seed=9, start=start)
    first, second = (produce("KRAKEN", topic, config(kafka), options) for _ in range(2))
    for number, found in first.partitions.items():
        assert second.partitions[number].first == found.next
    rows = [
        Counter(
            (m.partition, m.offset - manifest.partitions[m.partition].first, m.value, m.key, m.timestamp_ms)
            for m in read(kafka, manifest)
        )
        for manifest in (first, second)
    ]
    assert rows[0] == rows[1]


def test_rate_holds_and_messages_arrive_at_their_kafka_time(kafka: LocalKafka, topic: str) -> None:
    manifest = produce("BINANCE", topic, config(kafka), ProduceOptions(count=2000, rate=1000))
    assert manifest.seconds == pytest.approx(2, abs=0.5)
    times = [message.timestamp_ms or 0 for message in read(kafka, manifest)]
    assert max(times) - min(times) == pytest.approx(2000, abs=200)
    assert max(times) <= datetime.fromisoformat(manifest.ended).timestamp() * 1000


def test_messages_spread_over_the_last_hour(kafka: LocalKafka, topic: str) -> None:
    manifest = produce("BINANCE", topic, config(kafka), ProduceOptions(count=5000, duplicates=0.1, over_seconds=3600))
    assert manifest.seconds < 30
    messages = read(kafka, manifest)
    end_ms = datetime.fromisoformat(manifest.ended).timestamp() * 1000
    times = [message.timestamp_ms or 0 for message in messages]
    assert end_ms - 3600_000 - 60_000 < min(times) < end_ms - 3000_000
    assert end_ms - 60_000 < max(times) < end_ms
    assert {classify(message, "BINANCE", (1,))[0] for message in messages} == {""}


def test_missing_topic_and_missing_broker_are_named(kafka: LocalKafka, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(KafkaError, match="topic nowhere does not exist"):
        produce("BINANCE", "nowhere", config(kafka), ProduceOptions(count=1))
    port = free_port()
    with pytest.raises(KafkaError, match=f"no Kafka answers at 127.0.0.1:{port}"):
        produce("BINANCE", "nowhere", {"bootstrap.servers": f"127.0.0.1:{port}"}, ProduceOptions(count=1))
    assert capfd.readouterr().err == "", "librdkafka's own lines reach the terminal"
    with pytest.raises(KafkaError, match=r"setting is wrong: .*no\.such"):
        produce("BINANCE", "nowhere", config(kafka, **{"no.such": "1"}), ProduceOptions(count=1))


def test_messages_that_kafka_refuses_are_counted(kafka: LocalKafka, topic: str) -> None:
    future = datetime.now(UTC) + timedelta(days=2)  # the broker takes at most one hour
    with pytest.raises(ProduceError, match=rf"500 messages to topic {topic} failed .*validate record"):
        produce("BINANCE", topic, config(kafka), ProduceOptions(count=500, start=future))


def test_recorded_trades_arrive_unchanged(kafka: LocalKafka, topic: str) -> None:
    manifests = replay(SAMPLE, {"kraken": Target("KRAKEN", topic)}, config(kafka))
    manifest = manifests.pop("kraken")
    assert not manifests
    assert (manifest.sent, manifest.gold, manifest.dlq) == (300, 300, 0)
    messages = read(kafka, manifest)
    lines = [line.split(",") for line in SAMPLE.read_text().splitlines()[1:]]
    shifts = set()
    by_id = {f"KRAKEN-{line[3]}": line for line in lines}
    for message in messages:
        found, trade = classify(message, "KRAKEN", (1,))
        assert not found
        line = by_id.pop(trade["trade_id"])
        assert (trade["symbol"], trade["currency"], trade["side"]) == (line[1], line[2], line[7])
        assert [trade["price"], trade["quantity"]] == [Decimal(amount) for amount in line[5:7]]
        assert message.timestamp_ms == trade["timestamp"] // 1000
        shifts.add(trade["timestamp"] // 1000 - int(line[4]))
    assert not by_id
    assert len(shifts) == 1

    again = replay(SAMPLE, {"kraken": Target("KRAKEN", topic)}, config(kafka))["kraken"]
    ids = [
        {classify(message, "KRAKEN", (1,))[1]["message_id"] for message in read(kafka, one)}
        for one in (manifest, again)
    ]
    assert ids[0] == ids[1]

    with pytest.raises(ProduceError, match="has no trade of binance"):
        replay(SAMPLE, {"binance": Target("BINANCE", topic)}, config(kafka))
