"""Merges of runs beside the flow: few runs of each size, and none with mostly keys that no longer count."""

from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from itertools import accumulate
from pathlib import Path
from threading import Event, Thread
from typing import TypeAlias

from k2flow.dedup.keys import Share
from k2flow.dedup.sorted_runs import TAGS
from k2flow.dedup.spilled import SpilledRun, write_run

MAX_RUN_KEYS = 1 << 26  # larger runs are not merged: they leave with their hours
_RUNS_MERGED = 4  # runs of about the same size, at least
Result: TypeAlias = Future[SpilledRun | None]
Start: TypeAlias = Callable[[Callable[[], SpilledRun | None]], Result]


class Merge:
    """A merge of some runs, which stay in use until its owner replaces them."""

    def __init__(self, runs: Sequence[SpilledRun], path: Path, share: Share, start: Start) -> None:
        """Begin to write the keys of the hours that are kept now to `path`."""
        self.runs, self.path = runs, path
        self._cancelled = Event()
        sources, hours = [run.source() for run in runs], _hours_of(runs)
        self._result = start(lambda: write_run(path, share, sources, hours, cancelled=self._cancelled))

    @property
    def has_ended(self) -> bool:
        """Whether there is a result or an error."""
        return self._result.done()

    def result(self) -> list[SpilledRun]:
        """Return what replaces the runs: one run, or none. Raises CacheError and OSError.

        Keys of hours that left the runs meanwhile are not found in it: no hour comes back into a run.
        """
        merged = self._result.result()
        if merged:
            merged.kept = _hours_of(self.runs) & merged.counts.keys()
            merged.set_live(frozenset[int]().union(*(run.live for run in self.runs)))
        return [merged] if merged and merged.kept else []

    def cancel(self) -> None:
        """Stop it, and wait until it no longer writes."""
        if not self._result.cancel():
            self._cancelled.set()
            wait([self._result])


def in_thread(call: Callable[[], SpilledRun | None]) -> Result:
    """Run a merge in a thread that does not keep the process from ending."""
    result = Result()
    result.set_running_or_notify_cancel()

    def run() -> None:
        try:
            result.set_result(call())
        except BaseException as error:  # noqa: BLE001 - the owner of the result raises it
            result.set_exception(error)

    Thread(target=run, name="merge ids", daemon=True).start()
    return result


def to_merge(runs: Sequence[SpilledRun], memory_ids: int) -> list[SpilledRun]:
    """Return the runs to merge next: some of about one size, or one with mostly keys that no longer count."""
    for run in runs:
        if 2 * sum(run.counts.get(hour, 0) for hour in run.kept) < run.keys:
            return [run]
    sizes: defaultdict[int, list[SpilledRun]] = defaultdict(list)
    for run in runs:
        sizes[(run.keys // max(1, memory_ids // 2)).bit_length() // 2].append(run)
    for size in sorted(sizes):
        keys = accumulate(run.keys for run in sizes[size])
        some = [run for run, sum_ in zip(sizes[size], keys, strict=True) if sum_ <= MAX_RUN_KEYS]
        hours = _hours_of(some)
        if len(some) >= _RUNS_MERGED and len({hour % TAGS for hour in hours}) == len(hours):
            return some
    return []


def _hours_of(runs: Sequence[SpilledRun]) -> frozenset[int]:
    return frozenset[int]().union(*(run.kept for run in runs))
