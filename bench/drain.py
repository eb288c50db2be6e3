"""The limit of this machine: a topic drained by confluent-kafka alone, set as the flow's source is.

Usage: python -m bench.drain BOOTSTRAP TOPIC
"""

import sys

from confluent_kafka import Consumer, TopicPartition

from k2flow.source import CONSUME_MESSAGES, DEFAULTS, POLL_SECONDS


def drain(bootstrap: str, topic: str) -> int:
    """The number of messages that `topic` holds now, every one of which was consumed."""
    consumer = Consumer(
        {**DEFAULTS, "bootstrap.servers": bootstrap, "group.id": "drain", "enable.auto.commit": "false"}
    )
    partitions = [TopicPartition(topic, p) for p in consumer.list_topics(topic, timeout=10).topics[topic].partitions]
    bounds = [consumer.get_watermark_offsets(p, timeout=10) for p in partitions]
    consumer.assign([TopicPartition(topic, p.partition, low) for p, (low, _) in zip(partitions, bounds, strict=True)])
    wanted = sum(high - low for low, high in bounds)
    got = 0
    while got < wanted:
        got += len(consumer.consume(CONSUME_MESSAGES, timeout=POLL_SECONDS))
    consumer.close()
    return got


if __name__ == "__main__":
    print(drain(sys.argv[1], sys.argv[2]))
