"""Exact detection of rows with a new id, against the ids in Gold and the rows accepted since."""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from k2flow.dedup.keys import WORDS, Bools, EncodedKeys, Ints, Words, encode_keys, owners_of_heads
from k2flow.dedup.sorted_runs import TAGS, SortedRun, SortedRuns, Tags, distinct_positions
from k2flow.errors import DedupError

_SORT_ROWS = 1 << 17  # ids encoded and sorted at once while an hour is loaded
_EVICTION_GROWTH = 1 << 21  # an eviction reads all ids: the next one waits for this many more ids, and an eighth


class SeenIds:
    """The ids of one exchange that one worker owns, for all hours in use.

    Guarantees, if `load` returns the ids in Gold and no other process adds ids of this worker to Gold:

    - Hot window: the `window_hours` up to and including the newest known hour, in Gold or in a row given here. Within
      it, no row is accepted whose id another row has, in Gold or accepted, even if their hours differ.
    - Outside the window, no row is ever accepted whose id another row of the same hour has.
    - A row is rejected only if its id is in Gold or was accepted here. So no id is lost.

    The guarantees hold across restarts, because Gold is the only state. Workers own disjoint sets of ids (see
    `owners_of`), so each worker is exact alone. An hour is a number of hours since 1970, of any sign and size.

    Memory: about 20 bytes per UUID, plus an eighth, plus 2 M ids. That holds the ids of all hours in the window, and of
    the hours used between the last two commits. While an hour is loaded, its ids take twice as much.
    """

    def __init__(
        self,
        load: Callable[[int], Iterable[pa.Array | pa.ChunkedArray]],
        newest_hour: int | None,
        window_hours: int = 24,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        """Create the index; nothing is loaded yet. Raises DedupError if an argument is out of range.

        `load` returns all ids of this exchange and of all workers that Gold now holds in an hour. The Arrow string
        arrays have any length. An hour may be loaded again after later commits. `newest_hour` is Gold's newest of this
        exchange; None if Gold has no row of it. `window_hours` is the length of the hot window, at least 1. `worker` is
        the number of this worker, 0 to workers - 1.
        """
        if window_hours < 1:
            raise DedupError(f"window_hours is {window_hours}: use at least 1")
        if not 0 <= worker < workers:
            raise DedupError(f"worker is {worker} of {workers} workers: use 0 to workers - 1")
        self._load, self._newest, self._window = load, newest_hour, window_hours
        self._worker, self._workers = worker, workers
        self._forms = [SortedRuns() for _ in WORDS]
        self._loaded: set[int] = set()  # every id of these hours, in Gold or accepted, is in the runs
        self._recent: set[int] = set()  # the hours of the rows given since the last commit
        self._ids_after_eviction = 0

    @property
    def ids(self) -> int:
        """The number of ids in memory; an id that Gold has in two hours counts twice."""
        return sum(len(runs) for runs in self._forms)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the ids."""
        return sum(runs.nbytes for runs in self._forms)

    @property
    def hours(self) -> frozenset[int]:
        """The loaded hours."""
        return frozenset(self._loaded)

    def accept_new(self, ids: pa.Array | pa.ChunkedArray, hours: Ints) -> Bools:
        """Accept the rows with new ids, remember these ids, and return the mask of accepted rows: (n,).

        An id is new if it is in no loaded hour and in no earlier row. First loads each hour of the hot window and of
        the rows. An accepted id stays until `on_commit`, and then as long as its hour is loaded. `ids` are n strings,
        `hours` (n,) the hour of each row.

        Raises DedupError if an id is null or belongs to another worker, or the lengths differ; and any error of `load`.
        No row is then accepted, the failed hour is not loaded, and the same rows may be passed again.
        """
        if len(ids) != len(hours):
            raise DedupError(f"{len(ids)} ids and {len(hours)} hours: pass one hour per id")
        forms = encode_keys(ids)
        if any(len(self._owned(form).rows) < len(form.rows) for form in forms):
            raise DedupError(f"an id belongs to another worker than {self._worker}: route each row by owners_of()")
        self._load_hours(set(np.unique(hours).tolist()))
        tags: Tags = (hours % TAGS).astype(np.uint16)
        accepted = np.zeros(len(ids), np.bool_)
        for runs, (rows, head, rest) in zip(self._forms, forms, strict=True):
            if len(rows):
                order = distinct_positions(head, rest)
                head, rest = head.take(order), rest.take(order, axis=0)
                new = np.flatnonzero(~runs.find(head, rest))
                rows = rows.take(order.take(new))
                accepted[rows] = True
                if len(new):
                    runs.add([SortedRun(head.take(new), rest.take(new, axis=0), tags.take(rows))])
        return accepted

    def on_commit(self) -> None:
        """Mark all accepted rows as committed to Gold, where `load` finds them, and evict hours no longer in use.

        Hours used since the last commit stay this time, because the next rows are likely to use them again.
        """
        in_use = self._in_use(self._newest, self._recent)
        self._recent = set()
        kept = self._ids_after_eviction
        if self.ids <= kept + kept // 8 + _EVICTION_GROWTH or self._loaded <= in_use:
            return
        # Runs store only the tags of hours. So hours of one tag are kept or evicted together, in the runs and in the
        # set of loaded hours: an hour counts as loaded exactly if its ids are in the runs.
        keep = np.zeros(TAGS, np.bool_)
        keep[[hour % TAGS for hour in in_use]] = True
        for runs in self._forms:
            runs.evict(keep)
        self._loaded = {hour for hour in self._loaded if keep[hour % TAGS]}
        self._ids_after_eviction = self.ids

    def _load_hours(self, hours: set[int]) -> None:
        """Load the window and the hours of the rows; record these hours only if all loads succeed."""
        known = hours if self._newest is None else hours | {self._newest}
        newest = max(known, default=None)
        for hour in sorted(self._in_use(newest, hours) - self._loaded):
            self._load_hour(hour)
        self._newest = newest
        self._recent |= hours

    def _in_use(self, newest: int | None, hours: set[int]) -> set[int]:
        return hours if newest is None else hours.union(range(newest - self._window + 1, newest + 1))

    def _owned(self, form: EncodedKeys) -> EncodedKeys:
        if self._workers == 1:
            return form
        mine = np.flatnonzero(owners_of_heads(form.head, self._workers) == self._worker)
        return EncodedKeys(form.rows.take(mine), form.head.take(mine), form.rest.take(mine, axis=0))

    def _load_hour(self, hour: int) -> None:
        """Add Gold's ids of an hour: all of them, or none if `load` raises."""
        loaded = [SortedRuns() for _ in WORDS]
        buffers = [_SortBuffer(hour) for _ in WORDS]
        for ids in self._load(hour):
            for a in range(0, len(ids), _SORT_ROWS):
                for runs, buffer, form in zip(loaded, buffers, encode_keys(ids.slice(a, _SORT_ROWS)), strict=True):
                    buffer.append(self._owned(form))
                    if buffer.size >= _SORT_ROWS:
                        runs.add(buffer.flush())
        for runs, new, buffer in zip(self._forms, loaded, buffers, strict=True):
            new.add(buffer.flush())
            runs.add(new)
        self._loaded.add(hour)


class _SortBuffer:
    def __init__(self, hour: int) -> None:
        self._tag = hour % TAGS
        self._clear()

    def append(self, form: EncodedKeys) -> None:
        if len(form.rows):
            self._heads.append(form.head)
            self._rests.append(form.rest)
            self.size += len(form.rows)

    def flush(self) -> list[SortedRun]:
        """Empty the buffer into one run of its distinct keys, or no run if it is empty."""
        if not self.size:
            return []
        head, rest = np.concatenate(self._heads), np.concatenate(self._rests)
        self._clear()
        order = distinct_positions(head, rest)
        return [SortedRun(head.take(order), rest.take(order, axis=0), np.full(len(order), self._tag, np.uint16))]

    def _clear(self) -> None:
        self._heads: list[Words] = []
        self._rests: list[Words] = []
        self.size = 0
