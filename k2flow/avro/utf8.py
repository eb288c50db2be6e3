"""Finds the texts that are not valid UTF-8 (RFC 3629), many texts at once."""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Bytes = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]


def is_ascii(data: Bytes) -> bool:
    """Return whether no byte has its high bit set."""
    whole = len(data) & ~7
    words = np.bitwise_or.reduce(data[:whole].view(np.uint64))
    rest = np.bitwise_or.reduce(data[whole:])
    return not (int(words) & 0x8080808080808080 or int(rest) & 0x80)


def invalid_texts(data: Bytes, offsets: npt.NDArray[np.int32]) -> tuple[Ints, Ints]:
    """Find the texts data[offsets[i]:offsets[i + 1]] that are not valid UTF-8.

    Return their numbers i, and the first byte of each one's first invalid sequence, from the start of the text.
    """
    nothing = np.zeros(0, np.int64)
    if is_ascii(data):
        return nothing, nothing
    high = np.flatnonzero(data >= 0x80)
    rows = np.unique(np.searchsorted(offsets, high, "right") - 1)
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    some = pa.Array.from_buffers(pa.binary(), len(offsets) - 1, buffers).take(pa.array(rows))
    try:
        some.cast(pa.string())
    except pa.ArrowInvalid:
        own = np.frombuffer(some.buffers()[1], np.int32, len(rows) + 1).astype(np.int64)
        bad = _invalid_rows(np.frombuffer(some.buffers()[2], np.uint8), own)
        where = [_first_invalid(some[i].as_py()) for i in bad.tolist()]
        return rows[bad], np.array(where, np.int64)
    return nothing, nothing


def _first_invalid(text: bytes) -> int:
    try:
        text.decode()
    except UnicodeDecodeError as error:
        return error.start
    raise AssertionError("valid UTF-8 was classified as invalid")


def _invalid_rows(data: Bytes, offsets: Ints) -> Ints:
    """Check each text separately, all at once, so that one bad text among many costs no more than none."""
    length = np.diff(offsets)
    row = np.repeat(np.arange(len(length)), length)
    left = np.repeat(offsets[1:], length) - np.arange(offsets[0], offsets[-1])
    byte = data[offsets[0] : offsets[-1]]
    more = (byte >= 0xC0).astype(np.int64) + (byte >= 0xE0) + (byte >= 0xF0)
    cut = more >= left
    lead = np.where(cut, 0, byte)  # a sequence cut off by the end of its text must not reach into the next text
    more[cut] = 0
    expected = np.zeros(len(byte) + 3, np.bool_)
    for i in (1, 2, 3):
        expected[i : len(byte) + i] |= more >= i
    bad = cut | (expected[: len(byte)] != ((byte & 0xC0) == 0x80))
    bad |= (byte == 0xC0) | (byte == 0xC1) | (byte > 0xF4)
    before, second = lead[:-1], byte[1:]
    bad[1:] |= ((before == 0xE0) & (second < 0xA0)) | ((before == 0xED) & (second > 0x9F))  # overlong, surrogates
    bad[1:] |= ((before == 0xF0) & (second < 0x90)) | ((before == 0xF4) & (second > 0x8F))  # overlong, over U+10FFFF
    return np.unique(row[bad])
