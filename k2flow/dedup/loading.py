"""Hours of ids on their way into the index: encoded and sorted on all cores, and spilled if they are many."""

import logging
import os
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeAlias

import numpy as np

from k2flow.dedup.keys import WORDS, Ids, Share, encode_keys
from k2flow.dedup.sorted_runs import TAGS, WHOLE, SortedRun, SortedRuns, distinct_positions, joined
from k2flow.dedup.spilled import SpilledRun
from k2flow.dedup.window import DiskWindow

log = logging.getLogger(__name__)
Part: TypeAlias = list[SortedRun | None]
PROGRESS_SECONDS = 5.0
_SORT_ROWS = 1 << 17  # ids encoded and sorted at once
_THREAD_ROWS = 1 << 13  # fewer are not worth a thread
_JOINED_IDS = 1 << 22  # sorted parts that become one run in memory
_THREADS = os.cpu_count() or 1


def sorted_parts(found: Iterable[tuple[int, Iterable[Ids]]], share: Share) -> Iterator[tuple[int, Part | None]]:
    """Yield each hour with parts of its keys, one run or None for each form; at the end of the hour, with None.

    Only keys in `share` are yielded. An error among the ids comes after the parts before it.
    """
    waiting: deque[tuple[int, Future[Part] | None]] = deque()
    with ThreadPoolExecutor(_THREADS, "sort ids") as pool:
        slices = _slices(found)
        while True:
            try:
                item = next(slices, None)
            except BaseException:
                yield from _results(waiting, 0)
                raise
            if item is None:
                break
            hour, ids = item
            waiting.append((hour, _submit(pool, hour, ids, share) if ids else None))
            yield from _results(waiting, 2 * _THREADS)
        yield from _results(waiting, 0)


def _submit(pool: ThreadPoolExecutor, hour: int, ids: Sequence[Ids], share: Share) -> Future[Part]:
    if sum(map(len, ids)) >= _THREAD_ROWS:
        return pool.submit(_sorted, hour, ids, share)
    done: Future[Part] = Future()
    done.set_result(_sorted(hour, ids, share))
    return done


def _results(waiting: deque[tuple[int, Future[Part] | None]], left: int) -> Iterator[tuple[int, Part | None]]:
    while len(waiting) > left:
        hour, part = waiting.popleft()
        yield hour, part.result() if part else None


def _slices(found: Iterable[tuple[int, Iterable[Ids]]]) -> Iterator[tuple[int, list[Ids]]]:
    """Yield each hour with about _SORT_ROWS of its ids; at the end of the hour, with none."""
    for hour, arrays in found:
        some, rows = list[Ids](), 0
        for ids in arrays:
            for a in range(0, len(ids), _SORT_ROWS):
                some.append(ids.slice(a, _SORT_ROWS))
                rows += len(some[-1])
                if rows >= _SORT_ROWS:
                    yield hour, some
                    some, rows = [], 0
        if some:
            yield hour, some
        yield hour, []


def _sorted(hour: int, arrays: Sequence[Ids], share: Share) -> Part:
    """Return a run of the distinct keys of each form, those in `share`; None for a form without any."""
    encoded = [encode_keys(ids) for ids in arrays]
    part: Part = []
    for forms in zip(*encoded, strict=True):
        some = [form for form in forms if len(form.rows)]
        if not some:
            part.append(None)
            continue
        head, rest = np.concatenate([form.head for form in some]), np.concatenate([form.rest for form in some])
        if share != WHOLE:
            own = share.holds(head)
            head, rest = head[own], rest[own]
        order = distinct_positions(head, rest)
        tags = np.full(len(order), hour % TAGS, np.uint16)
        part.append(SortedRun(head.take(order), rest.take(order, axis=0), tags, share) if len(order) else None)
    return part


class LoadedHours:
    """The keys of the hours of one load. They go to memory, or, if they are many, to disk."""

    def __init__(self, memory: Sequence[SortedRuns], share: Share, disk: DiskWindow | None, hours: int) -> None:
        """`memory` takes what stays in memory. `hours` is the number of hours to load."""
        self._memory, self._share, self._disk, self._to_load = memory, share, disk, hours
        self._forms = [SortedRuns() for _ in WORDS]
        self._parts: list[list[SortedRun]] = [[] for _ in WORDS]  # not yet in a run in memory or on disk
        self._written: list[tuple[int, SpilledRun]] = []
        self._complete: set[int] = set()
        self._begun: set[int] = set()
        self._ids, self._started = 0, time.monotonic()
        self._logged = self._started

    def add(self, hour: int, part: Part) -> None:
        """Add a part of the keys of an hour."""
        self._begun.add(hour)
        for parts, run in zip(self._parts, part, strict=True):
            if run:
                self._ids += len(run)
                parts.append(run)
        limit = self._disk.memory_ids if self._disk else _JOINED_IDS
        if sum(len(run) for parts in self._parts for run in parts) > limit and not self._spill():
            self._join()
        self._log_progress()

    def complete(self, hour: int) -> None:
        """Mark an hour as complete."""
        self._complete.add(hour)

    def end(self) -> set[int]:
        """Add the complete hours to memory or disk, drop an incomplete one, and return those that were added."""
        if failed := self._begun - self._complete:
            self._join()
            keep = np.ones(TAGS, np.bool_)
            keep[[hour % TAGS for hour in failed]] = False
            for runs in self._forms:
                runs.evict(keep)
            self._complete = {hour for hour in self._complete if keep[hour % TAGS]}
        if not self._written or not self._spill():
            self._join()
        if self._disk and self._written:
            self._disk.add(self._written, self._complete, complete=not any(map(len, self._forms)))
        for memory, runs in zip(self._memory, self._forms, strict=True):
            memory.add(runs)
        return self._complete

    def _spill(self) -> bool:
        """Move all keys to disk. Returns whether it did."""
        if not self._disk:
            return False
        forms = [[*runs, *parts] for runs, parts in zip(self._forms, self._parts, strict=True)]
        written = self._disk.write(forms, self._begun)
        if written is None:
            return False
        self._written += written
        for runs, parts in zip(self._forms, self._parts, strict=True):
            runs.clear()
            parts.clear()
        return True

    def _join(self) -> None:
        """Make one run in memory of the parts of each form."""
        for runs, parts in zip(self._forms, self._parts, strict=True):
            if parts:
                runs.add([joined(parts, self._share, _THREADS)])
                parts.clear()

    def _log_progress(self) -> None:
        now = time.monotonic()
        if now - self._logged > PROGRESS_SECONDS:
            self._logged, seconds = now, now - self._started
            log.info(
                "the deduplication window is read from Gold: %d of %d hours, %d ids in %.0f s",
                *(len(self._complete), self._to_load, self._ids, seconds),
            )
