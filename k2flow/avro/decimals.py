"""Decimals: big-endian two's complement of any length, into the little-endian words of Arrow's decimal types.

Avro 1.12 specification, "Decimal". No bytes at all are 0; leading sign bytes that the value does not need are accepted.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

from k2flow.avro.cursor import Block, Ints, Mask

_WORD = 8


def read_decimals(block: Block, start: Ints, length: npt.NDArray[Any], precision: int, words: int) -> tuple[Ints, Mask]:
    """N unscaled values, shape (n, words), least significant word first; and which of them have too many digits (0)."""
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
        wide = (low >= limit) | (low <= -limit)
    else:
        wide = _read_long(block, start, size, out)
        wide |= _at_least(out, limit) | ~_at_least(out, 1 - limit)
    out[wide] = 0
    return out, wide


def _read_long(block: Block, start: Ints, size: Ints, out: Ints) -> Mask:
    """Fills `out` word by word from each value's end; which values do not fit into it."""
    words = out.shape[1]
    fill = np.where((block.data[start] >= 0x80) & (size > 0), -1, 0)
    stop = start + size
    for k in range(words):
        own = np.clip(size - _WORD * k, 0, _WORD)
        shift = 64 - 8 * own
        # Where the value ends before this word there is nothing to read, and the position may be no position at all.
        at = np.where(own > 0, stop - _WORD * (k + 1), start)
        word = block.window("<u8", at).byteswap().view(np.int64)
        out[:, k] = np.where(own > 0, (word << (shift & 63)) >> (shift & 63), fill)
    wide: Mask = (out[:, -1] < 0) != (fill < 0)
    extra = np.maximum(size - _WORD * words, 0)
    long = np.flatnonzero(extra)
    owner = np.repeat(long, extra[long])
    first = np.cumsum(extra[long]) - extra[long]
    byte = block.data[start[owner] + np.arange(len(owner)) - np.repeat(first, extra[long])]
    wide[owner[byte != fill[owner].astype(np.uint8)]] = True
    return wide


def _at_least(words: Ints, bound: int) -> Mask:
    """Whether each value, shape (n, words), is `bound` or more."""
    result = np.ones(len(words), np.bool_)
    for k in range(words.shape[1]):
        top = k == words.shape[1] - 1
        kind = np.int64 if top else np.uint64
        part = bound >> 64 * k
        limit = kind(part if top else part & (2**64 - 1))
        word = words[:, k].view(kind) if top else np.ascontiguousarray(words[:, k]).view(np.uint64)
        result = (word > limit) | ((word == limit) & result)
    return result
