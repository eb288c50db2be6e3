"""Reads the items of arrays and maps: blocks of a count and that number of items, until a count of 0.

Avro 1.12 specification, "Arrays" and "Maps". Each step reads one item of every record that has one left. A few records
with very many items would take as many steps, and each step costs as much as one for all records. Their remaining items
are therefore decoded speculatively: as if an item began at every single byte. Then the chain of real items is followed.
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
    open_ = np.flatnonzero(counts)
    if not len(open_):
        return counts, read(lanes.take(open_))
    left, part = counts[open_], lanes.take(open_)
    collector = _ItemCollector(len(lanes))
    steps = 0
    while len(open_):
        defects = len(lanes.block.defects)
        if can_speculate and steps >= _STEPS_BEFORE_SPECULATION and len(open_) <= _MAX_SPECULATIVE_LANES:
            for i in range(len(open_)):
                left[i] = _read_speculatively(part, i, int(left[i]), read, min_size, label, collector, open_)
        more = np.flatnonzero(left)
        if len(more) == len(left):
            collector.add(open_, read(part))
            left = left - 1
        elif len(more):
            rest = part.take(more)
            collector.add(open_[more], read(rest))
            part.put(more, rest)
            left[more] -= 1
        if len(lanes.block.defects) != defects:
            left[part.pos >= lanes.block.padding_start] = 0
        done = np.flatnonzero(left == 0)
        if len(done):
            rest = part.take(done)
            left[done] = rest.read_block_count(min_size, label)
            part.put(done, rest)
            lanes.put(open_, part)
            on = np.flatnonzero(left)
            open_, left, part = open_[on], left[on], part.take(on)
        steps += 1
    return collector.result()


class _ItemCollector:
    """Collects items in the order of reading, and sorts them by lane."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._owners: list[Ints] = []
        self._items: list[Column] = []

    def add(self, owners: Ints, items: Column) -> None:
        self._owners.append(owners)
        self._items.append(items)

    def result(self) -> tuple[Ints, Column]:
        """Return the number of items of each lane, and all items, lane by lane."""
        items = concat(self._items)
        owners = np.concatenate(self._owners)
        counts = np.bincount(owners, minlength=self._lanes)
        if len(self._owners) == 1:
            return counts, items
        # numpy sorts 16-bit numbers by radix sort, which is much faster than by comparison.
        small = owners.astype(np.uint16) if self._lanes <= 1 << 16 else owners
        return counts, items.take(np.argsort(small, kind="stable"))


def _read_speculatively(
    part: Lanes, i: int, left: int, read: ReadItem, min_size: int, label: str, collector: _ItemCollector, owners: Ints
) -> int:
    """Read items of lane i of `part`, up to a defect or the end of the speculative window.

    Args:
        part: The lanes with open blocks; lane i advances.
        i: The lane to read.
        left: The items left in its current block.
        read: Reads one item per lane.
        min_size: The smallest size of an item in bytes.
        label: The field, for details of defects.
        collector: Receives the items.
        owners: The owner of each lane, for `collector`.

    Returns:
        The items left in the block that lane i has reached.
    """
    block, start = part.block, int(part.pos[i])
    n = min(_SPECULATIVE_BYTES, int(part.end[i]) - start)
    if n <= 0:
        return left
    at = np.arange(start, start + n)
    guess = Lanes(block, np.full(n, part.row[i]), at, np.full(n, part.end[i]))
    header = guess.take(at - start)
    with block.discarding_defects():
        items = read(guess)
        counts = header.read_block_count(min_size, label).tolist()
    limit = block.padding_start - start
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
            break  # the end of the array or a defect; the caller's next step handles both
    collector.add(np.full(len(chain), owners[i]), items.take(np.array(chain, np.int64)))
    part.pos[i] = start + at_byte
    return left


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
