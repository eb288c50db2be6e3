"""Kafka messages in whole Arrow batches, by librdkafka's own C interface.

confluent-kafka makes a Python object of each message, and each attribute of it is a call: more than half of what it
takes to read a topic (`scripts/bench catchup` has the figures). Here a batch's messages stay where librdkafka holds
them until their keys and values are copied, all at once, into Arrow.

Only what librdkafka's header (rdkafka.h) promises is used: `rd_kafka_message_t` is a public structure, and the
functions are called in the very library that confluent_kafka has loaded.
"""

import ctypes
import logging
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import cimpl

from k2flow.errors import KafkaError, SettingsError

log = logging.getLogger(__name__)

Int64s = npt.NDArray[np.int64]

_CONSUMER = 1  # rd_kafka_type_t
_OFFSET_INVALID = -1001  # RD_KAFKA_OFFSET_INVALID
_EVENT_LOG = 0x4
_TEXT_BYTES = 512
_LONGEST_MS = 2**31 - 1
_MESSAGE = np.dtype(
    {
        "names": ["err", "partition", "payload", "len", "key", "key_len", "offset"],
        "formats": [np.int32, np.int32, np.int64, np.int64, np.int64, np.int64, np.int64],
        "offsets": [0, 16, 24, 32, 40, 48, 56],
        "itemsize": 72,
    }
)
"""rd_kafka_message_t on a machine of 64 bits; addresses are signed, as all that Python maps are far below 2^63."""
_LEVELS = [logging.CRITICAL] * 3 + [logging.ERROR, logging.WARNING, logging.INFO, logging.INFO, logging.DEBUG]
"""Python's level for each of syslog's, 0 to 7."""


@dataclass(frozen=True)
class Event:
    """What librdkafka tells of a partition in place of a message; `code` is one of confluent_kafka.KafkaError's."""

    code: int
    text: str
    partition: int
    offset: int


@dataclass(frozen=True)
class Fetched:
    """n messages, in the order of each partition, and the events that came with them.

    Keys and values (binary, n) keep null and empty apart; `timestamp_ms` is -1 where a message has none.
    """

    partition: npt.NDArray[np.int32]
    offset: Int64s
    timestamp_ms: Int64s
    key: pa.BinaryArray
    value: pa.BinaryArray
    events: list[Event]

    def __len__(self) -> int:
        return len(self.offset)


class BatchConsumer:
    """Reads the partitions that it is assigned, from the offsets that it is told. Commits nothing.

    Not for several threads at once. Raises SettingsError for a property that librdkafka does not take, KafkaError.
    """

    def __init__(self, properties: Mapping[str, str]) -> None:
        text = ctypes.create_string_buffer(_TEXT_BYTES)
        conf = _c.rd_kafka_conf_new()
        for name, value in {**properties, "log.queue": "true"}.items():
            if _c.rd_kafka_conf_set(conf, name.encode(), value.encode(), text, _TEXT_BYTES):
                raise SettingsError(text.value.decode())
        self._handle = _c.rd_kafka_new(_CONSUMER, conf, text, _TEXT_BYTES)
        if not self._handle:
            raise SettingsError(text.value.decode())
        self._logs = _c.rd_kafka_queue_new(self._handle)
        _c.rd_kafka_set_log_queue(self._handle, self._logs)
        _c.rd_kafka_poll_set_consumer(self._handle)
        self._queue = _c.rd_kafka_queue_get_consumer(self._handle)
        self._addresses = np.zeros(0, np.int64)

    def assign(self, topic: str, offsets: Mapping[int, int]) -> None:
        """Begins to read more partitions of `topic`, each at the offset given."""
        self._change(_c.rd_kafka_incremental_assign, topic, offsets)

    def unassign(self, topic: str, partitions: Iterable[int]) -> None:
        """Reads these partitions no more. What was fetched of them and not consumed is dropped."""
        self._change(_c.rd_kafka_incremental_unassign, topic, dict.fromkeys(partitions, _OFFSET_INVALID))

    def consume(self, limit: int, timeout_seconds: float) -> Fetched:
        """Up to `limit` messages and events, as soon as there are so many or the time is over."""
        self._refuse_if_closed()
        self._log()
        if len(self._addresses) < limit:
            self._addresses = np.zeros(limit, np.int64)
        into = self._addresses.ctypes.data
        got = _c.rd_kafka_consume_batch_queue(self._queue, min(int(timeout_seconds * 1000), _LONGEST_MS), into, limit)
        if got < 0:
            raise KafkaError("librdkafka has no queue of messages any more")
        where = self._addresses[:got].copy()
        addresses = where.tolist()
        try:
            return _fetched(where, addresses)
        finally:
            deque(map(_py.rd_kafka_message_destroy, addresses), 0)

    def close(self) -> None:
        """Ends the threads of the client. Not to be used after it."""
        if self._handle:
            _c.rd_kafka_consumer_close(self._handle)
            self._log()
            _c.rd_kafka_queue_destroy(self._queue)
            _c.rd_kafka_queue_destroy(self._logs)
            _c.rd_kafka_destroy(self._handle)
            self._handle = None

    def _change(self, change: Callable[..., Any], topic: str, offsets: Mapping[int, int]) -> None:
        self._refuse_if_closed()
        partitions = _c.rd_kafka_topic_partition_list_new(len(offsets))
        for partition, offset in offsets.items():
            _c.rd_kafka_topic_partition_list_add(partitions, topic.encode(), partition)
            _c.rd_kafka_topic_partition_list_set_offset(partitions, topic.encode(), partition, offset)
        error = change(self._handle, partitions)
        _c.rd_kafka_topic_partition_list_destroy(partitions)
        if error:
            text = _c.rd_kafka_error_string(error).decode()
            _c.rd_kafka_error_destroy(error)
            raise KafkaError(f"{topic}: the partitions to read, {sorted(offsets)}, cannot be changed: {text}")

    def _refuse_if_closed(self) -> None:
        if not self._handle:
            raise KafkaError("this consumer is closed")

    def _log(self) -> None:
        """Passes on what librdkafka has to say: by itself it writes to standard error."""
        while event := _c.rd_kafka_queue_poll(self._logs, 0):
            if _c.rd_kafka_event_type(event) == _EVENT_LOG:
                facility, text, level = ctypes.c_char_p(), ctypes.c_char_p(), ctypes.c_int()
                _c.rd_kafka_event_log(event, ctypes.byref(facility), ctypes.byref(text), ctypes.byref(level))
                known = _LEVELS[min(max(level.value, 0), len(_LEVELS) - 1)]
                log.log(known, "%s: %s", _text(facility.value), _text(text.value))
            _c.rd_kafka_event_destroy(event)


