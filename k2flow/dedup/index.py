"""Which rows bring a message id for the first time, exactly: by the ids in Gold and those accepted since."""

from collections.abc import Callable, Iterable

import numpy as np
import pyarrow as pa

from k2flow.dedup.keys import WORDS, Bools, Ints, Keys, Words, keys, owner_of
from k2flow.dedup.runs import TAGS, Run, Runs, Tags, distinct
from k2flow.errors import DedupError

_SLAB = 1 << 17  # ids keyed and sorted at once while an hour is loaded
_SLACK = 1 << 21  # an eviction reads all ids: the next one waits until there are so many more, and an eighth


class SeenIds:
    """The ids of one exchange that one worker owns, of all the hours that matter.

    The guarantee, if `load` tells what Gold holds and nobody else adds ids of this worker to it:

    - Within the hot window, which is `window_hours` up to and including the newest hour known (Gold's or one
      seen here), no row is accepted whose id another row has, in Gold or accepted, whatever the two hours.
    - Beyond the window no row is accepted whose id another row of the same hour has, ever.
    - A row is refused only if its id is in Gold or was accepted here, so no id is lost.

    It holds across restarts, for Gold is all the state there is. Workers own disjoint sets of ids (see
    `owner`), so each is exact alone. An hour is a number of hours since 1970, of any sign and size.

    Memory: about 20 bytes an id that is a UUID, for the ids of the hours in the window and of those named
    between the last two commits, an eighth more, and 2 M ids more. Loading an hour takes as much again as
    the ids of that hour.
    """

    def __init__(
        self,
        load: Callable[[int], Iterable[pa.Array | pa.ChunkedArray]],
        newest_hour: int | None,
        window_hours: int = 24,
        worker: int = 0,
        workers: int = 1,
    ) -> None:
        """Loads nothing yet.

        load(hour): the ids, of all workers, that Gold holds of this exchange in that hour at the time of the
        call, as Arrow string arrays of any length. It may be asked for an hour again after later commits.
        newest_hour: Gold's newest hour of this exchange; None if it has no row of it.

        Raises DedupError if window_hours is less than 1, or worker is not one of 0 to workers - 1.
        """
        if window_hours < 1:
            raise DedupError(f"window_hours is {window_hours}: it must be 1 or more.")
        if not 0 <= worker < workers:
            raise DedupError(f"worker is {worker} of {workers}: it must be 0 or more, and less than workers.")
        self._load, self._newest, self._window = load, newest_hour, window_hours
        self._worker, self._workers = worker, workers
        self._forms = [Runs() for _ in WORDS]
        self._loaded: set[int] = set()  # every id of these hours, in Gold or accepted, is in the runs
        self._named: set[int] = set()  # the hours of the rows judged since the last commit
        self._kept = 0  # the number of ids that the last eviction left

    @property
    def ids(self) -> int:
        """The number of ids held; one that Gold has in two hours counts twice."""
        return sum(len(runs) for runs in self._forms)

    @property
    def nbytes(self) -> int:
        """The bytes of memory that the ids take."""
        return sum(runs.nbytes for runs in self._forms)

    @property
    def hours(self) -> frozenset[int]:
        """The hours that are loaded."""
        return frozenset(self._loaded)

    def first_seen(self, ids: pa.Array | pa.ChunkedArray, hours: Ints) -> Bools:
        """Which of n rows are accepted, (n,): those whose id is in no loaded hour and in no earlier row.

        ids: n strings; hours: (n,), the hour of each row. Every hour of the hot window and every hour named
        here is loaded first. An accepted row is held until `commit`, and then as long as its hour is loaded.

        Raises DedupError if an id is null or belongs to another worker, or the lengths differ, and whatever
        `load` raises. Then no row is accepted, the hour that failed is not loaded, and the same rows may be
        given again.
        """
        if len(ids) != len(hours):
            raise DedupError(f"There are {len(ids)} ids and {len(hours)} hours: each id needs one hour.")
        forms = keys(ids)
        if any(len(self._owned(form).rows) < len(form.rows) for form in forms):
            raise DedupError(f"An id is not worker {self._worker}'s: send each row to the owner() of its id.")
        self._see(set(np.unique(hours).tolist()))
        tags: Tags = (hours % TAGS).astype(np.uint16)
        first = np.zeros(len(ids), np.bool_)
        for runs, (rows, head, rest) in zip(self._forms, forms, strict=True):
            if len(rows):
                order = distinct(head, rest)
                head, rest = head.take(order), rest.take(order, axis=0)
                new = np.flatnonzero(~runs.find(head, rest))
                rows = rows.take(order.take(new))
                first[rows] = True
                if len(new):
                    runs.add([Run(head.take(new), rest.take(new, axis=0), tags.take(rows))])
        return first

    def commit(self) -> None:
        """Says that all rows accepted so far are in Gold, where `load` finds them.

        So hours out of use may be evicted. Those named since the last commit are in use this time, since the
        rows that come next are likely to name them again.
        """
        in_use = self._in_use(self._newest, self._named)
        self._named = set()
        if self.ids <= self._kept + self._kept // 8 + _SLACK or self._loaded <= in_use:
            return
        # The runs know only the tags of hours. So the hours of one tag stay or go together, in the runs and
        # among the loaded ones alike: an hour counts as loaded exactly if its ids are there.
        keep = np.zeros(TAGS, np.bool_)
        keep[[hour % TAGS for hour in in_use]] = True
        for runs in self._forms:
            runs.evict(keep)
        self._loaded = {hour for hour in self._loaded if keep[hour % TAGS]}
        self._kept = self.ids

    def _see(self, named: set[int]) -> None:
        """Loads what rows of these hours need; only then do they count as named."""
        known = named if self._newest is None else named | {self._newest}
        newest = max(known, default=None)
        for hour in sorted(self._in_use(newest, named) - self._loaded):
            self._load_hour(hour)
        self._newest = newest
        self._named |= named

    def _in_use(self, newest: int | None, named: set[int]) -> set[int]:
        return named if newest is None else named.union(range(newest - self._window + 1, newest + 1))

    def _owned(self, form: Keys) -> Keys:
        """The keys that this worker owns."""
        if self._workers == 1:
            return form
        mine = np.flatnonzero(owner_of(form.head, self._workers) == self._worker)
        return Keys(form.rows.take(mine), form.head.take(mine), form.rest.take(mine, axis=0))

    def _load_hour(self, hour: int) -> None:
        """Takes in Gold's ids of an hour: all of them, or none if `load` raises."""
        staged = [Runs() for _ in WORDS]
        waiting = [_Slab(hour) for _ in WORDS]
        for ids in self._load(hour):
            for a in range(0, len(ids), _SLAB):
                for runs, slab, form in zip(staged, waiting, keys(ids.slice(a, _SLAB)), strict=True):
                    slab.append(self._owned(form))
                    if slab.size >= _SLAB:
                        runs.add(slab.runs())
        for runs, loaded, slab in zip(self._forms, staged, waiting, strict=True):
            loaded.add(slab.runs())
            runs.add(loaded)
        self._loaded.add(hour)


class _Slab:
    """Keys of one form and one hour that wait to be sorted."""

    def __init__(self, hour: int) -> None:
        self._tag = hour % TAGS
        self._clear()

    def append(self, form: Keys) -> None:
        if len(form.rows):
            self._heads.append(form.head)
            self._rests.append(form.rest)
            self.size += len(form.rows)

    def runs(self) -> list[Run]:
        """One run of the different keys, or none; it leaves the slab empty."""
        if not self.size:
            return []
        head, rest = np.concatenate(self._heads), np.concatenate(self._rests)
        self._clear()
        order = distinct(head, rest)
        return [Run(head.take(order), rest.take(order, axis=0), np.full(len(order), self._tag, np.uint16))]

    def _clear(self) -> None:
        self._heads: list[Words] = []
        self._rests: list[Words] = []
        self.size = 0
