"""Schema ids in the headers of Kafka messages: where serializers put them if they do not precede the value."""

import ctypes

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from confluent_kafka import Message

from k2flow.compat.librdkafka import py

NAMES = ("__value_schema_id", "apicurio.value.globalId", "apicurio.value.contentId")
"""The headers of Confluent's and Apicurio's serializers. The first one that a message has counts."""
_FRONT_BYTES = 5  # a 0 byte and the id
MAX_BYTES = 33
"""Bytes of a header that are kept, more than any id has: a batch must not grow by headers of any size."""


def read_schema_headers(value: pa.BinaryArray, addresses: list[int]) -> dict[int, tuple[str, bytes]]:
    """Return name and bytes of the header with the schema id, by number, for the messages at n addresses.

    Values (n) that begin with a 0 byte usually have their id in front. So of those with the same 4 bytes behind it, the
    first is looked at, and the others only if it has a header.
    """
    n = len(value)
    if value.null_count == n:
        return {}
    edges = np.frombuffer(value.buffers()[1], np.int32, n + 1, 4 * value.offset)
    filled = np.flatnonzero(np.diff(edges))
    data = np.frombuffer(value.buffers()[2] or b"", np.uint8)
    in_front = data[edges[filled]] == 0
    rows = np.concatenate([filled[~in_front], _worth_a_look(filled[in_front], edges, data, addresses)])
    found, distinct = {}, dict[tuple[str, bytes], tuple[str, bytes]]()
    for i in rows.tolist():
        header = _read(addresses[i])
        if header:
            found[i] = distinct.setdefault(header, header)
    return found


def _worth_a_look(
    rows: npt.NDArray[np.int64], edges: npt.NDArray[np.int32], data: npt.NDArray[np.uint8], addresses: list[int]
) -> npt.NDArray[np.int64]:
    """Return those of the rows that have the 4 bytes after the first one in common with a message with a header."""
    rows = rows[edges[rows + 1] - edges[rows] >= _FRONT_BYTES]
    if not len(rows):
        return rows
    every = np.ndarray((len(data) - _FRONT_BYTES + 1,), "<u4", buffer=data, offset=1, strides=(1,))
    ids = every[edges[rows]]
    if (ids == ids[0]).all():
        return rows if _read(addresses[rows[0]]) else rows[:0]
    _, firsts, group = np.unique(ids, return_index=True, return_inverse=True)
    has_header = np.array([_read(addresses[i]) is not None for i in rows[firsts].tolist()])
    found: npt.NDArray[np.int64] = rows[has_header[group]]
    return found


def schema_header(message: Message) -> tuple[str, bytes] | None:
    """Return name and bytes of a message's header with the schema id, as `read_schema_headers` does."""
    if not message.value():
        return None
    try:
        headers = dict(message.headers() or ())  # the last header of a name counts
    except UnicodeDecodeError:  # another header's name
        return None
    return next(((name, (headers[name] or b"")[:MAX_BYTES]) for name in NAMES if name in headers), None)


def _read(address: int) -> tuple[str, bytes] | None:
    headers, data, size = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_size_t()
    if py.rd_kafka_message_headers(address, ctypes.byref(headers)):
        return None  # it has none
    for name in NAMES:
        if not py.rd_kafka_header_get_last(headers, name.encode(), ctypes.byref(data), ctypes.byref(size)):
            return name, ctypes.string_at(data, min(size.value, MAX_BYTES)) if data else b""
    return None
