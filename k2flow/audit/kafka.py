"""What Kafka itself says: the offsets that it still has, and whether a gap of Bronze has a committed message in it."""

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import pyarrow as pa
from confluent_kafka import Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ConfluentError

from k2flow.errors import KafkaError
from k2flow.source import DEFAULTS, FORCED, timestamps
from k2flow.topic import TIMEOUT_SECONDS, BrokerDownError, find_topic, watermarks

log = logging.getLogger(__name__)

CLOSE = 1_000
"""Gaps so near to each other are read in one go, with what is between them."""
BUDGET = 500_000
"""Messages and empty offsets that are read again at the most, of one exchange."""
STALLED_SECONDS = 20.0

Ranges = Sequence[tuple[int, int]]


@dataclass
class Reread:
    """What came of reading ranges again: the messages that are in them, and the ranges that could not be read."""

    offset: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    unread: list[tuple[int, int]] = field(default_factory=list)

    def columns(self) -> tuple[pa.Array, pa.Array]:
        """Value and timestamp (us UTC) of each message."""
        milliseconds = np.array([m.timestamp()[1] for m in self.messages], np.int64)
        return pa.array([m.value() for m in self.messages], pa.binary()), timestamps(milliseconds)


class Broker:
    """One topic on the broker. Raises KafkaError where no broker answers or the topic may not be read.

    `topic_id` is None where there is no such topic any more.
    """

    def __init__(self, config: Mapping[str, str], topic: str) -> None:
        self._topic = topic
        self._budget = BUDGET
        self._consumer = Consumer({**DEFAULTS, "group.id": "k2flow-audit", **config, **FORCED}, logger=log)
        try:
            known = self._consumer.list_topics(timeout=TIMEOUT_SECONDS).topics
            found = find_topic(config, topic) if topic in known else None
        except (KafkaException, BrokerDownError) as error:
            self.close()
            raise KafkaError(f"no broker answers at {config['bootstrap.servers']} ({error})") from error
        self.topic_id = found.id if found else None
        self.partitions = found.partitions if found else ()

    def watermarks(self, partition: int) -> tuple[int, int]:
        """The first offset that Kafka has and the end of the committed messages. Raises KafkaError."""
        return watermarks(self._consumer, self._topic, partition)

    def first_since(self, partition: int, ms: int) -> int | None:
        """The first offset whose message's time is `ms` (since 1970) or later; None: there is none."""
        try:
            (found,) = self._consumer.offsets_for_times([TopicPartition(self._topic, partition, ms)], TIMEOUT_SECONDS)
        except KafkaException as error:
            raise KafkaError(f"{self._topic}[{partition}]: no offset by time ({error.args[0].str()})") from error
        return None if found.offset < 0 else int(found.offset)

    def read(self, partition: int, ranges: Ranges, low: int, high: int) -> Reread:
        """The committed messages in `ranges` (offsets [first, next), ascending, apart); what is below `low` or beyond
        the budget is unread, what is at `high` or above has no messages."""
        result = Reread()
        wanted = []
        for first, end in ranges:
            if first < low:
                result.unread.append((first, min(end, low)))
            if max(first, low) < min(end, high):
                wanted.append((max(first, low), min(end, high)))
        for span in _spans(wanted):
            size = span[-1][1] - span[0][0]
            if size > self._budget or not self._read_span(partition, span, result):
                result.unread += span
            self._budget -= min(size, self._budget)
        return result

    def _read_span(self, partition: int, span: list[tuple[int, int]], result: Reread) -> bool:
        """Reads from the first range to the end of the last; false where Kafka does not go on."""
        firsts, ends = np.array(span, np.int64).T
        self._consumer.assign([TopicPartition(self._topic, partition, span[0][0])])
        last_news = time.monotonic()
        at = span[0][0]
        while at < span[-1][1]:
            got = self._consumer.consume(10_000, timeout=1)
            if not got and time.monotonic() - last_news > STALLED_SECONDS:
                return False
            for m in got:
                last_news = time.monotonic()
                if m.error() is not None:
                    return bool(m.error().code() == ConfluentError._PARTITION_EOF)
                at = m.offset() + 1
                i = int(np.searchsorted(firsts, m.offset(), "right")) - 1
                if i >= 0 and m.offset() < ends[i]:
                    result.offset.append(m.offset())
                    result.messages.append(m)
        return True

    def close(self) -> None:
        self._consumer.close()


def _spans(ranges: Ranges) -> list[list[tuple[int, int]]]:
    """`ranges` put together where at most CLOSE offsets are between two of them."""
    spans: list[list[tuple[int, int]]] = []
    for piece in ranges:
        if spans and piece[0] - spans[-1][-1][1] <= CLOSE:
            spans[-1].append(piece)
        else:
            spans.append([piece])
    return spans
