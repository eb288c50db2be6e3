"""What Kafka itself says: the offsets that it still has, and whether a gap of Bronze has a committed message in it."""

import logging
import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ConfluentError

from k2flow.errors import KafkaError, NoBrokerError
from k2flow.kafka.properties import DEFAULTS, FORCED
from k2flow.kafka.topic import TIMEOUT_SECONDS, BrokerDownError, checked, find_topic, watermarks
from k2flow.trades.messages import timestamps

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
    """One topic on the broker. Raises KafkaError where the topic may not be read, NoBrokerError, SettingsError.

    `topic` is None where there is no such topic any more. `timeout_seconds` is how long a broker has to answer at all;
    `own`: librdkafka's properties for this consumer alone.
    """

    def __init__(
        self,
        config: Mapping[str, str],
        topic: str,
        timeout_seconds: float = TIMEOUT_SECONDS,
        own: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        self._topic = topic
        self._budget = BUDGET
        properties = {**DEFAULTS, "group.id": "k2flow-audit", **checked(config), **own, **FORCED}
        self._consumer = Consumer(properties, logger=log)
        try:
            known = self._consumer.list_topics(timeout=timeout_seconds).topics
            self.topic = find_topic(config, topic) if topic in known else None
        except (KafkaException, BrokerDownError) as error:
            self.close()
            if isinstance(error, BrokerDownError):
                raise NoBrokerError(str(error)) from error
            where = config["bootstrap.servers"]
            raise NoBrokerError(f"no Kafka broker answers at {where} ({error.args[0].str()})") from error

    def watermarks(self, partition: int) -> tuple[int, int]:
        """The first offset that Kafka has and the end of the committed messages. Raises KafkaError."""
        return watermarks(self._consumer, self._topic, partition)

    def times(self, wanted: Iterable[tuple[int, int]], seconds: float) -> dict[tuple[int, int], int | None]:
        """Kafka's time (ms since 1970) of the first committed message at or after each (partition, offset).

        None where no message follows; absent where Kafka has not answered within `seconds`, or has no time.
        """
        waiting: dict[int, list[int]] = defaultdict(list)
        for partition, offset in sorted(wanted, reverse=True):
            waiting[partition].append(offset)
        found: dict[tuple[int, int], int | None] = {}
        deadline = time.monotonic() + seconds
        try:
            while waiting and time.monotonic() < deadline:
                self._first_times({partition: offsets.pop() for partition, offsets in waiting.items()}, deadline, found)
                waiting = {partition: offsets for partition, offsets in waiting.items() if offsets}
            self._consumer.unassign()
        except KafkaException as error:
            raise KafkaError(f"{self._topic}: no messages from Kafka ({error.args[0].str()})") from error
        return found

    def _first_times(self, asked: dict[int, int], deadline: float, found: dict[tuple[int, int], int | None]) -> None:
        """`times`, of one offset of each partition."""
        self._consumer.assign([TopicPartition(self._topic, partition, offset) for partition, offset in asked.items()])
        while asked and (left := deadline - time.monotonic()) > 0:
            m = self._consumer.poll(left)
            if m is None or m.partition() not in asked:
                continue
            at = (m.partition(), asked[m.partition()])
            if m.error() is None:
                kind, ms = m.timestamp()
                if kind != TIMESTAMP_NOT_AVAILABLE:
                    found[at] = ms
            elif m.error().code() == ConfluentError._PARTITION_EOF:
                found[at] = None
            del asked[m.partition()]

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
