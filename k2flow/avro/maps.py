"""Removes duplicate keys of maps: the last entry of a key wins, as in fastavro and in Java's map.

Avro has no rule for duplicate keys, but readers of the tables do. DuckDB rejects a file in which a map has a key twice,
so one hostile message would make all messages of its file unreadable.
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.cursor import Ints

_WORD = 64


def last_of_each_key(counts: Ints, keys: pa.StringArray) -> npt.NDArray[np.bool_] | None:
    """Return the mask of entries to keep, or None to keep all; `counts` (n,) holds the number of entries per map."""
    if not len(keys) or counts.max() < 2:
        return None
    encoded = keys.dictionary_encode()
    codes, distinct = encoded.indices.to_numpy(), len(encoded.dictionary)
    if distinct <= _WORD:  # the usual case: one bit set per map decides it
        filled = counts[counts > 0]
        bits = np.bitwise_or.reduceat(np.uint64(1) << codes.astype(np.uint64), np.cumsum(filled) - filled)
        if (np.bitwise_count(bits) == filled).all():
            return None
    owner = np.repeat(np.arange(len(counts)), counts)
    _, from_end = np.unique((owner * distinct + codes)[::-1], return_index=True)
    if len(from_end) == len(keys):
        return None
    keep = np.zeros(len(keys), bool)
    keep[len(keys) - 1 - from_end] = True
    return keep
