"""The broker under torture: stopped, killed, restarted; and the producers that fill it."""

import os
import random
import signal
import threading
import time
from collections.abc import Mapping

from confluent_kafka.admin import AdminClient, NewPartitions

from k2flow.errors import KafkaError, ProduceError
from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka
from k2flow.sandbox.producer import ProduceOptions, produce

BURST_SECONDS = 4
BAD, DUPLICATES = 0.05, 0.1
MOST_PARTITIONS = 8


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
            admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
            count = len(admin.list_topics(topic, timeout=60).topics[topic].partitions)
            if count < MOST_PARTITIONS:
                admin.create_partitions([NewPartitions(topic, count + 1)])[topic].result(60)


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
