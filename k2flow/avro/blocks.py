"""The items of arrays and maps: blocks of a count and so many items, until a count of 0.

Avro 1.12 specification, "Arrays" and "Maps". Each step reads one item of every record that has one left. A few records
with very many items would make as many steps, each as dear as one for all records: what they have left is read ahead
instead, as if an item began at every single byte, and then the chain of the items that do begin there is followed.
Only items that hold arrays or maps themselves are not: guesses at these could cost more than they save, so one record
with a great many of them takes some 30 us for each.
"""

from collections.abc import Callable

import numpy as np

from k2flow.avro.columns import Column, join
from k2flow.avro.cursor import Ints, Lanes
from k2flow.records import Defect

MAX_EMPTY_ITEMS = 1024
"""How many items that take no bytes (null, a record without fields) an array may hold; more are malformed."""
_STEPS = 64
_FEW = 64
_AHEAD = 1 << 14

Read = Callable[[Lanes], Column]


def read_items(lanes: Lanes, read: Read, width: int, flat: bool, label: str) -> tuple[Ints, Column]:
    """How many items each lane's array or map has, and all items, lane by lane.

    `width` is the smallest size of an item in bytes; `flat` says that items hold no arrays or maps.
    """
    if not width:
        return _read_empty_items(lanes, read, label)
    counts = lanes.block_count(width, label)
    open_ = np.flatnonzero(counts)
    if not len(open_):
        return counts, read(lanes.pick(open_))
    left, part = counts[open_], lanes.pick(open_)
    taken = _Taken(len(lanes))
    steps = 0
    while len(open_):
        faults = len(lanes.block.faults)
        if flat and steps >= _STEPS and len(open_) <= _FEW:
            for i in range(len(open_)):
                left[i] = _read_ahead(part, i, int(left[i]), read, width, label, taken, open_)
        more = np.flatnonzero(left)
        if len(more) == len(left):
            taken.add(open_, read(part))
            left = left - 1
        elif len(more):
            rest = part.pick(more)
            taken.add(open_[more], read(rest))
            part.put(more, rest)
            left[more] -= 1
        if len(lanes.block.faults) != faults:
            left[part.pos >= lanes.block.park] = 0
        done = np.flatnonzero(left == 0)
        if len(done):
            rest = part.pick(done)
            left[done] = rest.block_count(width, label)
            part.put(done, rest)
            lanes.put(open_, part)
            on = np.flatnonzero(left)
            open_, left, part = open_[on], left[on], part.pick(on)
        steps += 1
    return taken.result()


class _Taken:
    """Items in the order in which they were read, to be put into the order of their lanes."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._owners: list[Ints] = []
        self._items: list[Column] = []

    def add(self, owners: Ints, items: Column) -> None:
        self._owners.append(owners)
        self._items.append(items)

    def result(self) -> tuple[Ints, Column]:
        items = join(self._items)
        owners = np.concatenate(self._owners)
        counts = np.bincount(owners, minlength=self._lanes)
        if len(self._owners) == 1:
            return counts, items
        # numpy sorts 16-bit numbers by their digits, which is much faster than by comparing them.
        small = owners.astype(np.uint16) if self._lanes <= 1 << 16 else owners
        return counts, items.take(np.argsort(small, kind="stable"))


def _read_ahead(part: Lanes, i: int, left: int, read: Read, width: int, label: str, taken: _Taken, owners: Ints) -> int:
    """Reads items of lane i of `part`, `left` of them in this block, as far as they are good and near.

    Returns how many are then left in the block the lane has got to.
    """
    block, start = part.block, int(part.pos[i])
    n = min(_AHEAD, int(part.end[i]) - start)
    if n <= 0:
        return left
    at = np.arange(start, start + n)
    guess = Lanes(block, np.full(n, part.row[i]), at, np.full(n, part.end[i]))
    header = guess.pick(at - start)
    with block.unnoted():
        items = read(guess)
        counts = header.block_count(width, label).tolist()
    good, after, after_header = block.park - start, (guess.pos - start).tolist(), (header.pos - start).tolist()
    chain: list[int] = []
    at_byte = 0
    while at_byte < n:
        if left:
            if after[at_byte] >= good:
                break
            chain.append(at_byte)
            at_byte = after[at_byte]
            left -= 1
        elif counts[at_byte]:
            left = counts[at_byte]
            at_byte = after_header[at_byte]
        else:
            break  # the end, or a defect: both are for the ordinary step
    taken.add(np.full(len(chain), owners[i]), items.take(np.array(chain, np.int64)))
    part.pos[i] = start + at_byte
    return left


def _read_empty_items(lanes: Lanes, read: Read, label: str) -> tuple[Ints, Column]:
    """Items that take no bytes: there is nothing to read but the counts."""
    counts = np.zeros(len(lanes), np.int64)
    open_, part = np.arange(len(lanes)), lanes.pick(np.arange(len(lanes)))
    while len(open_):
        at = part.pos
        more = part.block_count(0, label)
        over = counts[open_] + more > MAX_EMPTY_ITEMS
        if over.any():
            text = f"more than {MAX_EMPTY_ITEMS} items without any bytes at byte {{at}}"
            part.fault(over, Defect.MALFORMED, at, label, text)
            more[over] = 0
        counts[open_] += more
        lanes.put(open_, part)
        on = np.flatnonzero(more)
        open_, part = open_[on], part.pick(on)
    return counts, read(lanes.block.parked(int(counts.sum())))
