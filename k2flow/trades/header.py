"""The header of a payload: 0x00 and the schema id, big-endian (Confluent's wire format)."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.trades.reasons import Reason

HEADER_BYTES = 5
_HEADER = np.dtype([("magic", "u1"), ("schema_id", ">u4")])


def read_headers(payloads: pa.BinaryArray) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """Return what is wrong with the header of each of n payloads (NULL_PAYLOAD, BAD_MAGIC or 0), and its schema id."""
    n = len(payloads)
    reasons, ids = np.full(n, Reason.BAD_MAGIC, np.uint8), np.zeros(n, np.int64)
    edges = np.frombuffer(payloads.buffers()[1], np.int32, n + 1 + payloads.offset)[payloads.offset :]
    data = payloads.buffers()[2] or b""
    long = np.flatnonzero(np.diff(edges) >= HEADER_BYTES)
    if len(long):
        # An item at every byte, so that one look-up copies all headers.
        every = np.ndarray((len(data) - HEADER_BYTES + 1,), f"V{HEADER_BYTES}", buffer=data, strides=(1,))
        header = every[edges[long]].view(_HEADER)
        readable = header["magic"] == 0
        reasons[long[readable]] = Reason.VALID
        ids[long] = np.where(readable, header["schema_id"], 0)
    if payloads.null_count:
        null = payloads.is_null().to_numpy(zero_copy_only=False)
        reasons[null], ids[null] = Reason.NULL_PAYLOAD, 0
    return reasons, ids


def header_detail(payload: pa.BinaryScalar) -> str:
    """Return why the header of a payload cannot be read."""
    if not payload.is_valid:
        return "the message has no value"
    value = payload.as_py()
    if len(value) < HEADER_BYTES:
        return f"{len(value)} bytes, fewer than the {HEADER_BYTES} of the header"
    return f"first byte 0x{value[0]:02x}, not 0x00"
