"""Reads the items of arrays and maps: blocks of a count and that number of items, until a count of 0.

Avro 1.12 specification, "Arrays" and "Maps". Each step reads one item of every record that has one left. A step costs
as much for a few records as for all, so a few records with very many items would be slow. Their remaining items are
therefore decoded speculatively: as if an item began at every single byte. Then the chain of real items is followed.
Items that hold arrays or maps are never decoded speculatively, because wrong guesses could cost more than they save. So
one record with very many such items takes about 30 us per item.
"""

from collections.abc import Callable

import numpy as np

from k2flow.avro.columns import Column, concat
from k2flow.avro.cursor import Ints, Lanes
from k2flow.records import Defect

MAX_EMPTY_ITEMS = 1024
"""The limit of items without bytes (null, a record without fields) in an array; more are malformed."""
_STEPS_BEFORE_SPECULATION = 64
_MAX_SPECULATIVE_LANES = 64
_SPECULATIVE_BYTES = 1 << 14
ReadItem = Callable[[Lanes], Column]


def read_items(lanes: Lanes, read: ReadItem, min_size: int, can_speculate: bool, label: str) -> tuple[Ints, Column]:
    """Return the number of items of each lane's array or map, and the column of all items, lane by lane.

    `min_size` is the smallest size of an item in bytes; `can_speculate` is that of the item's node.
    """
    if not min_size:
        return _read_empty_items(lanes, read, label)
    counts = lanes.read_block_count(min_size, label)
    if not counts.any():
        return counts, read(lanes.take(np.zeros(0, np.int64)))
    return _ItemReader(lanes, counts, read, min_size, label).read_all(can_speculate)


class _ItemReader:
    """Reads the items of all lanes, one item of each lane per step, and sorts them by lane."""

    def __init__(self, lanes: Lanes, counts: Ints, read: ReadItem, min_size: int, label: str) -> None:
        self._lanes, self._block = lanes, lanes.block
        self._read, self._min_size, self._label = read, min_size, label
        self._open = np.flatnonzero(counts)  # the lanes with an open block
        self._left = counts[self._open]  # the items left in the block of each
        self._part = lanes.take(self._open)
        self._owners: list[Ints] = []  # the lane of each item
        self._items: list[Column] = []

    def read_all(self, can_speculate: bool) -> tuple[Ints, Column]:
        """Return the number of items of each lane, and all items, lane by lane."""
        steps = 0
        while len(self._open):
            defects = len(self._block.defects)
            if can_speculate and steps >= _STEPS_BEFORE_SPECULATION and len(self._open) <= _MAX_SPECULATIVE_LANES:
                for i in range(len(self._open)):
                    self._read_speculatively(i)
            self._read_one_item()
            if len(self._block.defects) != defects:
                self._left[self._part.pos >= self._block.padding_start] = 0
            self._open_next_blocks()
            steps += 1
        return self._sorted_by_lane()

    def _read_one_item(self) -> None:
        more = np.flatnonzero(self._left)
        if len(more) == len(self._left):
            self._collect(self._open, self._read(self._part))
            self._left -= 1
        elif len(more):
            rest = self._part.take(more)
            self._collect(self._open[more], self._read(rest))
            self._part.put(more, rest)
            self._left[more] -= 1

    def _open_next_blocks(self) -> None:
        done = np.flatnonzero(self._left == 0)
        if not len(done):
            return
        rest = self._part.take(done)
        self._left[done] = rest.read_block_count(self._min_size, self._label)
        self._part.put(done, rest)
        self._lanes.put(self._open, self._part)
        more = np.flatnonzero(self._left)
        self._open, self._left, self._part = self._open[more], self._left[more], self._part.take(more)

    def _read_speculatively(self, i: int) -> None:
        """Read items of the open lane i, up to a defect, the array's end or the speculative window's end."""
        part, start, left = self._part, int(self._part.pos[i]), int(self._left[i])
        n = min(_SPECULATIVE_BYTES, int(part.end[i]) - start)
        if n <= 0:
            return
        at = np.arange(start, start + n)
        guess = Lanes(self._block, np.full(n, part.row[i]), at, np.full(n, part.end[i]))
        header = guess.take(at - start)
        with self._block.discarding_defects():
            items = self._read(guess)
            counts = header.read_block_count(self._min_size, self._label).tolist()
        limit = self._block.padding_start - start
        after_item, after_header = (guess.pos - start).tolist(), (header.pos - start).tolist()
        chain: list[int] = []
        at_byte = 0
        while at_byte < n:
            if left:
                if after_item[at_byte] >= limit:
                    break
                chain.append(at_byte)
                at_byte = after_item[at_byte]
                left -= 1
            elif counts[at_byte]:
                left = counts[at_byte]
                at_byte = after_header[at_byte]
            else:
                break  # the end of the array or a defect; the next regular step handles both
        self._collect(np.full(len(chain), self._open[i]), items.take(np.array(chain, np.int64)))
        part.pos[i], self._left[i] = start + at_byte, left

    def _collect(self, owners: Ints, items: Column) -> None:
        self._owners.append(owners)
        self._items.append(items)

    def _sorted_by_lane(self) -> tuple[Ints, Column]:
        items = concat(self._items)
        owners = np.concatenate(self._owners)
        counts = np.bincount(owners, minlength=len(self._lanes))
        if len(self._owners) == 1:
            return counts, items
        # numpy sorts 16-bit numbers by radix sort, which is much faster than by comparison.
        small = owners.astype(np.uint16) if len(self._lanes) <= 1 << 16 else owners
        return counts, items.take(np.argsort(small, kind="stable"))


def _read_empty_items(lanes: Lanes, read: ReadItem, label: str) -> tuple[Ints, Column]:
    """Read items without bytes: only their counts are encoded."""
    counts = np.zeros(len(lanes), np.int64)
    open_, part = np.arange(len(lanes)), lanes.take(np.arange(len(lanes)))
    while len(open_):
        at = part.pos
        more = part.read_block_count(0, label)
        over = counts[open_] + more > MAX_EMPTY_ITEMS
        if over.any():
            text = f"more than {MAX_EMPTY_ITEMS} items without bytes at byte {{at}}"
            part.reject(over, Defect.MALFORMED, at, label, text)
            more[over] = 0
        counts[open_] += more
        lanes.put(open_, part)
        on = np.flatnonzero(more)
        open_, part = open_[on], part.take(on)
    return counts, read(lanes.block.inactive_lanes(int(counts.sum())))
