"""The read positions of many records in one buffer; each step advances all of them together.

A lane, as in SIMD, is the read position of one record. The encodings are those of the Avro 1.12 specification, "Binary
encoding".

Zero padding follows the records in the buffer. A lane with a defect, or whose union has another branch, becomes
inactive: it reads in the padding. Zeros are a valid value of every type (0, an empty text, the first branch, no items).
So all lanes stay in step, and no step has to test which lanes are active.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.defect_log import DefectLog, DiscardingDefectLog
from k2flow.records import Defect

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]
LEADING_ZEROS = 8  # zero bytes before the first record: a number is read as a word that may begin before its first byte
TRAILING_ZEROS = 16
"""Zero bytes after the last one a plan can read: a varint is read in one window of 8 bytes and two more."""
MAX_COUNT = 2**31 - 1
_NO_END = 2**62
_VARINT_BYTES = 10
_WORD_BYTES = 8


@dataclass(eq=False)
class Block:
    """The bytes of consecutive records, copied into one padded buffer `data`.

    Inactive lanes read at `padding_start`. `first` is the number of the first row in the batch, and `starts` the
    position of each payload in `data`.
    """

    data: npt.NDArray[np.uint8]
    padding_start: int
    first: int
    starts: Ints
    defects: DefectLog

    def __post_init__(self) -> None:
        self.buffer = pa.py_buffer(self.data)

    def window(self, dtype: str | np.dtype[Any], at: Ints) -> npt.NDArray[Any]:
        """Return the value of type `dtype` that begins at each position; positions need no alignment."""
        kind = np.dtype(dtype)
        return np.ndarray((len(self.data) - kind.itemsize + 1,), kind, self.data, strides=(1,))[at]

    def inactive_lanes(self, n: int) -> "Lanes":
        """Create n lanes that belong to no record and read zeros."""
        return Lanes(self, np.full(n, self.first), np.full(n, self.padding_start), np.full(n, _NO_END))

    @contextmanager
    def discarding_defects(self) -> Iterator[None]:
        """Record no defects inside the context; lanes with a defect still become inactive."""
        defects, self.defects = self.defects, DiscardingDefectLog(0)
        try:
            yield
        finally:
            self.defects = defects

    def add_defect(self, at: Ints, defect: Defect, label: str, text: str, *values: npt.NDArray[Any]) -> None:
        """Record a defect of the bytes at `at`, which lie inside records."""
        own = np.searchsorted(self.starts, at, "right") - 1
        self.defects.add(own + self.first, at - self.starts[own], defect, label, text, *values)


@dataclass(eq=False, slots=True)
class Lanes:
    """m read positions: the row of each, its next byte, and the end of its record, both as positions in block.data."""

    block: Block
    row: Ints
    pos: Ints
    end: Ints

    def __len__(self) -> int:
        return len(self.pos)

    def take(self, index: Ints | Mask) -> "Lanes":
        """Copy some lanes."""
        return Lanes(self.block, self.row[index], self.pos[index], self.end[index])

    def put(self, index: Ints | Mask, part: "Lanes") -> None:
        """Move some lanes to the positions of `part`, taken from them."""
        self.pos[index] = part.pos
        self.end[index] = part.end

    def masked(self, active: Mask) -> "Lanes":
        """Copy all lanes, inactive outside `active`."""
        padding = self.block.padding_start
        return Lanes(self.block, self.row, np.where(active, self.pos, padding), np.where(active, self.end, _NO_END))

    def put_masked(self, active: Mask, part: "Lanes") -> None:
        """Move the lanes of `active` to the positions of `part`, created by `masked(active)`."""
        self.pos = np.where(active, part.pos, self.pos)
        self.end = np.where(active, part.end, self.end)

    def reject(self, bad: Mask, defect: Defect, at: Ints, label: str, text: str, *values: npt.NDArray[Any]) -> None:
        """Record a defect at the bytes `at` of the lanes of `bad`, and make these lanes inactive."""
        index = np.flatnonzero(bad & (at < self.block.padding_start))
        if not len(index):
            return
        row, block = self.row[index], self.block
        own = at[index] - block.starts[row - block.first]
        block.defects.add(row, own, defect, label, text, *(value[index] for value in values))
        self.pos[index] = block.padding_start
        self.end[index] = _NO_END

    def read_fixed(self, size: int, label: str, what: str) -> Ints:
        """Advance over `size` bytes, and return where they begin; lanes with fewer bytes are truncated."""
        start = self.pos
        self.pos = start + size
        over = self.pos > self.end
        if over.any():
            self._truncate(over, start, label, what)
            start = np.where(over, self.block.padding_start, start)
        return start

    def _truncate(self, over: Mask, at: Ints, label: str, what: str) -> None:
        self.reject(over, Defect.TRUNCATED, at, label, f"expected {what} at byte {{at}}, {{0}} left", self.end - at)

    def read_varint(self, label: str, what: str) -> Ints:
        """Read an int or long: zig-zag, 7 bits per byte, least significant first; 0 if it has a defect.

        Encodings longer than needed are accepted, up to 10 bytes and 64 bits.
        """
        start = self.pos
        head = self.block.data[start]
        any_bits = int(np.bitwise_or.reduce(head))
        long = None
        if any_bits < 0x80:
            self.pos = start + 1
            value = (head >> 1).astype(np.int64)
            if any_bits & 1:
                np.invert(value, out=value, where=(head & 1).view(np.bool_))
        else:
            value, size, long = _read_long_varints(self.block, start)
            self.pos = start + size
        over = self.pos > self.end
        if over.any():
            value[over] = 0
            self._truncate(over, start, label, what)
        if long is not None and long.any():
            value[long] = 0
            text = what + " of more than 64 bits at byte {at}"
            self.reject(long & ~over, Defect.MALFORMED, start, label, text)
        return value

    def read_length_prefixed(self, label: str) -> tuple[Ints, npt.NDArray[Any]]:
        """Read a length and advance over the bytes; return their start and length, 0 if there is a defect."""
        head = self.block.data[self.pos]
        if not int(np.bitwise_or.reduce(head)) & 0x81:
            # The common case: each length is one byte and not negative. One check covers length and content.
            size = head >> 1
            start = self.pos + 1
            stop = start + size
            if not (stop > self.end).any():
                self.pos = stop
                return start, size
        at = self.pos
        length = self.read_varint(label, "a length")
        if (length < 0).any():
            bad = length < 0
            self.reject(bad, Defect.MALFORMED, at, label, "length {0} at byte {at}", length)
            length[bad] = 0
        start = self.pos
        over = length > self.end - start
        if over.any():
            text = "expected {0} bytes at byte {at}, {1} left"
            self.reject(over, Defect.TRUNCATED, start, label, text, length, self.end - start)
            length[over] = 0
            start = np.where(over, self.block.padding_start, start)
        self.pos = self.pos + length
        return start, length

    def read_block_count(self, min_size: int, label: str) -> Ints:
        """Read the number of items, of at least `min_size` bytes, in the next block of an array or map; 0 ends it.

        A negative count is followed by the size of the block in bytes, for readers that skip it; it is not checked.
        """
        at = self.pos
        count = self.read_varint(label, "a block count")
        too_large = (count > MAX_COUNT) | (count < -MAX_COUNT)
        if too_large.any():
            self.reject(too_large, Defect.MALFORMED, at, label, "a block of {0} items at byte {at}", count)
            count[too_large] = 0
        sized = np.flatnonzero(count < 0)
        if len(sized):
            part = self.take(sized)
            part.read_varint(label, "a block size")
            self.put(sized, part)
            count[sized] = np.where(part.pos < self.block.padding_start, -count[sized], 0)
        if min_size and count.any():
            left = self.end - self.pos
            over = count > left // min_size
            if over.any():
                text = f"expected {{0}} items of at least {min_size} bytes at byte {{at}}, {{1}} left"
                self.reject(over, Defect.TRUNCATED, self.pos, label, text, count, left)
                count[over] = 0
        return count


def _read_long_varints(block: Block, start: Ints) -> tuple[Ints, Ints, Mask]:
    """Read varints of any size; return their values, their sizes in bytes, and which have more than 64 bits."""
    word = block.window("<u8", start)
    stops = ~word & np.uint64(0x8080808080808080)
    below = (stops & -stops) - np.uint64(1)  # all bits below the first stop bit; all 64 without one
    size = (np.bitwise_count(below).astype(np.int64) + 1) >> 3
    word &= below
    # Move the 7-bit groups together: in pairs, then in fours, then all eight.
    word = (word & np.uint64(0x007F007F007F007F)) | ((word & np.uint64(0x7F007F007F007F00)) >> np.uint64(1))
    word = (word & np.uint64(0x00003FFF00003FFF)) | ((word & np.uint64(0x3FFF00003FFF0000)) >> np.uint64(2))
    word = (word & np.uint64(0x000000000FFFFFFF)) | ((word & np.uint64(0x0FFFFFFF00000000)) >> np.uint64(4))
    long = np.zeros(len(start), np.bool_)
    rest = np.flatnonzero(stops == 0)
    if len(rest):
        ninth, tenth = block.data[start[rest] + 8], block.data[start[rest] + 9]
        ten = ninth >= 0x80
        word[rest] |= (ninth & 0x7F).astype(np.uint64) << np.uint64(56)
        word[rest] |= np.where(ten, tenth & 1, 0).astype(np.uint64) << np.uint64(63)
        size[rest] = np.where(ten, _VARINT_BYTES, _VARINT_BYTES - 1)
        long[rest] = ten & (tenth > 1)
    odd = word & np.uint64(1)
    return ((word >> np.uint64(1)) ^ -odd).view(np.int64), size, long


def read_decimals(block: Block, start: Ints, length: npt.NDArray[Any], precision: int, words: int) -> tuple[Ints, Mask]:
    """Convert n decimals from big-endian two's complement of any length to the little-endian words of Arrow's decimals.

    Avro 1.12 specification, "Decimal". Zero bytes mean 0; superfluous leading sign bytes are accepted. Returns the
    unscaled values, shape (n, words), low word first, and which have too many digits (value 0).
    """
    size = length.astype(np.int64)
    longest = int(size.max(initial=0))
    limit = 10**precision
    out = np.empty((len(start), words), np.int64)
    if longest <= _WORD_BYTES:
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
        own = np.clip(size - _WORD_BYTES * k, 0, _WORD_BYTES)
        shift = 64 - 8 * own
        # If the value has no bytes in this word, its position may be outside the buffer.
        at = np.where(own > 0, stop - _WORD_BYTES * (k + 1), start)
        word = block.window("<u8", at).byteswap().view(np.int64)
        out[:, k] = np.where(own > 0, (word << (shift & 63)) >> (shift & 63), fill)
    too_wide: Mask = (out[:, -1] < 0) != (fill < 0)
    extra = np.maximum(size - _WORD_BYTES * words, 0)
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
