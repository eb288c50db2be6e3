"""The broker under torture: stopped, killed, restarted, on another disk; and the producers that fill it."""

import os
import random
import shutil
import signal
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from confluent_kafka import Producer
from confluent_kafka.admin import (
    AclBinding,
    AclBindingFilter,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    ResourcePatternType,
    ResourceType,
)

from k2flow.errors import KafkaError, ProduceError
from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka
from k2flow.sandbox.producer import ProduceOptions, produce

BURST_SECONDS = 4
BAD, DUPLICATES = 0.05, 0.1
MOST_PARTITIONS = 8
PROPERTIES = {
    "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
    "allow.everyone.if.no.acl.found": "true",
    "log.message.timestamp.after.max.ms": str(2**63 - 1),
}
"""Of a broker that can refuse a client to read, and that takes messages of any time, as Kafka before 3.6 did."""
DELIVERY_SECONDS = 60


class Broker:
    """A broker that suffers one fault at a time."""

    def __init__(self, kafka: LocalKafka) -> None:
        self.kafka = kafka
        self._lock = threading.Lock()

    def interrupt(self, cleanly: bool, seconds: float) -> None:
        """Take the broker down for `seconds`, or longer if the start takes longer."""
        with self._lock:
            pid = self.kafka.status().pid
            if cleanly or pid is None:
                self.kafka.stop()
            else:
                os.kill(pid, signal.SIGKILL)
            time.sleep(seconds)
            self.kafka.start()

    def add_partition(self, topic: str) -> None:
        with self._lock:
            count = len(self.partitions(topic))
            if count < MOST_PARTITIONS:
                admin = self._admin()  # kept until the answer: it ends with its last reference
                admin.create_partitions([NewPartitions(topic, count + 1)])[topic].result(60)

    def keep_copy(self) -> None:
        """Keep a copy of the disk as it is now, for `older_disk`."""
        with self._lock:
            self.kafka.stop()
            shutil.copytree(self._disk, self._older)
            self.kafka.start()

    @contextmanager
    def older_disk(self) -> Iterator[None]:
        """Run on the copy of the disk that was kept. At the end, run on the right disk again."""
        right = self._disk.with_name("right")
        with self._lock:
            self.kafka.stop()
            self._disk.rename(right)
            shutil.copytree(self._older, self._disk)
            self.kafka.start()
            try:
                yield
            finally:
                self.kafka.stop()
                shutil.rmtree(self._disk)
                right.rename(self._disk)
                self.kafka.start()

    def partitions(self, topic: str) -> list[int]:
        """Return the partitions that a topic has now."""
        return sorted(self._admin().list_topics(topic, timeout=60).topics[topic].partitions)

    def partition_folder(self, topic: str, partition: int) -> Path:
        """Return the folder of a partition's segments."""
        return self._disk / f"{topic}-{partition}"

    def refuse_reads(self, topic: str, seconds: float) -> None:
        """Refuse every client to read the topic for a while; all else stays allowed."""
        admin = self._admin()
        for done in admin.create_acls([_acl(topic, *each) for each in _WRITE_ONLY]).values():
            done.result(60)
        time.sleep(seconds)
        everything = AclBindingFilter(
            ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, None, None, AclOperation.ANY, AclPermissionType.ANY
        )
        admin.delete_acls([everything])[everything].result(60)

    def _admin(self) -> AdminClient:
        return AdminClient({"bootstrap.servers": self.kafka.bootstrap})

    @property
    def _disk(self) -> Path:
        return self.kafka.home / "data"

    @property
    def _older(self) -> Path:
        return self.kafka.home / "older"


_WRITE_ONLY = ((AclOperation.ALL, AclPermissionType.ALLOW), (AclOperation.READ, AclPermissionType.DENY))


def _acl(topic: str, operation: AclOperation, permission: AclPermissionType) -> AclBinding:
    return AclBinding(ResourceType.TOPIC, topic, ResourcePatternType.LITERAL, "User:*", "*", operation, permission)


def send(bootstrap: str, topic: str, messages: Iterable[Mapping[str, object]]) -> None:
    """Send messages, given as arguments of `Producer.produce`. Return once all are delivered."""
    failed: list[object] = []
    producer = Producer({"bootstrap.servers": bootstrap, "queue.buffering.max.messages": 1_000_000})
    for each in messages:
        producer.produce(topic, on_delivery=lambda error, _: failed.append(error) if error else None, **each)
        producer.poll(0)
    left = producer.flush(DELIVERY_SECONDS)
    if left or failed:
        raise RuntimeError(f"{left + len(failed)} messages to {topic} were not delivered: {failed[:1]}")


class BurstProducer(threading.Thread):
    """Produces into an exchange's topic, burst after burst, each with a new seed, until it is stopped."""

    def __init__(self, exchange: str, bootstrap: str, rate: int, chance: random.Random) -> None:
        super().__init__(name=f"production-{exchange}", daemon=True)
        self.failures = 0
        self._exchange = find_exchange(exchange)
        self._config: Mapping[str, str] = {"bootstrap.servers": bootstrap, "message.timeout.ms": "20000"}
        self._rate = rate
        self._chance = chance
        self._ending = threading.Event()

    def run(self) -> None:
        while not self._ending.is_set():
            options = ProduceOptions(
                count=self._rate * BURST_SECONDS,
                rate=self._rate,
                bad=BAD,
                duplicates=DUPLICATES,
                seed=self._chance.randrange(2**32),
            )
            try:
                produce(self._exchange.code, self._exchange.settings.topic, self._config, options)
            except (KafkaError, ProduceError):  # the broker is down; the messages that arrived still count
                self.failures += 1
                self._ending.wait(1)

    def stop(self) -> None:
        self._ending.set()
        self.join()