def _fetched(where: Int64s, addresses: list[int]) -> Fetched:
    """What the messages at these addresses hold, copied."""
    messages = _structures(where)
    events = []
    failed = messages["err"] != 0
    if failed.any():
        for i in np.flatnonzero(failed).tolist():
            m = messages[i]
            text = _text(_c.rd_kafka_message_errstr(addresses[i]))
            events.append(Event(int(m["err"]), text, int(m["partition"]), int(m["offset"])))
        messages, addresses = messages[~failed], where[~failed].tolist()
    n = len(messages)
    return Fetched(
        partition=messages["partition"].copy(),
        offset=messages["offset"].copy(),
        timestamp_ms=np.fromiter(map(_py.rd_kafka_message_timestamp, addresses, repeat(None)), np.int64, n),
        key=_gather(messages["key"], messages["key_len"]),
        value=_gather(messages["payload"], messages["len"]),
        events=events,
    )


def _structures(where: Int64s) -> npt.NDArray[Any]:
    """The structures at n addresses, which are multiples of 8 apart."""
    if len(where) == 0:
        return np.zeros(0, _MESSAGE)
    first = int(where.min())
    memory = pa.foreign_buffer(first, int(where.max()) - first + _MESSAGE.itemsize)
    # An item at every word, so that one take picks the n that are structures; none but those are touched.
    count = (memory.size - _MESSAGE.itemsize) // 8 + 1
    every = np.ndarray((count,), f"V{_MESSAGE.itemsize}", buffer=memory, strides=(8,))
    return every[(where - first) // 8].view(_MESSAGE)


def _gather(address: Int64s, length: Int64s) -> pa.BinaryArray:
    """The n pieces of memory of these lengths, copied into one array; null where the address is."""
    n = len(address)
    null = address == 0
    if null.all():
        return pa.nulls(n, pa.binary())
    first = int(address[~null].min())
    size = int((address + length).max()) - first
    begin = np.where(null, 0, address - first) if null.any() else address - first
    # Each piece and the gap after it are items of one array over all the memory between the first and the last byte, so
    # that Arrow's own `take` copies every second item. The outermost edges are what it estimates their size from.
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


def _declare(library: ctypes.CDLL, functions: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    """Tells ctypes the result and the arguments of each function."""
    for name, (result, *arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


_P, _S, _INT, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
_c = _declare(
    ctypes.CDLL(cimpl.__file__),
    {
        "rd_kafka_conf_new": (_P,),
        "rd_kafka_conf_set": (_INT, _P, _S, _S, _P, _SIZE),
        "rd_kafka_new": (_P, _INT, _P, _P, _SIZE),
        "rd_kafka_destroy": (None, _P),
        "rd_kafka_consumer_close": (_INT, _P),
        "rd_kafka_poll_set_consumer": (_INT, _P),
        "rd_kafka_queue_new": (_P, _P),
        "rd_kafka_queue_get_consumer": (_P, _P),
        "rd_kafka_queue_destroy": (None, _P),
        "rd_kafka_queue_poll": (_P, _P, _INT),
        "rd_kafka_set_log_queue": (_INT, _P, _P),
        "rd_kafka_event_type": (_INT, _P),
        "rd_kafka_event_log": (_INT, _P, _P, _P, _P),
        "rd_kafka_event_destroy": (None, _P),
        "rd_kafka_topic_partition_list_new": (_P, _INT),
        "rd_kafka_topic_partition_list_add": (_P, _P, _S, ctypes.c_int32),
        "rd_kafka_topic_partition_list_set_offset": (_INT, _P, _S, ctypes.c_int32, ctypes.c_int64),
        "rd_kafka_topic_partition_list_destroy": (None, _P),
        "rd_kafka_incremental_assign": (_P, _P, _P),
        "rd_kafka_incremental_unassign": (_P, _P, _P),
        "rd_kafka_error_string": (_S, _P),
        "rd_kafka_error_destroy": (None, _P),
        "rd_kafka_message_errstr": (_S, _P),
        "rd_kafka_consume_batch_queue": (ctypes.c_ssize_t, _P, _INT, _P, _SIZE),
    },
)
"""librdkafka; the interpreter's lock is released during a call."""
_py = _declare(
    ctypes.PyDLL(cimpl.__file__),
    {
        "rd_kafka_message_timestamp": (ctypes.c_int64, _P, _P),
        "rd_kafka_message_destroy": (None, _P),
    },
)
"""The same, for calls so short that to release the lock would be most of their cost."""
