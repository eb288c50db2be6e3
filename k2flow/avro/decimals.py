"""Converts decimals from big-endian two's complement of any length to the little-endian words of Arrow's decimals.

Avro 1.12 specification, "Decimal". Zero bytes mean 0; superfluous leading sign bytes are accepted.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from k2flow.avro.cursor import Block, Ints, Mask

_WORD = 8


def read_decimals(block: Block, start: Ints, length: npt.NDArray[Any], precision: int, words: int) -> tuple[Ints, Mask]:
    """Read n unscaled values, shape (n, words), low word first, and which have too many digits (value 0)."""
    size = length.astype(np.int64)
    longest = int(size.max(initial=0))
    limit = 10**precision
    out = np.empty((len(start), words), np.int64)
    if longest <= _WORD:
        low = block.window("<u8", start).byteswap().view(np.int64) >> (64 - 8 * size)
        if not size.all():
            low[size == 0] = 0
        out[:, 0] = low
        out[:, 1:] = (low >> 63)[:, None]
        if limit > 2**63 or (low.max(initial=0) < limit and low.min(initial=0) > -limit):
            return out, np.zeros(len(start), np.bool_)
        too_wide = (low >= limit) | (low <= -limit)
    else:
        too_wide = _read_wide(block, start, size, out)
        too_wide |= _at_least(out, limit) | ~_at_least(out, 1 - limit)
    out[too_wide] = 0
    return out, too_wide


def _read_wide(block: Block, start: Ints, size: Ints, out: Ints) -> Mask:
    """Fill `out` word by word from the end of each value; return which values do not fit."""
    words = out.shape[1]
    fill = np.where((block.data[start] >= 0x80) & (size > 0), -1, 0)
    stop = start + size
    for k in range(words):
        own = np.clip(size - _WORD * k, 0, _WORD)
        shift = 64 - 8 * own
        # If the value has no bytes in this word, its position may be outside the buffer.
        at = np.where(own > 0, stop - _WORD * (k + 1), start)
        word = block.window("<u8", at).byteswap().view(np.int64)
        out[:, k] = np.where(own > 0, (word << (shift & 63)) >> (shift & 63), fill)
    too_wide: Mask = (out[:, -1] < 0) != (fill < 0)
    extra = np.maximum(size - _WORD * words, 0)
    long = np.flatnonzero(extra)
    owner = np.repeat(long, extra[long])
    first = np.cumsum(extra[long]) - extra[long]
    byte = block.data[start[owner] + np.arange(len(owner)) - np.repeat(first, extra[long])]
    too_wide[owner[byte != fill[owner].astype(np.uint8)]] = True
    return too_wide


def _at_least(words: Ints, bound: int) -> Mask:
    """Return which values, shape (n, words), are at least `bound`."""
    result = np.ones(len(words), np.bool_)
    for k in range(words.shape[1]):
        top = k == words.shape[1] - 1
        kind = np.int64 if top else np.uint64
        part = bound >> 64 * k
        limit = kind(part if top else part & (2**64 - 1))
        word = words[:, k].view(kind) if top else np.ascontiguousarray(words[:, k]).view(np.uint64)
        result = (word > limit) | ((word == limit) & result)
    return result
