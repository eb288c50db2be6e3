"""Checks, while a worker reads, that Kafka's log is still the one that it has read."""

import logging
import time
from collections.abc import Callable, Collection, Mapping

from k2flow.iceberg.ledger import Mark
from k2flow.kafka.marks import Place, find_other_messages, replaced_log

log = logging.getLogger(__name__)
CHECK_SECONDS = 60.0
RETRY_SECONDS = 10.0
"""Until the next check after an error of a connection, or after a check without an answer."""
WAIT_SECONDS = 2.0
MAX_WAIT_SECONDS = 10.0
"""For an answer: twice as long after each check without one, until no doubt is left. A slow network needs it."""


class LogCheck:
    """Knows the partitions in doubt: those read since the worker may have lost touch with a broker.

    A broker whose disk was restored answers again as if nothing had happened. So after any error of the connection,
    what is fetched of a partition is not used before its mark, the last message read until then, was read again. Each
    check uses a client of its own: librdkafka does not read on from a broker whose leader epoch has gone back.
    """

    def __init__(self, properties: Mapping[str, str], topic: str, setting: str) -> None:
        """Take the properties of a consumer, and the setting that accepts a replaced log."""
        self._properties = properties
        self._topic = topic
        self._setting = setting
        self._in_doubt: set[int] = set()
        self._due = time.monotonic() + CHECK_SECONDS
        self._earlier: Mapping[int, Mark] = {}  # the marks of the last check
        self._wait = WAIT_SECONDS

    def on_error(self, marks: Mapping[int, Mark]) -> None:
        """Note an error of the connection; `marks` are the last messages read, by partition."""
        self._in_doubt |= marks.keys()
        self._due = min(self._due, time.monotonic() + RETRY_SECONDS)

    def doubted(self, partitions: Collection[int]) -> bool:
        """Return whether one of these is in doubt."""
        return not self._in_doubt.isdisjoint(partitions)

    def verify(self, partitions: Collection[int], marks: Mapping[int, Mark]) -> None:
        """Read the marks of those of `partitions` that are in doubt. Raises LogReplacedError, KafkaError."""
        wanted = self._in_doubt.intersection(partitions)
        waiting = self._check({(p, marks[p].offset): marks[p] for p in wanted})
        log.debug("%s: partitions %s were compared after an error of the connection", self._topic, wanted - waiting)
        self._in_doubt -= wanted - waiting
        if not self._in_doubt:
            self._wait = WAIT_SECONDS

    def check_when_due(self, marks: Callable[[], Mapping[int, Mark]]) -> None:
        """Every CHECK_SECONDS, read the marks of the last time again; in doubt, those of now too.

        `marks` returns those of now. Raises LogReplacedError, KafkaError.
        """
        if time.monotonic() < self._due:
            return
        now = marks()
        wanted = [*self._earlier.items(), *((p, mark) for p, mark in now.items() if p in self._in_doubt)]
        waiting = self._check({(p, mark.offset): mark for p, mark in wanted})
        self._earlier = now
        self._due = time.monotonic() + (RETRY_SECONDS if waiting else CHECK_SECONDS)

    def _check(self, marks: Mapping[Place, Mark]) -> set[int]:
        """Return the partitions for which Kafka has not answered."""
        others, waiting = find_other_messages(self._properties, self._topic, marks, self._wait)
        if others:
            raise replaced_log(self._topic, others, self._setting)
        partitions = {p for p, _ in waiting}
        if partitions:
            text = "%s: Kafka has not given the last messages read of partitions %s again within %g s; asking again"
            log.warning(text, self._topic, sorted(partitions), self._wait)
            self._wait = min(2 * self._wait, MAX_WAIT_SECONDS)
        return partitions
