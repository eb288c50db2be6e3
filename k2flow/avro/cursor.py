"""One read position for each of many records in one buffer; each step moves all of them together.

The encodings are those of the Avro 1.12 specification, "Binary encoding".

A record with a defect, and a record for which a union's branch does not apply, goes on reading in a field of zeros
behind the buffer. Zeros are a value of every type (0, an empty text, the first branch, no items), so that all lanes
stay in step and none of them needs to be asked whether it is still alive.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.avro.defects import Faults, IgnoredFaults
from k2flow.records import Defect

Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint64]
Mask = npt.NDArray[np.bool_]

FRONT = 8
"""Zero bytes before the first record: the bytes of a number are read as a word, which may begin before them."""
SLACK = 16
"""Zero bytes behind the last one a plan can touch: a varint is read in one window of 8 bytes and two more."""
MAX_COUNT = 2**31 - 1
_FAR = 2**62
_VARINT_BYTES = 10


class Block:
    """The bytes of consecutive records, copied into one padded buffer, with the faults found in them.

    `first` is the number of the block's first row in its batch; `starts` where each payload begins in `data`.
    """

    def __init__(self, data: npt.NDArray[np.uint8], park: int, first: int, starts: Ints, faults: Faults) -> None:
        self.data = data
        self.park = park
        self.first = first
        self.starts = starts
        self.faults = faults
        self.buffer = pa.py_buffer(data)

    def window(self, dtype: str, at: Ints) -> npt.NDArray[Any]:
        """The value of type `dtype` that begins at each position, whatever its alignment."""
        kind = np.dtype(dtype)
        return np.ndarray((len(self.data) - kind.itemsize + 1,), kind, self.data, strides=(1,))[at]

    def parked(self, n: int) -> "Lanes":
        """N lanes that belong to no record and read zeros."""
        return Lanes(self, np.full(n, self.first), np.full(n, self.park), np.full(n, _FAR))

    @contextmanager
    def unnoted(self) -> Iterator[None]:
        """Within it lanes with a defect read zeros as ever, but no defect is noted."""
        faults, self.faults = self.faults, IgnoredFaults()
        try:
            yield
        finally:
            self.faults = faults

    def flag_content(self, at: Ints, defect: Defect, label: str, text: str) -> None:
        """Notes a defect of the bytes at `at`, which lie inside records."""
        own = np.searchsorted(self.starts, at, "right") - 1
        self.faults.flag(own + self.first, at - self.starts[own], defect, label, text)


class Lanes:
    """m read positions: the row each belongs to, the next byte to read, and the end of the record (in block.data)."""

    __slots__ = ("block", "end", "pos", "row")

    def __init__(self, block: Block, row: Ints, pos: Ints, end: Ints) -> None:
        self.block = block
        self.row = row
        self.pos = pos
        self.end = end

    def __len__(self) -> int:
        return len(self.pos)

    def pick(self, index: Ints | Mask) -> "Lanes":
        """A copy of some lanes."""
        return Lanes(self.block, self.row[index], self.pos[index], self.end[index])

    def put(self, index: Ints | Mask, part: "Lanes") -> None:
        """Moves some lanes to where `part`, picked from them, has got."""
        self.pos[index] = part.pos
        self.end[index] = part.end

    def idle(self, on: Mask) -> "Lanes":
        """A copy in which the lanes outside `on` read zeros."""
        park = self.block.park
        return Lanes(self.block, self.row, np.where(on, self.pos, park), np.where(on, self.end, _FAR))

    def resume(self, on: Mask, part: "Lanes") -> None:
        """Moves the lanes of `on` to where `part`, made by `idle(on)`, has got."""
        self.pos = np.where(on, part.pos, self.pos)
        self.end = np.where(on, part.end, self.end)

    def fault(self, bad: Mask, defect: Defect, at: Ints, label: str, text: str, *values: npt.NDArray[Any]) -> None:
        """Notes a defect at the bytes `at` of the lanes of `bad`, and lets them read zeros from here on."""
        index = np.flatnonzero(bad & (at < self.block.park))
        if not len(index):
            return
        row, block = self.row[index], self.block
        own = at[index] - block.starts[row - block.first]
        block.faults.flag(row, own, defect, label, text, *(value[index] for value in values))
        self.pos[index] = block.park
        self.end[index] = _FAR

    def advance(self, size: int, label: str, what: str) -> Ints:
        """Moves over `size` bytes; where they began. Lanes with fewer are truncated, and begin in the zeros."""
        start = self.pos
        self.pos = start + size
        over = self.pos > self.end
        if over.any():
            self.fault(over, Defect.TRUNCATED, start, label, what + " wanted at byte {at}, {0} left", self.end - start)
            start = np.where(over, self.block.park, start)
        return start

    def varint(self, label: str, what: str) -> Ints:
        """Reads an int or long: zig-zag, 7 bits a byte, least significant first; 0 where it is bad.

        Encodings longer than needed are accepted, as long as they have at most 10 bytes and 64 bits.
        """
        start = self.pos
        head = self.block.data[start]
        seen = int(np.bitwise_or.reduce(head))
        long = None
        if seen < 0x80:
            self.pos = start + 1
            value = (head >> 1).astype(np.int64)
            if seen & 1:
                np.invert(value, out=value, where=(head & 1).view(np.bool_))
        else:
            value, size, long = _wide_varint(self.block, start)
            self.pos = start + size
        over = self.pos > self.end
        if over.any():
            value[over] = 0
            self.fault(over, Defect.TRUNCATED, start, label, what + " wanted at byte {at}, {0} left", self.end - start)
        if long is not None and long.any():
            value[long] = 0
            text = what + " of more than 64 bits at byte {at}"
            self.fault(long & ~over, Defect.MALFORMED, start, label, text)
        return value

    def span(self, label: str) -> tuple[Ints, npt.NDArray[Any]]:
        """Reads a length and moves over so many bytes: where they begin, and the length; 0 where it is bad."""
        head = self.block.data[self.pos]
        if not int(np.bitwise_or.reduce(head)) & 0x81:
            # Every length is one byte and not negative: the common case, with one check for length and content.
            size = head >> 1
            start = self.pos + 1
            stop = start + size
            if not (stop > self.end).any():
                self.pos = stop
                return start, size
        at = self.pos
        length = self.varint(label, "a length")
        if (length < 0).any():
            bad = length < 0
            self.fault(bad, Defect.MALFORMED, at, label, "length {0} at byte {at}", length)
            length[bad] = 0
        start = self.pos
        over = length > self.end - start
        if over.any():
            text = "{0} bytes wanted at byte {at}, {1} left"
            self.fault(over, Defect.TRUNCATED, start, label, text, length, self.end - start)
            length[over] = 0
            start = np.where(over, self.block.park, start)
        self.pos = self.pos + length
        return start, length

    def block_count(self, width: int, label: str) -> Ints:
        """Reads how many items of at least `width` bytes an array's or map's next block holds; 0 ends it.

        A negative count is followed by the size of the block in bytes, for readers that skip it; it is not compared.
        """
        at = self.pos
        count = self.varint(label, "a block count")
        absurd = (count > MAX_COUNT) | (count < -MAX_COUNT)
        if absurd.any():
            self.fault(absurd, Defect.MALFORMED, at, label, "a block of {0} items at byte {at}", count)
            count[absurd] = 0
        sized = np.flatnonzero(count < 0)
        if len(sized):
            part = self.pick(sized)
            part.varint(label, "a block size")
            self.put(sized, part)
            count[sized] = np.where(part.pos < self.block.park, -count[sized], 0)
        if width and count.any():
            left = self.end - self.pos
            over = count > left // width
            if over.any():
                text = f"{{0}} items of at least {width} bytes wanted at byte {{at}}, {{1}} left"
                self.fault(over, Defect.TRUNCATED, self.pos, label, text, count, left)
                count[over] = 0
        return count


def _wide_varint(block: Block, start: Ints) -> tuple[Ints, Ints, Mask]:
    """Varints of any size: the values, their sizes in bytes, and which of them have more than 64 bits."""
    word = block.window("<u8", start)
    stops = ~word & np.uint64(0x8080808080808080)
    below = (stops & -stops) - np.uint64(1)  # all bits under the first stop bit; all 64 if there is none
    size = (np.bitwise_count(below).astype(np.int64) + 1) >> 3
    word &= below
    # The 7-bit groups are moved together in pairs, then in fours, then all eight.
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
