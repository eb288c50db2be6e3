"""Schema ids in the headers of Kafka messages: where serializers put them if they do not precede the value."""

import ctypes

import numpy as np
import pyarrow as pa
from confluent_kafka import Message

from k2flow.compat.librdkafka import py

NAMES = ("__value_schema_id", "apicurio.value.globalId", "apicurio.value.contentId")
"""The headers of Confluent's and Apicurio's serializers. The first one that a message has counts."""


def read_schema_headers(value: pa.BinaryArray, addresses: list[int]) -> dict[int, tuple[str, bytes]]:
    """Return name and bytes of the header with the schema id, by number, for the messages at n addresses.

    Only messages whose value (n) does not begin with a 0 byte are looked at: other values have their id in front.
    """
    n = len(value)
    if value.null_count == n:
        return {}
    edges = np.frombuffer(value.buffers()[1], np.int32, n + 1, 4 * value.offset)
    filled = np.flatnonzero(np.diff(edges))
    first = np.frombuffer(value.buffers()[2] or b"", np.uint8)[edges[filled]]
    found = {}
    for i in filled[first != 0].tolist():
        header = _read(addresses[i])
        if header:
            found[i] = header
    return found


def schema_header(message: Message) -> tuple[str, bytes] | None:
    """Return name and bytes of a message's header with the schema id, as `read_schema_headers` does."""
    value = message.value()
    if not value or value[0] == 0:
        return None
    try:
        headers = dict(message.headers() or ())  # the last header of a name counts
    except UnicodeDecodeError:  # another header's name
        return None
    return next(((name, headers[name] or b"") for name in NAMES if name in headers), None)


def _read(address: int) -> tuple[str, bytes] | None:
    headers, data, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    if py.rd_kafka_message_headers(address, ctypes.byref(headers)):
        return None  # it has none
    for name in NAMES:
        if not py.rd_kafka_header_get_last(headers, name.encode(), ctypes.byref(data), ctypes.byref(size)):
            return name, ctypes.string_at(data, size.value) if data else b""
    return None
