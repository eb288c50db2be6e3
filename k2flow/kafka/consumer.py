"""Kafka messages in whole Arrow batches, by librdkafka's own C interface.

confluent-kafka creates a Python object for each message, and each attribute of it is a call: more than half of the time
to read a topic (`scripts/bench catchup` has the figures). Here a batch's messages stay in librdkafka's memory until
their keys and values are copied, all at once, into Arrow. `k2flow.compat.librdkafka` declares the functions.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import KafkaError as ConfluentError

from k2flow.compat.librdkafka import CONSUMER, EVENT_LOG, MESSAGE, OFFSET_INVALID, TEXT_BYTES, c, py
from k2flow.errors import KafkaError, KafkaRefusedError, LostOffsetsError, SettingsError
from k2flow.kafka.schema_headers import read_schema_headers
from k2flow.retryable import Verdict, kafka_verdict

log = logging.getLogger(__name__)
Int64s = npt.NDArray[np.int64]
_MAX_TIMEOUT_MS = 2**31 - 1
_LEVELS = [logging.CRITICAL] * 3 + [logging.ERROR, logging.WARNING, logging.INFO, logging.INFO, logging.DEBUG]
"""Python's level for each of syslog's, 0 to 7."""
_LOST_CONNECTION = {"FAIL", "ERROR"}
"""The facilities of librdkafka's lines about connections: those of one, and those of all."""
_MISSING = {
    ConfluentError.UNKNOWN_TOPIC_OR_PART,
    ConfluentError.UNKNOWN_TOPIC_ID,
    ConfluentError.INCONSISTENT_TOPIC_ID,
    ConfluentError._UNKNOWN_TOPIC,
    ConfluentError._UNKNOWN_PARTITION,
}
"""Retried by a new start, which checks that the topic is still the same."""


@dataclass(frozen=True, kw_only=True)
class PartitionEvent:
    """An event that librdkafka reports in place of a message; `code` is one of confluent_kafka.KafkaError's.

    `after` is the number of messages that came before it in the same fetch.
    """

    code: int
    text: str
    partition: int
    offset: int
    after: int = 0


@dataclass(frozen=True, kw_only=True)
class FetchedMessages:
    """n messages, in the order of each partition, and the events that came with them.

    Keys and values (binary, n) keep null and empty apart; `timestamp_ms` is -1 for a message without one.
    `leader_epoch` has, by partition, the epoch in which its last message was written (-1: unknown). `lost_connection`
    is librdkafka's line about the last connection that failed since the fetch before: messages may be of the next one.
    """

    partition: npt.NDArray[np.int32]
    offset: Int64s
    timestamp_ms: Int64s
    key: pa.BinaryArray
    value: pa.BinaryArray
    events: list[PartitionEvent]
    leader_epoch: Mapping[int, int] = field(default_factory=dict)
    lost_connection: str = ""
    schema_headers: Mapping[int, tuple[str, bytes]] = field(default_factory=dict)  # by number: see read_schema_headers

    def __len__(self) -> int:
        return len(self.offset)


