"""One topic, read from the broker: its offsets, times and messages."""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType

import numpy as np
import pyarrow as pa
from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, IsolationLevel, KafkaException, Message
from confluent_kafka import KafkaError as ConfluentError
from confluent_kafka import TopicPartition as KafkaPosition
from confluent_kafka.admin import OffsetSpec
from tenacity import Retrying, retry_if_exception_type, stop_after_delay, wait_exponential_jitter

from k2flow.errors import KafkaError, NoBrokerError
from k2flow.iceberg.ledger import Mark
from k2flow.kafka.marks import Place, read_marks
from k2flow.kafka.properties import DEFAULTS, FORCED
from k2flow.kafka.schema_headers import schema_header
from k2flow.kafka.topic import (
    TIMEOUT_SECONDS,
    BrokerDownError,
    check_properties,
    find_topic,
    find_watermarks,
    offsets_client,
)
from k2flow.retryable import Verdict, kafka_verdict
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch, timestamps

log = logging.getLogger(__name__)
MERGE_DISTANCE = 1_000  # ranges with at most this many offsets between them are read together
MAX_OFFSETS = 500_000  # the offsets that one reader reads at most, with or without messages
STALLED_SECONDS = 20.0
Ranges = Sequence[tuple[int, int]]


@dataclass
class MessagesRead:
    """The messages of some ranges of offsets, and the ranges that could not be read.

    `damage` says where Kafka's log is damaged, if it is.
    """

    offset: list[int] = field(default_factory=list)
    messages: list[Message] = field(default_factory=list)
    unread: list[tuple[int, int]] = field(default_factory=list)
    damage: str | None = None

    def rows(self) -> pa.RecordBatch:
        """Return the messages as rows of MESSAGE_SCHEMA."""
        milliseconds = np.array([m.timestamp()[1] for m in self.messages], np.int64)
        keys, values = ([read(m) for m in self.messages] for read in (Message.key, Message.value))
        columns = [pa.array(keys, pa.binary()), pa.array(values, pa.binary()), timestamps(milliseconds)]
        return pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)

    def schema_headers(self) -> dict[int, tuple[str, bytes]]:
        """Return name and bytes of the record header with a schema id, by offset."""
        found = ((m.offset(), schema_header(m)) for m in self.messages)
        return {offset: header for offset, header in found if header}

    def batch(self, partition: int) -> MessageBatch:
        """Return the messages as a batch of one partition, with no ranges of offsets."""
        numbers, offsets = np.full(len(self.offset), partition, np.int32), np.array(self.offset, np.int64)
        headers = {(partition, offset): header for offset, header in self.schema_headers().items()}
        return MessageBatch(self.rows(), numbers, offsets, [], schema_headers=headers)


