"""Checks, while a worker reads, that its client still gets what Kafka has.

After brokers' disks were restored from older copies, a partition's leader epoch has gone back. librdkafka then takes
the new leader for an old one, and asks for no more messages, without an error. A new client has no such memory.
"""

import time
from collections.abc import Callable, Mapping

from k2flow.errors import KafkaRefusedError
from k2flow.kafka.marks import find_marks
from k2flow.kafka.topic import BrokerDownError, find_watermarks

CHECK_SECONDS = 60.0
CONFIRM_SECONDS = 75.0
"""For the client to get a message that Kafka has: longer than it waits for a connection that is dead."""
_MIN_IDLE_FETCHES = 20
_WAIT_SECONDS = 2.0


class ClientCheck:
    """Knows the partitions from which nothing came since the last check although Kafka had messages."""

    def __init__(self, config: Mapping[str, str], properties: Mapping[str, str], topic: str) -> None:
        """Take librdkafka's properties from the settings, those of a consumer, and the topic."""
        self._config = config
        self._properties = properties
        self._topic = topic
        self._due = time.monotonic() + CHECK_SECONDS
        self._last: Mapping[int, int] = {}  # the positions of the last check
        self._behind: Mapping[int, int] = {}  # those of them for which Kafka had messages
        self._idle_fetches = 0

    def on_idle_fetch(self) -> None:
        """Note a fetch that returned all messages that the client had."""
        self._idle_fetches += 1

    def check_when_due(self, read_positions: Callable[[], Mapping[int, int]]) -> None:
        """Every CHECK_SECONDS, look for partitions that only another client can read.

        `read_positions` returns the next offsets of the partitions that are read now. Raises KafkaRefusedError,
        KafkaError.
        """
        if time.monotonic() < self._due:
            return
        positions = read_positions()
        if self._idle_fetches >= _MIN_IDLE_FETCHES:
            self._refuse_stuck({p: at for p, at in positions.items() if self._behind.get(p) == at})
        self._behind = self._kafka_has({p: at for p, at in positions.items() if self._last.get(p) == at})
        self._last, self._idle_fetches = positions, 0
        self._due = time.monotonic() + (CONFIRM_SECONDS if self._behind else CHECK_SECONDS)

    def _kafka_has(self, positions: Mapping[int, int]) -> dict[int, int]:
        """Return those positions for which Kafka has committed messages; none while it does not answer."""
        try:
            watermarks = find_watermarks(self._config, self._topic, positions, _WAIT_SECONDS)
        except BrokerDownError:
            return {}
        return {p: at for p, at in positions.items() if at < watermarks[p][1]}

    def _refuse_stuck(self, positions: Mapping[int, int]) -> None:
        found = find_marks(self._properties, self._topic, positions.items(), _WAIT_SECONDS)
        for (p, at), mark in found.items():
            if mark is not None:
                raise KafkaRefusedError(
                    f"{self._topic}[{p}]: this client no longer gets messages from offset {at} on, another one does: a "
                    "broker's disk may have been restored; start again, nothing is skipped"
                )
