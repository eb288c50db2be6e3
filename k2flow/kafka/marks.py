"""Marks: whether Kafka's log is the one that was read.

An offset says nothing about a log. After a broker's disk was restored from an older copy, or a topic was created again
on a broker without topic ids, the offsets in the tables are valid, and other messages are there. So the last message
read of each partition is kept as a mark, and read again: before a flow begins, after it has lost touch with a broker,
and from time to time. A log is only ever appended to. So if the marked message is the same, all before it are.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass
from functools import cache
from hashlib import blake2b

from confluent_kafka import TIMESTAMP_NOT_AVAILABLE, Consumer, KafkaException, Message, TopicPartition
from confluent_kafka import KafkaError as ConfluentError

from k2flow.errors import KafkaError, KafkaRefusedError, LogReplacedError
from k2flow.iceberg.ledger import Ledger, Mark
from k2flow.kafka.topic import Topic

log = logging.getLogger(__name__)
Place = tuple[int, int]  # partition, offset
FETCH = {"max.partition.fetch.bytes": "65536", "queued.min.messages": "1", "log_level": "0"}
"""Properties of a consumer that reads marks only: one batch of the log each."""
WAIT_SECONDS = 10.0
_GONE = {ConfluentError._PARTITION_EOF, ConfluentError._AUTO_OFFSET_RESET, ConfluentError.OFFSET_OUT_OF_RANGE}
_UNREADABLE = {ConfluentError._BAD_MSG, ConfluentError._BAD_COMPRESSION, ConfluentError.INVALID_MSG}


@dataclass(frozen=True)
class OtherMessage:
    """A place in the log that had message `read` when it was read, and has message `now`."""

    partition: int
    read: Mark
    now: Mark


def checksum(key: bytes | None, value: bytes | None) -> str:
    """Return a checksum of a message, 16 hexadecimal digits. Null and empty differ."""
    hashed = blake2b(digest_size=8)
    for part in (key, value):
        hashed.update(b"-" if part is None else b"%d:" % len(part) + part)
    return hashed.hexdigest()


def marks_of(topic: Topic, ledgers: Iterable[Ledger]) -> dict[Place, Mark]:
    """Return the marks of all ledgers that are of this topic, by place."""
    own = (ledger for ledger in ledgers if topic.same_as(ledger.topic_id))
    return {
        (p, mark.offset): mark for ledger in own for p, mark in ledger.evidence.marks.items() if p in topic.partitions
    }


def newest_marks(marks: Mapping[Place, Mark]) -> dict[int, Mark]:
    """Return the mark with the largest offset of each partition."""
    return {p: mark for (p, _), mark in sorted(marks.items(), key=lambda each: each[0])}


def find_other_messages(
    properties: Mapping[str, str], topic: str, marks: Mapping[Place, Mark], seconds: float = WAIT_SECONDS
) -> tuple[list[OtherMessage], set[Place]]:
    """Return the places where Kafka has other messages than the marks, and those for which it has not answered.

    `properties` are a consumer's (see k2flow.kafka.properties). Raises KafkaError if Kafka refuses to read.
    """
    found = find_marks(properties, topic, marks.keys(), seconds)
    for p, offset in (place for place, now in found.items() if now is None):
        _log_gone(
            f"{topic}[{p}]: Kafka no longer has offset {offset}: its log is not compared with the one read before"
        )
    return other_messages(marks, found), marks.keys() - found.keys()


@cache
def _log_gone(text: str) -> None:
    """Log each text once."""
    log.info(text)


def find_marks(
    properties: Mapping[str, str], topic: str, places: Collection[Place], seconds: float
) -> dict[Place, Mark | None]:
    """Return what `read_marks` returns, from a client of its own."""
    if not places:
        return {}
    try:
        consumer = Consumer({**properties, **FETCH})
    except KafkaException as error:
        raise KafkaRefusedError(f"{topic}: no client for Kafka ({error.args[0].str()}); start again") from error
    with closing(consumer):
        return read_marks(consumer, topic, places, seconds)


def wait_for_other_messages(
    properties: Mapping[str, str], topic: str, marks: Mapping[Place, Mark]
) -> list[OtherMessage]:
    """Return the places where Kafka has other messages, as soon as it has answered for all. Log that it waits."""
    others: list[OtherMessage] = []
    while marks:
        more, waiting = find_other_messages(properties, topic, marks)
        others += more
        marks = {place: mark for place, mark in marks.items() if place in waiting}
        if marks:
            log.warning(
                "%s: Kafka returns no message from partitions %s; waiting for it", topic, sorted({p for p, _ in marks})
            )
    return others


def read_marks(
    consumer: Consumer, topic: str, places: Collection[Place], seconds: float = WAIT_SECONDS
) -> dict[Place, Mark | None]:
    """Return the message at each place as Kafka has it now; None if it has none there (retention, compaction).

    A place is absent if Kafka has not answered for it. Nothing is assigned to the consumer afterwards.
    """
    waiting: dict[int, list[int]] = defaultdict(list)
    for partition, offset in sorted(places, reverse=True):
        waiting[partition].append(offset)
    found: dict[Place, Mark | None] = {}
    deadline = time.monotonic() + seconds
    try:
        while waiting and time.monotonic() < deadline:
            _read_first(consumer, topic, {p: offsets.pop() for p, offsets in waiting.items()}, deadline, found)
            waiting = {p: offsets for p, offsets in waiting.items() if offsets}
        consumer.unassign()
    except KafkaException as error:
        raise KafkaError(f"{topic}: no messages from Kafka ({error.args[0].str()})") from error
    return found


def _read_first(
    consumer: Consumer, topic: str, asked: dict[int, int], deadline: float, found: dict[Place, Mark | None]
) -> None:
    """Read the first message at or after one offset of each partition."""
    consumer.assign([TopicPartition(topic, partition, offset) for partition, offset in asked.items()])
    while asked and (left := deadline - time.monotonic()) > 0:
        m = consumer.poll(left)
        if m is None or m.partition() not in asked:
            continue
        place = (m.partition(), asked[m.partition()])
        error = m.error()
        if error is None:
            found[place] = mark_of(m) if m.offset() == place[1] else None
        elif error.code() in _GONE:
            found[place] = None
        elif error.code() in _UNREADABLE:
            log.warning("%s[%d]: offset %d cannot be read (%s), and is not compared", topic, *place, error.str())
            found[place] = None
        else:
            continue  # librdkafka keeps trying
        del asked[m.partition()]


def mark_of(message: Message) -> Mark:
    """Return the mark of one message."""
    kind, ms = message.timestamp()
    epoch = message.leader_epoch()
    return Mark(
        message.offset(),
        -1 if kind == TIMESTAMP_NOT_AVAILABLE else ms,
        checksum(message.key(), message.value()),
        -1 if epoch is None else epoch,
    )


def other_messages(marks: Mapping[Place, Mark], found: Mapping[Place, Mark | None]) -> list[OtherMessage]:
    """Return the places at which Kafka has another message than the mark."""
    return [
        OtherMessage(place[0], read, now)
        for place, read in sorted(marks.items())
        if (now := found.get(place)) is not None and not now.same_message(read)
    ]


def describe(topic: str, other: OtherMessage) -> str:
    """Return what was read and what Kafka has now, as text."""
    return (
        f"{topic}[{other.partition}]: Kafka has other messages than those that were read: at offset "
        f"{other.read.offset} there was a message of {other.read}, now there is one of {other.now}"
    )


def replaced_log(topic: str, others: Iterable[OtherMessage], setting: str) -> LogReplacedError:
    """Return the error for a log that is not the one that was read."""
    places = "; ".join(describe(topic, other) for other in others)
    return LogReplacedError(
        f"{places}. A broker's disk was restored, or the topic was created again. Restore the log that was read, or "
        "read this one into new tables. To continue where the tables end, without the messages that it has before, "
        f"set {setting}=1 for one start"
    )