class TopicReader:
    """One topic on the broker. `topic` is None if it no longer exists."""

    def __init__(
        self,
        config: Mapping[str, str],
        topic: str,
        timeout_seconds: float = TIMEOUT_SECONDS,
        own: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        """Connect to the broker, and wait `timeout_seconds` at most for its first answer.

        `config` are librdkafka's properties from the settings, `own` those for this consumer alone. Raises KafkaError
        if the topic may not be read, NoBrokerError if no broker answers, and SettingsError for a wrong property.
        """
        self._topic = topic
        self._budget = MAX_OFFSETS
        self._config = check_properties(config)
        self._properties = {**DEFAULTS, "group.id": "k2flow-audit", **self._config, **own, **FORCED}
        self._consumer = Consumer(self._properties, logger=log)
        try:
            known = self._consumer.list_topics(timeout=timeout_seconds).topics
            self.topic = find_topic(config, topic) if topic in known else None
        except (KafkaException, BrokerDownError) as error:
            self.close()
            if isinstance(error, BrokerDownError):
                raise NoBrokerError(str(error)) from error
            where = config["bootstrap.servers"]
            raise NoBrokerError(f"no Kafka broker answers at {where} ({error.args[0].str()})") from error

    def watermarks(self, partitions: Collection[int]) -> dict[int, tuple[int, int]]:
        """Return, by partition, the first offset that Kafka has and the end of the committed messages.

        A leader that has just changed answers within TIMEOUT_SECONDS. Raises KafkaError.
        """
        retrying = Retrying(
            retry=retry_if_exception_type(BrokerDownError),
            wait=wait_exponential_jitter(initial=0.1, max=1),
            stop=stop_after_delay(TIMEOUT_SECONDS),
            reraise=True,
        )
        try:
            return retrying(find_watermarks, self._config, self._topic, partitions)
        except BrokerDownError as error:
            raise KafkaError(str(error)) from error

    def log_ends(self, partitions: Iterable[int]) -> dict[int, int]:
        """Return the end of the log of these partitions, open transactions included; absent if Kafka does not say."""
        asked = {KafkaPosition(self._topic, p): OffsetSpec.latest() for p in partitions}
        if not asked:
            return {}
        ends = {}
        options = {"isolation_level": IsolationLevel.READ_UNCOMMITTED, "request_timeout": TIMEOUT_SECONDS}
        try:
            admin = offsets_client(self._config, self._topic)
        except KafkaException as error:
            log.debug("%s: no end of the log: %s", self._topic, error)
            return {}
        for place, future in admin.list_offsets(asked, **options).items():
            try:
                ends[place.partition] = int(future.result().offset)
            except KafkaException as error:
                log.debug("%s[%d]: no end of the log: %s", self._topic, place.partition, error)
        return ends

    def uncommitted_times(self, offsets: Mapping[int, int], seconds: float) -> dict[int, int | None]:
        """Return Kafka's time of the message at an offset of each partition, committed or not; else as `times`."""
        committed = self._consumer
        self._consumer = Consumer({**self._properties, "isolation.level": "read_uncommitted"}, logger=log)
        try:
            return {p: ms for (p, _), ms in self.times(offsets.items(), seconds).items()}
        finally:
            self._consumer.close()
            self._consumer = committed

    def times(self, wanted: Iterable[tuple[int, int]], seconds: float) -> dict[tuple[int, int], int | None]:
        """Return Kafka's time (ms since 1970) of the first committed message at or after each (partition, offset).

        None if no message follows; absent if Kafka has not answered within `seconds`, or has no time. Raises KafkaError
        if Kafka refuses to read.
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
        self._consumer.assign([KafkaPosition(self._topic, partition, offset) for partition, offset in asked.items()])
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

    def marks(self, places: Collection[Place]) -> dict[Place, Mark | None]:
        """Return the message at each (partition, offset); None if Kafka has none there. Raises KafkaError."""
        return read_marks(self._consumer, self._topic, places)

    def first_since(self, partition: int, ms: int) -> int | None:
        """Return the first offset whose message's time is `ms` (since 1970) or later, or None. Raises KafkaError."""
        try:
            (found,) = self._consumer.offsets_for_times([KafkaPosition(self._topic, partition, ms)], TIMEOUT_SECONDS)
        except KafkaException as error:
            raise KafkaError(f"{self._topic}[{partition}]: no offset by time ({error.args[0].str()})") from error
        return None if found.offset < 0 else int(found.offset)

    def read(self, partition: int, ranges: Ranges, low: int, high: int) -> MessagesRead:
        """Return the committed messages in `ranges` (offsets [first, next), ascending, apart).

        Offsets before `low` and those past MAX_OFFSETS are unread. Offsets from `high` on have no messages.
        """
        result = MessagesRead()
        wanted = []
        for first, end in ranges:
            if first < low:
                result.unread.append((first, min(end, low)))
            if max(first, low) < min(end, high):
                wanted.append((max(first, low), min(end, high)))
        for span in merge_close(wanted):
            size = span[-1][1] - span[0][0]
            if size > self._budget or not self._read_span(partition, span, result):
                result.unread += span
            self._budget -= min(size, self._budget)
        return result

    def _read_span(self, partition: int, span: list[tuple[int, int]], result: MessagesRead) -> bool:
        """Read from the first range to the end of the last. Return false if Kafka stops before."""
        firsts, ends = np.array(span, np.int64).T
        self._consumer.assign([KafkaPosition(self._topic, partition, span[0][0])])
        last_received = time.monotonic()
        at, end = span[0][0], span[-1][1]
        while at < end:
            got = self._consumer.consume(min(10_000, end - at), timeout=1)
            if not got and time.monotonic() - last_received > STALLED_SECONDS:
                return False
            for m in got:
                last_received = time.monotonic()
                if m.error() is not None:
                    if m.error().code() == ConfluentError._PARTITION_EOF:
                        return True
                    if kafka_verdict(m.error().code()) is Verdict.DAMAGED:
                        result.damage = f"offset {at} cannot be read ({m.error().str()})"
                    return False
                if m.offset() < at:
                    result.damage = f"a message with offset {m.offset()} follows offset {at - 1}"
                    return False
                at = m.offset() + 1
                i = int(np.searchsorted(firsts, m.offset(), "right")) - 1
                if i >= 0 and m.offset() < ends[i]:
                    result.offset.append(m.offset())
                    result.messages.append(m)
        return True

    def close(self) -> None:
        """Close the consumer."""
        self._consumer.close()


def merge_close(ranges: Ranges) -> list[list[tuple[int, int]]]:
    """Return `ranges`, with those together that have at most MERGE_DISTANCE offsets between them."""
    spans: list[list[tuple[int, int]]] = []
    for piece in ranges:
        if spans and piece[0] - spans[-1][-1][1] <= MERGE_DISTANCE:
            spans[-1].append(piece)
        else:
            spans.append([piece])
    return spans
