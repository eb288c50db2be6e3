"""librdkafka's C interface, in the very library that confluent_kafka has loaded.

Only what its header (rdkafka.h) promises is used: `rd_kafka_message_t` is a public structure. Three checks at import
ensure that this module reads it correctly: 64 bits, a tested version, and a structure of our own that librdkafka reads.
"""

import ctypes
from collections.abc import Mapping
from typing import Any

import numpy as np
from confluent_kafka import cimpl

from k2flow.compat import require_version
from k2flow.errors import UnsupportedVersionError

CONSUMER = 1  # rd_kafka_type_t
OFFSET_INVALID = -1001  # RD_KAFKA_OFFSET_INVALID
EVENT_LOG = 0x4  # RD_KAFKA_EVENT_LOG
TEXT_BYTES = 512
MESSAGE = np.dtype(
    {
        "names": ["err", "partition", "payload", "len", "key", "key_len", "offset"],
        "formats": [np.int32, np.int32, np.int64, np.int64, np.int64, np.int64, np.int64],
        "offsets": [0, 16, 24, 32, 40, 48, 56],
        "itemsize": 72,
    }
)
"""rd_kafka_message_t on a 64-bit machine. Addresses are signed: all that Python maps are far below 2^63."""

_P, _S, _INT, _SIZE = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int, ctypes.c_size_t
_PROBED_ERROR = -191  # RD_KAFKA_RESP_ERR__PARTITION_EOF
_PROBED_TEXT = b"k2flow"


def _declare(library: ctypes.CDLL, functions: Mapping[str, tuple[Any, ...]]) -> ctypes.CDLL:
    for name, (result, *arguments) in functions.items():
        function = getattr(library, name)
        function.restype, function.argtypes = result, arguments
    return library


c = _declare(
    ctypes.CDLL(cimpl.__file__),
    {
        "rd_kafka_version_str": (_S,),
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
        "rd_kafka_get_watermark_offsets": (_INT, _P, _S, ctypes.c_int32, _P, _P),
        "rd_kafka_incremental_assign": (_P, _P, _P),
        "rd_kafka_incremental_unassign": (_P, _P, _P),
        "rd_kafka_error_string": (_S, _P),
        "rd_kafka_error_destroy": (None, _P),
        "rd_kafka_err2str": (_S, _INT),
        "rd_kafka_message_errstr": (_S, _P),
        "rd_kafka_consume_batch_queue": (ctypes.c_ssize_t, _P, _INT, _P, _SIZE),
    },
)
"""librdkafka. Calls release the interpreter's lock."""
py = _declare(
    ctypes.PyDLL(cimpl.__file__),
    {
        "rd_kafka_message_timestamp": (ctypes.c_int64, _P, _P),
        "rd_kafka_message_leader_epoch": (ctypes.c_int32, _P),
        "rd_kafka_message_headers": (_INT, _P, _P),
        "rd_kafka_header_get_last": (_INT, _P, _S, _P, _P),
        "rd_kafka_message_destroy": (None, _P),
    },
)
"""librdkafka, for calls so short that releasing the lock would be most of their cost."""


def check_message_layout(message: np.dtype[Any] = MESSAGE, pointer_bytes: int = ctypes.sizeof(_P)) -> None:
    """Check that librdkafka finds error and payload of a message where `message` has them, with 64-bit pointers.

    Raises UnsupportedVersionError.
    """
    if pointer_bytes != 8:
        raise UnsupportedVersionError("librdkafka's messages can be read on 64-bit machines only: use one")
    text = ctypes.create_string_buffer(_PROBED_TEXT)
    structure = np.zeros(8, message)  # more zeros than any structure takes
    structure[0]["err"] = _PROBED_ERROR
    without_payload = c.rd_kafka_message_errstr(structure.ctypes.data)
    structure[0]["payload"] = ctypes.addressof(text)
    with_payload = c.rd_kafka_message_errstr(structure.ctypes.data)
    if (without_payload, with_payload) != (c.rd_kafka_err2str(_PROBED_ERROR), _PROBED_TEXT):
        raise UnsupportedVersionError(
            f"librdkafka {library_version()} lays out its messages in another way than k2flow was "
            "tested with: install confluent-kafka with -c constraints.txt"
        )


def library_version() -> str:
    """Return the version of the loaded library."""
    return str(c.rd_kafka_version_str().decode())


def check_library(version: str) -> None:
    """Check a version of librdkafka. Raises UnsupportedVersionError."""
    require_version("librdkafka", version, (2, 16, 0), (2, 17, 0))


check_library(library_version())
check_message_layout()