class BatchConsumer:
    """Reads the partitions assigned to it, from the offsets given. Commits nothing.

    One thread at a time may use it. Raises SettingsError if librdkafka does not accept a property, KafkaError if it
    refuses a call.
    """

    def __init__(self, properties: Mapping[str, str]) -> None:
        text = ctypes.create_string_buffer(TEXT_BYTES)
        conf = c.rd_kafka_conf_new()
        for name, value in {**properties, "log.queue": "true"}.items():
            if c.rd_kafka_conf_set(conf, name.encode(), value.encode(), text, TEXT_BYTES):
                raise SettingsError(text.value.decode())
        self._handle = c.rd_kafka_new(CONSUMER, conf, text, TEXT_BYTES)
        if not self._handle:
            raise SettingsError(text.value.decode())
        self._logs = c.rd_kafka_queue_new(self._handle)
        c.rd_kafka_set_log_queue(self._handle, self._logs)
        c.rd_kafka_poll_set_consumer(self._handle)
        self._queue = c.rd_kafka_queue_get_consumer(self._handle)
        self._addresses = np.zeros(0, np.int64)
        self._lost_connection = ""

    def assign(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Start to read more partitions of `topic`, each at its given offset."""
        self._change(c.rd_kafka_incremental_assign, topic, offsets)

    def unassign(self, topic: str, partitions: Iterable[int]) -> None:
        """Stop reading these partitions. Messages fetched but not yet consumed are dropped."""
        self._change(c.rd_kafka_incremental_unassign, topic, dict.fromkeys(partitions, OFFSET_INVALID))

    def consume(self, limit: int, timeout_seconds: float) -> FetchedMessages:
        """Return `limit` messages and events, or those that came before the timeout."""
        self._refuse_if_closed()
        if len(self._addresses) < limit:
            self._addresses = np.zeros(limit, np.int64)
        into = self._addresses.ctypes.data
        timeout_ms = min(int(timeout_seconds * 1000), _MAX_TIMEOUT_MS)
        count = c.rd_kafka_consume_batch_queue(self._queue, timeout_ms, into, limit)
        if count < 0:
            raise KafkaError("librdkafka no longer has a queue of messages: start again")
        where = self._addresses[:count].copy()
        addresses = where.tolist()
        try:
            fetched = _copy_messages(where, addresses)
        finally:
            deque(map(py.rd_kafka_message_destroy, addresses), 0)
        self._log()  # now: a line about a connection comes before the messages of the next one
        lost, self._lost_connection = self._lost_connection, ""
        return replace(fetched, lost_connection=lost) if lost else fetched

    def log_end(self, topic: str, partition: int) -> int | None:
        """Return the offset after the last one of a partition, as of its newest fetch; None if it is not known yet."""
        self._refuse_if_closed()
        low, high = ctypes.c_int64(), ctypes.c_int64(OFFSET_INVALID)
        c.rd_kafka_get_watermark_offsets(self._handle, topic.encode(), partition, ctypes.byref(low), ctypes.byref(high))
        return high.value if high.value >= 0 else None

    def close(self) -> None:
        """End the client's threads. After it every other call raises KafkaError."""
        if self._handle:
            c.rd_kafka_consumer_close(self._handle)
            self._log()
            c.rd_kafka_queue_destroy(self._queue)
            c.rd_kafka_queue_destroy(self._logs)
            c.rd_kafka_destroy(self._handle)
            self._handle = None

    def _change(self, change: Callable[..., Any], topic: str, offsets: Mapping[int, int]) -> None:
        self._refuse_if_closed()
        partitions = c.rd_kafka_topic_partition_list_new(len(offsets))
        for partition, offset in offsets.items():
            c.rd_kafka_topic_partition_list_add(partitions, topic.encode(), partition)
            c.rd_kafka_topic_partition_list_set_offset(partitions, topic.encode(), partition, offset)
        error = change(self._handle, partitions)
        c.rd_kafka_topic_partition_list_destroy(partitions)
        if error:
            text = c.rd_kafka_error_string(error).decode()
            c.rd_kafka_error_destroy(error)
            raise KafkaError(f"{topic}: the partitions to read, {sorted(offsets)}, cannot be changed: {text}")

    def _refuse_if_closed(self) -> None:
        if not self._handle:
            raise KafkaError("this consumer is closed")

    def _log(self) -> None:
        """Pass librdkafka's log lines on: by default it writes them to standard error.

        It has a line for each attempt to connect, twenty a second. Who fetches gets the last of them.
        """
        while event := c.rd_kafka_queue_poll(self._logs, 0):
            if c.rd_kafka_event_type(event) == EVENT_LOG:
                facility, text, level = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int()
                c.rd_kafka_event_log(event, ctypes.byref(facility), ctypes.byref(text), ctypes.byref(level))
                known = _LEVELS[min(max(level.value, 0), len(_LEVELS) - 1)]
                if _text(facility.value) in _LOST_CONNECTION:
                    self._lost_connection, known = _text(text.value), logging.DEBUG
                log.log(known, "%s: %s", _text(facility.value), _text(text.value))
            c.rd_kafka_event_destroy(event)


def check_event(event: PartitionEvent, topic: str, position: int | None) -> None:
    """Log an event from which librdkafka recovers by itself; `position` is the next offset of its partition.

    Raises LostOffsetsError if Kafka no longer has the next offset, KafkaRefusedError if a new client may recover, and
    KafkaError if none can.
    """
    where = f"{topic}[{event.partition}]"
    verdict = kafka_verdict(event.code)
    if verdict is Verdict.LOST:
        raise LostOffsetsError(
            f"{where}: Kafka no longer has offset {position}, which is the next to read ({event.text}); start again to "
            "see what is lost"
        )
    if event.code in _MISSING:
        raise KafkaRefusedError(f"{where}: the partition no longer exists ({event.text}); start again to look for it")
    if event.code == ConfluentError._FATAL:
        raise KafkaRefusedError(f"{topic}: {event.text}: the client has ended, start again")
    if verdict is not Verdict.RETRIED:
        raise KafkaError(f"{where}: offset {position} cannot be read: {event.text}")
    log.warning("%s: %s; librdkafka keeps trying", topic, event.text)


def _copy_messages(where: Int64s, addresses: list[int]) -> FetchedMessages:
    """Copy the messages at these addresses. Raises KafkaError if the library lays them out in another way."""
    messages = _structures(where)
    events = []
    failed = messages["err"] != 0
    if failed.any():
        for i in np.flatnonzero(failed).tolist():
            code, partition, offset = messages[["err", "partition", "offset"]][i].tolist()
            text = _text(c.rd_kafka_message_errstr(addresses[i]))
            after = int((~failed[:i]).sum())
            events.append(PartitionEvent(code=code, text=text, partition=partition, offset=offset, after=after))
        messages, addresses = messages[~failed], where[~failed].tolist()
    n = len(messages)
    if n and min(int(messages[name].min()) for name in ("partition", "offset", "len", "key_len")) < 0:
        raise KafkaError("a message has a negative partition, offset or size: librdkafka's memory was read wrongly")
    value = _gather(messages["payload"], messages["len"])
    return FetchedMessages(
        partition=messages["partition"].copy(),
        offset=messages["offset"].copy(),
        timestamp_ms=np.fromiter(map(py.rd_kafka_message_timestamp, addresses, repeat(None)), np.int64, n),
        key=_gather(messages["key"], messages["key_len"]),
        value=value,
        events=events,
        schema_headers=read_schema_headers(value, addresses),
        leader_epoch={
            p: py.rd_kafka_message_leader_epoch(addresses[i]) for p, i in last_of_each(messages["partition"])
        },
    )


def last_of_each(partition: npt.NDArray[np.int32]) -> list[tuple[int, int]]:
    """Return each partition among n messages, with the index of its last one."""
    if len(partition) == 0:
        return []
    last = np.full(int(partition.max()) + 1, -1)
    last[partition] = np.arange(len(partition))  # of repeated indices, the last value stays
    found = np.flatnonzero(last >= 0)
    return list(zip(found.tolist(), last[found].tolist(), strict=True))


def _structures(where: Int64s) -> npt.NDArray[Any]:
    """Return the structures at n addresses, which are multiples of 8 apart."""
    if len(where) == 0:
        return np.zeros(0, MESSAGE)
    first = int(where.min())
    memory = pa.foreign_buffer(first, int(where.max()) - first + MESSAGE.itemsize)
    # An item at every word, so that one take picks the n that are structures; no other is read.
    count = (memory.size - MESSAGE.itemsize) // 8 + 1
    every = np.ndarray((count,), f"V{MESSAGE.itemsize}", buffer=memory, strides=(8,))
    return every[(where - first) // 8].view(MESSAGE)


def _gather(address: Int64s, length: Int64s) -> pa.BinaryArray:
    """Copy n pieces of memory of these lengths into one array; null for a null address."""
    n = len(address)
    null = address == 0
    if null.all():
        return pa.nulls(n, pa.binary())
    first = int(address[~null].min())
    size = int((address + length).max()) - first
    begin = np.where(null, 0, address - first) if null.any() else address - first
    # Each piece and the gap after it are items of one array over all the memory between the first and the last byte, so
    # that Arrow's own `take` copies every second item. It estimates their size from the outermost edges.
    edges = np.empty(2 * n + 2, np.int64)
    edges[1:-1:2] = begin
    edges[2:-1:2] = begin + length
    edges[0], edges[-1] = 0, min(2 * int(length.sum()), size)
    buffers = [None, pa.py_buffer(edges), pa.foreign_buffer(first, size)]
    items = pa.Array.from_buffers(pa.large_binary(), 2 * n + 1, buffers)
    _, offsets, data = items.take(pa.array(np.arange(1, 2 * n + 1, 2))).buffers()
    narrow = np.frombuffer(offsets, np.int64, n + 1)
    if narrow[-1] > np.iinfo(np.int32).max:
        raise KafkaError(f"{narrow[-1]} bytes came at once: set K2FLOW_KAFKA_QUEUED_MAX_MESSAGES_KBYTES lower")
    valid = pa.py_buffer(np.packbits(~null, bitorder="little")) if null.any() else None
    return pa.Array.from_buffers(pa.binary(), n, [valid, pa.py_buffer(narrow.astype(np.int32)), data])


def _text(text: bytes | None) -> str:
    return (text or b"").decode("utf-8", "replace")
