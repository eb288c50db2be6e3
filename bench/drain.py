"""The limit of this machine: drain a topic with confluent-kafka alone, without reading the messages.

Usage: python -m bench.drain BOOTSTRAP TOPIC
"""

import sys
import time

from confluent_kafka import Consumer, TopicPartition

from bench.measure import Usage, run

MESSAGES = 20_000
PROPERTIES = {"queued.min.messages": "1000000", "fetch.queue.backoff.ms": "5", "enable.auto.commit": "false"}


def measured(bootstrap: str, topic: str) -> Usage:
    """Drain in a separate process: `wall` from the first request to the last message, CPU without start-up."""
    imports = run([sys.executable, "-c", "import bench.drain"], {})
    used = run([sys.executable, "-m", "bench.drain", bootstrap, topic], {})
    return Usage(float(used.output.split()[-1]), used.cpu - imports.cpu, used.peak)


def drain(bootstrap: str, topic: str) -> float:
    """Consume every message that `topic` holds now. Return the seconds it took."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "drain", **PROPERTIES})
    partitions = [TopicPartition(topic, p) for p in consumer.list_topics(topic, timeout=10).topics[topic].partitions]
    bounds = [consumer.get_watermark_offsets(p, timeout=10) for p in partitions]
    left = sum(high - low for low, high in bounds)
    began = time.perf_counter()
    consumer.assign([TopicPartition(topic, p.partition, low) for p, (low, _) in zip(partitions, bounds, strict=True)])
    while left > 0:
        left -= len(consumer.consume(MESSAGES, timeout=0.05))
    took = time.perf_counter() - began
    consumer.close()
    return took


if __name__ == "__main__":
    print(drain(sys.argv[1], sys.argv[2]))
