"""Exact detection of rows with a new id, against the ids in Gold and the rows accepted since."""

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from heapq import nsmallest

import numpy as np

from k2flow.dedup.keys import WORDS, Bools, Ids, Ints, encode_keys, share_of
from k2flow.dedup.loading import LoadedHours, sorted_parts
from k2flow.dedup.sorted_runs import TAGS, SortedRun, SortedRuns, Tags, distinct_positions
from k2flow.dedup.window import DiskWindow
from k2flow.errors import DedupError

MAX_WINDOW_HOURS = 1024  # of the windows of one batch, unless one window alone is longer
_EVICTION_GROWTH = 1 << 21  # an eviction reads all ids: the next one waits for this many more ids, and an eighth


class SeenIds:
    """The ids of one exchange that one worker owns, for all hours in use.

    Guarantees, if `load` returns the ids in Gold and no other process adds ids of this worker to Gold:

    - A window belongs to each Kafka hour of a batch. It lies around the newest hour of a row, in Gold or given here,
      that is not after this Kafka hour: less than `window_hours` before or after it. One more window lies around the
      hour with the most rows of the batch. No row of the batch is accepted
      whose id another row has, in Gold or accepted, in one of the batch's windows.
    - No row is ever accepted whose id another row of the same hour has.
    - A row is rejected only if its id is in Gold or was accepted here. So no id is lost.

    Rows ahead of Kafka's time, or with a wrong Kafka time, only add a window: they move no other message's window.
    Everything depends on the batch and on Gold alone, not on the clock or on earlier batches. So the guarantees hold
    across restarts. Workers own disjoint sets of ids (see `owners_of`), so each worker is exact alone. An hour is a
    number of hours since 1970, of any sign and size.

    Memory: about 20 bytes per UUID, plus an eighth, plus 2 M ids. That holds the ids of all hours of rows and windows
    between the last two commits. The windows of one batch cover at most MAX_WINDOW_HOURS, or one window, chosen by the
    number of messages. While an hour is loaded, its ids take twice as much. With a `DiskWindow`, about 2 bytes per id,
    and 20 for those since its last spill.
    """

    def __init__(
        self,
        load: Callable[[Sequence[int]], Iterable[tuple[int, Iterable[Ids]]]],
        newest_hours: Callable[[Sequence[int]], Sequence[int | None]],
        window_hours: int = 24,
        worker: int = 0,
        workers: int = 1,
        disk: DiskWindow | None = None,
    ) -> None:
        """Create the index; nothing is loaded yet. Raises DedupError if an argument is out of range.

        `load` yields, for each of some hours in order, all ids of this exchange and of all workers that Gold now holds
        in it. The Arrow string arrays have any length. An hour may be loaded again after later commits. `newest_hours`
        returns, for each of some hours, the newest one up to it in which Gold has a row of this exchange, or None.
        `window_hours` is the length of a window before and including its newest row, at least 1. `worker` is the number
        of this worker, 0 to workers - 1. With `disk`, pass its `load`.
        """
        if window_hours < 1:
            raise DedupError(f"window_hours is {window_hours}: use at least 1")
        if not 0 <= worker < workers:
            raise DedupError(f"worker is {worker} of {workers} workers: use 0 to workers - 1")
        self._load, self._newest_hours, self._window = load, newest_hours, window_hours
        self._worker, self._workers, self._share, self._disk = worker, workers, share_of(worker, workers), disk
        self._forms = [SortedRuns() for _ in WORDS]
        self._loaded: set[int] = set()  # every id of these hours, in Gold or accepted, is in the runs
        self._current: set[int] = set()  # the hours of the last windows
        # Since the last commit:
        self._accepted: set[int] = set()  # the hours of the accepted rows
        self._recent: set[int] = set()  # the hours of all rows and windows
        self._asked: set[int] = set()  # the Kafka hours
        self._of_gold: dict[int, int | None] = {}  # by Kafka hour, of two commits: Gold's newest hour up to it
        self._ids_after_eviction = 0

    @property
    def ids(self) -> int:
        """The number of ids, in memory and on disk; an id that Gold has in two hours counts twice."""
        return self._memory_ids + (self._disk.ids if self._disk else 0)

    @property
    def nbytes(self) -> int:
        """Bytes of memory of the ids."""
        return sum(runs.nbytes for runs in self._forms) + (self._disk.nbytes if self._disk else 0)

    @property
    def hours(self) -> frozenset[int]:
        """The loaded hours."""
        return frozenset(self._loaded)

    def accept_new(self, ids: Ids, hours: Ints, kafka_hours: Mapping[int, int]) -> Bools:
        """Accept the rows with new ids, remember these ids, and return the mask of accepted rows: (n,).

        An id is new if it is in no loaded hour and in no earlier row. First loads each hour of the windows and of the
        rows. An accepted id stays until `on_commit`, and then as long as its hour is loaded. `ids` are n strings,
        `hours` (n,) the hour of each row. `kafka_hours` has the hours of Kafka's time in the batch, each with its
        number of messages.

        Raises DedupError if an id is null or belongs to another worker, or the lengths differ; and any error of `load`
        and `newest_hours`. No row is then accepted, the failed hour is not loaded, and the same rows may be passed
        again.
        """
        if len(ids) != len(hours):
            raise DedupError(f"{len(ids)} ids and {len(hours)} hours: pass one hour per id")
        forms = encode_keys(ids)
        if self._workers > 1 and not all(self._share.holds(form.head).all() for form in forms):
            raise DedupError(f"an id belongs to another worker than {self._worker}: route each row by owners_of()")
        self._load_hours(
            dict(zip(*map(np.ndarray.tolist, np.unique(hours, return_counts=True)), strict=True)), kafka_hours
        )
        tags: Tags = (hours % TAGS).astype(np.uint16)
        accepted = np.zeros(len(ids), np.bool_)
        for form, (runs, (rows, head, rest)) in enumerate(zip(self._forms, forms, strict=True)):
            if len(rows):
                order = distinct_positions(head, rest)
                head, rest, rows = head.take(order), rest.take(order, axis=0), rows.take(order)
                new = np.flatnonzero(~runs.find(head, rest))
                if self._disk and len(new):
                    new = new[~self._disk.find(form, head.take(new), rest.take(new, axis=0))]
                rows = rows.take(new)
                accepted[rows] = True
                if len(new):
                    runs.add([SortedRun(head.take(new), rest.take(new, axis=0), tags.take(rows), self._share)])
        self._accepted.update(np.unique(hours[accepted]).tolist())
        return accepted

    def on_commit(self, written: Iterable[tuple[int, str]] = ()) -> None:
        """Mark all accepted rows as committed to Gold, where `load` finds them, and evict hours no longer in use.

        `written` are the files that hold these rows, each with its hour. Hours used since the last commit stay this
        time, because the next rows are likely to use them again; so do those of the last windows.
        """
        in_use = self._recent | self._current
        self._of_gold = self._newest_until(self._asked, self._accepted)
        self._accepted, self._recent, self._asked = set(), set(), set()
        if self._disk:
            self._disk.note_written(written)
            self._disk.merge()
        kept = self._ids_after_eviction
        spill = self._disk is not None and self._disk.can_write and self._memory_ids > self._disk.memory_ids
        if not spill and (self.ids <= kept + kept // 8 + _EVICTION_GROWTH or self._loaded <= in_use):
            return
        if not self._loaded <= in_use:
            self._evict(in_use)
        if spill:
            self._spill()
        self._ids_after_eviction = self.ids

    @property
    def _memory_ids(self) -> int:
        return sum(len(runs) for runs in self._forms)

    def _evict(self, in_use: set[int]) -> None:
        """Forget all hours but those `in_use`.

        Runs store only the tags of hours. So hours of one tag are kept or evicted together, in the runs and in the set
        of loaded hours: an hour counts as loaded exactly if its ids are in the runs.
        """
        keep = np.zeros(TAGS, np.bool_)
        keep[[hour % TAGS for hour in in_use]] = True
        for runs in self._forms:
            runs.evict(keep)
        self._loaded = {hour for hour in self._loaded if keep[hour % TAGS]}
        if self._disk:
            self._disk.keep(self._loaded)

    def _spill(self) -> None:
        """Move all ids in memory, which are in Gold, to disk. Hours that differ from Gold will be loaded again."""
        assert self._disk
        differing = self._disk.differing(self._loaded)
        if differing is None:
            return
        if differing:
            keep = np.ones(TAGS, np.bool_)
            keep[[hour % TAGS for hour in differing]] = False
            for runs in self._forms:
                runs.evict(keep)
            left = {hour for hour in self._loaded if keep[hour % TAGS]}
            self._disk.unload(self._loaded - left)
            self._loaded = left
        self._disk.spill(self._forms, self._loaded)

    def _load_hours(self, hours: Mapping[int, int], kafka_hours: Mapping[int, int]) -> None:
        """Load the hours of the rows and of the windows; record these hours only if all loads succeed."""
        chosen = nsmallest(MAX_WINDOW_HOURS, kafka_hours, key=lambda hour: (-kafka_hours[hour], -hour))
        unknown = [hour for hour in chosen if hour not in self._of_gold]
        self._of_gold |= zip(unknown, self._newest_hours(unknown) if unknown else (), strict=True)
        most = max(hours, key=lambda hour: (hours[hour], hour), default=None)
        windows = self._windows([*self._newest_until(chosen, self._accepted | hours.keys()).values(), most])
        used = windows | hours.keys()
        self._load_missing(sorted(used - self._loaded))
        self._current = windows or self._current
        self._recent |= used
        self._asked.update(chosen)

    def _newest_until(self, kafka_hours: Iterable[int], hours: set[int]) -> dict[int, int | None]:
        """Return, by Kafka hour, the newest hour of a row up to it: in Gold, or one of `hours`."""
        ordered = sorted(hours)
        found = {}
        for kafka in kafka_hours:
            of_gold, before = self._of_gold[kafka], bisect_right(ordered, kafka)
            known = ordered[before - 1 : before] if of_gold is None else [of_gold, *ordered[before - 1 : before]]
            found[kafka] = max(known, default=None)
        return found

    def _windows(self, middles: Sequence[int | None]) -> set[int]:
        """Return the hours of the windows around `middles`, in their order, as many as fit into MAX_WINDOW_HOURS."""
        hours: set[int] = set()
        for middle in middles:
            window = range(0) if middle is None else range(middle - self._window + 1, middle + self._window)
            if hours and len(hours.union(window)) > MAX_WINDOW_HOURS:
                break
            hours.update(window)
        return hours

    def _load_missing(self, hours: Sequence[int]) -> None:
        """Load the ids of some hours. An hour is loaded whole, or not at all if an error comes among its ids."""
        if not hours:
            return
        loaded = LoadedHours(self._forms, self._share, self._disk, len(hours))
        try:
            for hour, part in sorted_parts(self._load(hours), self._share):
                if part is None:
                    loaded.complete(hour)
                else:
                    loaded.add(hour, part)
        finally:
            self._loaded |= loaded.end()
