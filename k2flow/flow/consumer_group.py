"""The consumer group's client: new partitions, and committed offsets for tools that watch lag."""

import logging
import time
from collections.abc import Iterable, Mapping

from confluent_kafka import Consumer, KafkaException, TopicPartition

from k2flow.config.settings import KAFKA_PREFIX
from k2flow.errors import SettingsError

log = logging.getLogger(__name__)
DISCOVERY_SECONDS = 30.0  # between two searches for new partitions
TIMEOUT_SECONDS = 2.0
"""For a broker to answer before the last commit of offsets, which would wait most of a minute for one that is down."""


class ConsumerGroup:
    """A client of the group. It reads no messages, and the flow does not depend on the group's offsets.

    Raises SettingsError if librdkafka does not accept a property.
    """

    def __init__(self, properties: Mapping[str, str], topic: str) -> None:
        try:
            # The other client logs what is wrong with the brokers.
            self._client = Consumer({**properties, "log_level": "0"})
        except KafkaException as error:
            raise SettingsError(f"a {KAFKA_PREFIX}* setting is wrong: {error.args[0].str()}") from error
        self._topic = topic
        self._discover_at = time.monotonic() + DISCOVERY_SECONDS
        self._emitted: dict[int, int] = {}  # not yet reported

    def discover_partitions(self) -> tuple[int, ...]:
        """Return all partitions of the topic if it is time to look for new ones, else none."""
        if time.monotonic() < self._discover_at:
            return ()
        self._discover_at = time.monotonic() + DISCOVERY_SECONDS
        try:
            return tuple(self._client.list_topics(self._topic, timeout=1).topics[self._topic].partitions)
        except KafkaException as error:
            log.warning("new partitions of %s were not looked for: %s", self._topic, error)
            return ()

    def on_emit(self, offsets: Iterable[tuple[int, int, int]]) -> None:
        """Note the offset ranges of an emitted batch."""
        self._emitted |= {p: end for p, _, end in offsets}

    def report_committed(self, final: bool) -> None:
        """Commit the offsets of all emitted batches, after the tables. With `final`, wait for a broker that answers."""
        if not self._emitted:
            return
        offsets = [TopicPartition(self._topic, p, next_) for p, next_ in self._emitted.items()]
        self._emitted = {}
        try:
            if final:
                self._client.list_topics(self._topic, timeout=TIMEOUT_SECONDS)
            self._client.commit(offsets=offsets, asynchronous=not final)
        except KafkaException as error:
            log.warning("the committed offsets were not reported to the consumer group: %s", error.args[0].str())

    def close(self) -> None:
        """Close the client."""
        self._client.close()
