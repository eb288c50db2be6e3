"""Sorted runs of encoded keys: 16 bytes per key of two words, 2 for its hour, 1-2 for the directory.

An hour is stored as its tag: the hour modulo 65,536 (7.5 years). Eviction works on tags, see index.py.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from k2flow.dedup.keys import Bools, Ints, Share, Words, share_of
from k2flow.dedup.merging import merged, record_type
from k2flow.dedup.run_file import Records

Tags = npt.NDArray[np.uint16]
TAGS = 1 << 16  # the number of distinct tags
WHOLE = share_of(0, 1)
_CHUNK = 1 << 16  # keys moved at once by merge and evict
_KEYS_PER_CELL = 3
_SIZE_RATIO = 8  # a run has at least this many times the keys of the next one


def distinct_positions(head: Words, rest: Words) -> Ints:
    """Return the first position of each distinct key: (m,), by ascending head. head: (n,); rest: (n, w)."""
    order = np.argsort(head)
    ordered = head.take(order)
    tied = ordered[1:] == ordered[:-1]
    if not tied.any():
        return order
    # Sort equal heads by rest and position: equal keys become adjacent, the earliest first.
    at = np.flatnonzero(np.append(tied, False) | np.append(False, tied))
    some = order[at]
    some = some[np.lexsort((some, *rest[some].T, head[some]))]
    order[at] = some
    same = (rest[some[1:]] == rest[some[:-1]]).all(axis=1) & tied[at[1:] - 1]
    return np.delete(order, at[1:][same])


class SortedRun:
    """Keys by ascending head, duplicates allowed, each with the tag of its hour.

    A directory holds, for each of the equal cells of a worker's share, the position of its first key. So a lookup takes
    about 3 reads in a run of any size. It is built for the first lookup. The run owns its arrays: no other reference
    may exist.
    """

    def __init__(self, head: Words, rest: Words, tags: Tags, share: Share = WHOLE) -> None:
        """Take ownership of head: (n,) ascending, n > 0; rest: (n, w); tags: (n,). They are resized in place.

        All heads, those asked for too, are in `share`.
        """
        self._head, self._rest, self._tags, self._share = head, rest, tags, share
        self._built: npt.NDArray[np.uint32] | None = None

    def __len__(self) -> int:
        return len(self._head)

    @property
    def words(self) -> int:
        """The number of words of a key."""
        return 1 + int(self._rest.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of memory, including the directory."""
        return self._head.nbytes + self._rest.nbytes + self._tags.nbytes + self._directory.nbytes

    def find(self, head: Words, rest: Words) -> Bools:
        """Return which of m keys are in the run: (m,). Faster if head is ascending, thanks to CPU caches."""
        hit = np.zeros(len(head), np.bool_)
        row = np.arange(len(head))
        directory = self._directory
        place = directory.take(self._share.cells(head, len(directory) - 1)).astype(np.int64)
        last = len(self) - 1
        while len(row):
            here = self._head.take(place, mode="clip")  # past the end, clip gives the last head, which is less
            on = (here <= head) & (place < last)
            same = np.flatnonzero(here == head)
            if len(same):
                equal = self._rest.take(place[same], axis=0) == rest.take(row[same], axis=0)
                found = same[equal.all(axis=1)]
                hit[row[found]] = True
                on[found] = False
            go = np.flatnonzero(on)
            row, place, head = row.take(go), place.take(go) + 1, head.take(go)
        return hit

    def merge(self, other: "SortedRun") -> None:
        """Merge another run into this one; the other must not be used afterwards.

        Works in place, chunk by chunk from the end, so it needs no more memory than the result.
        """
        old, new = len(self), len(other)  # the keys of each that are still to be placed
        self._resize(old + new)
        while new:
            a = max(0, old - _CHUNK)
            b = int(other._head[:new].searchsorted(self._head[a])) if a else 0
            to = self._head[a:old].searchsorted(other._head[b:new]) + np.arange(new - b)
            free = np.ones(old - a + new - b, np.bool_)
            free[to] = False
            moved = np.flatnonzero(free)
            for mine, theirs in zip(self._columns(), other._columns(), strict=True):
                out, before = mine[a + b : old + new], mine[a:old].copy()
                out[moved] = before
                out[to] = theirs[b:new]
            old, new = a, b

    def evict(self, keep: Bools) -> None:
        """Remove each key whose tag t has keep[t] False; keep: (TAGS,). In place; the run may become empty."""
        end = 0
        for a in range(0, len(self), _CHUNK):
            stay = np.flatnonzero(keep.take(self._tags[a : a + _CHUNK]))
            for column in self._columns():
                column[end : end + len(stay)] = column[a : a + _CHUNK].take(stay)
            end += len(stay)
        self._resize(end)

    def heads(self, step: int) -> Words:
        """Return the head at every `step`-th position."""
        return self._head[::step].copy()

    def positions(self, bounds: Words) -> Ints:
        """Return the position of the first head that is at least each bound."""
        return self._head.searchsorted(bounds)

    def records(self, first: int, end: int) -> Records:
        """Return the keys at the positions from `first` to before `end`."""
        found = np.empty(end - first, record_type(self.words))
        found["head"], found["rest"] = self._head[first:end], self._rest[first:end]
        found["tag"] = self._tags[first:end]
        return found

    def _columns(self) -> Iterator[npt.NDArray[Any]]:
        yield self._head
        yield from self._rest.T
        yield self._tags

    def _resize(self, size: int) -> None:
        # Uses realloc, which remaps a large block instead of copying it. No view outlives the loops above, but the
        # reference check would fail because of the frames that hold the arrays.
        self._head.resize(size, refcheck=False)
        self._rest.resize((size, self._rest.shape[1]), refcheck=False)
        self._tags.resize(size, refcheck=False)
        self._built = None

    @property
    def _directory(self) -> npt.NDArray[np.uint32]:
        if self._built is None:
            cells = max(16, len(self) // _KEYS_PER_CELL)
            self._built = np.zeros(cells + 1, np.uint32)
            for a in range(0, len(self), _CHUNK):
                cell = self._share.cells(self._head[a : a + _CHUNK], cells)
                count = np.bincount(cell - cell[0])
                self._built[cell[0] + 1 : cell[0] + 1 + len(count)] += count.astype(np.uint32)
            np.cumsum(self._built, out=self._built)
        return self._built


def joined(runs: Sequence[SortedRun], share: Share, threads: int) -> SortedRun:
    """Return one run of the keys of some, which must not be used afterwards. For a moment, memory holds them twice."""
    if len(runs) == 1:
        return runs[0]
    size = sum(map(len, runs))
    head, rest, tags = (
        np.empty(size, np.uint64),
        np.empty((size, runs[0].words - 1), np.uint64),
        np.empty(size, np.uint16),
    )
    at = 0
    for records in merged(runs, threads):
        end = at + len(records)
        head[at:end], rest[at:end], tags[at:end] = records["head"], records["rest"], records["tag"]
        at = end
    return SortedRun(head, rest, tags, share)


class SortedRuns:
    """A growing multiset of keys of one form, as a few runs.

    Each run is at least 8 times the size of the next one, so adding stays cheap.
    Source: J. Bentley, J. Saxe, Decomposable searching problems I: static-to-dynamic transformation, 1980.
    """

    def __init__(self) -> None:
        self._runs: list[SortedRun] = []

    def __iter__(self) -> Iterator[SortedRun]:
        return iter(self._runs)

    def __len__(self) -> int:
        return sum(len(run) for run in self._runs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of all runs."""
        return sum(run.nbytes for run in self._runs)

    def find(self, head: Words, rest: Words) -> Bools:
        """Return which of m keys are in any run: (m,). Faster if head is ascending."""
        hit = np.zeros(len(head), np.bool_)
        for run in self._runs:
            hit |= run.find(head, rest)
        return hit

    def add(self, runs: Iterable[SortedRun]) -> None:
        """Add runs, which must not be used afterwards."""
        for run in runs:
            if len(run):
                self._runs.append(run)
            while len(self._runs) > 1 and len(self._runs[-1]) * _SIZE_RATIO > len(self._runs[-2]):
                smaller = self._runs.pop()
                self._runs[-1].merge(smaller)

    def clear(self) -> None:
        """Remove all keys."""
        self._runs.clear()

    def evict(self, keep: Bools) -> None:
        """Remove each key whose tag t has keep[t] False; keep: (TAGS,)."""
        for run in self._runs:
            run.evict(keep)
        left, self._runs = self._runs, []
        self.add(sorted(left, key=len, reverse=True))
