"""The ids of the window that are not in memory: sorted runs in the cache folder, and what they are worth after a start.

The runs are part of the deduplication index while it runs. They are also a function of Gold up to a sequence number, so
that the next start need not read Gold again. For this, Gold is compared with them before each spill:

- Gold still has as many rows of an hour, up to the number of the last spill, as it had then. Only removed rows could
  change this number. So the ids of the hour on disk are still all in Gold.
- The files that are new in Gold since then are those that this worker wrote. So the ids in memory are theirs.

An hour that differs is read again from Gold: whole in the first case, its new files in the second.
"""

import logging
import os
import time
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import numpy as np

from k2flow.dedup.cache import CacheFolder, Figures, Manifest, Position, RunEntry
from k2flow.dedup.keys import WORDS, Bools, Ids, Words
from k2flow.dedup.run_merges import Merge, Start, in_thread, to_merge
from k2flow.dedup.sorted_runs import TAGS, SortedRun, SortedRuns
from k2flow.dedup.spilled import SpilledRun, open_run, write_run
from k2flow.errors import CacheError, CatalogError, one_line

log = logging.getLogger(__name__)
CORES = os.cpu_count() or 1
Proofs = tuple[tuple[int, int], ...]


class Gold(Protocol):
    """Gold as the window needs it: rows and files by hour and by data sequence number."""

    @property
    def position(self) -> Position:
        """The state that was loaded last."""

    def reload(self) -> Position:
        """Load the table again. Raises CatalogError."""

    def was_at(self, position: Position) -> bool:
        """Return False if the table, as loaded, was surely never in this state."""

    def rows(self, hour: int, until: int) -> int:
        """Return the number of rows of all exchanges in an hour, with a number up to `until`."""

    def files(self, hour: int, after: int) -> set[str]:
        """Return the files of an hour, with a number above `after`, that may have ids of this worker."""

    def load(self, hours: Sequence[int], after: Mapping[int, int]) -> Iterator[tuple[int, Iterable[Ids]]]:
        """Yield the ids of each hour: of files with a number above `after`, if it names the hour, else of all."""


class DiskWindow:
    """The ids of one worker on disk, and the proof that they are in Gold. Pass its `load` to `SeenIds`."""

    def __init__(self, folder: CacheFolder, gold: Gold, memory_ids: int, start_merge: Start = in_thread) -> None:
        """Touch no file yet. `memory_ids` is the number of ids above which memory is spilled."""
        self.memory_ids, self.hits = memory_ids, 0
        self._folder, self._gold = folder, gold
        self._runs: list[list[SpilledRun]] = [[] for _ in WORDS]
        self._proofs: dict[int, Proofs] = {}  # of the hours whose ids up to a number are on disk
        self._read: dict[int, tuple[int, int]] = {}  # by hour: Gold's number when it was read, and its rows then
        self._written: defaultdict[int, set[str]] = defaultdict(set)  # this worker's files since, by hour
        self._opened = False
        self._start_merge = start_merge
        self._merge: Merge | None = None

    @property
    def can_write(self) -> bool:
        """Whether ids can be spilled; otherwise they stay in memory."""
        return self._folder.is_open

    @property
    def is_merging(self) -> bool:
        """Whether a merge of runs has begun, and its result is not yet in use."""
        return self._merge is not None

    @property
    def ids(self) -> int:
        """The number of ids on disk, of hours in use."""
        return sum(run.live_keys for runs in self._runs for run in runs)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return sum(run.nbytes for runs in self._runs for run in runs)

    @property
    def disk_bytes(self) -> int:
        """Bytes of the runs."""
        return sum(run.disk_bytes for runs in self._runs for run in runs)

    def find(self, form: int, head: Words, rest: Words) -> Bools:
        """Return which of m keys of a form are on disk: (m,). Ascending heads are found faster."""
        hit = np.zeros(len(head), np.bool_)
        for run in self._runs[form]:
            hit |= run.find(head, rest)
        self.hits += int(np.count_nonzero(hit))
        return hit

    def load(self, hours: Sequence[int]) -> Iterator[tuple[int, Iterable[Ids]]]:
        """Yield, for each hour, the ids in Gold that are not on disk. Those on disk are found from then on."""
        if hours and not self._opened:
            self._open()
        after = self._proven(hours)
        if after:
            log.info("the cache has %d of %d hours of the deduplication window", len(after), len(hours))
        for hour, ids in self._gold.load(hours, after):
            number = self._gold.position.number
            self._read[hour] = number, self._gold.rows(hour, number)
            self._written.pop(hour, None)
            if hour in after:
                self._set_live({hour}, ())
            yield hour, ids

    def note_written(self, files: Iterable[tuple[int, str]]) -> None:
        """Note the files, each with its hour, that hold the ids accepted since the last commit. They are in Gold."""
        for hour, path in files:
            self._written[hour].add(path)

    def keep(self, hours: set[int]) -> None:
        """Forget all other hours."""
        self._forget({*self._proofs, *self._read, *self._written, *(h for r in self._all() for h in r.kept)} - hours)

    def differing(self, hours: Iterable[int]) -> set[int] | None:
        """Load Gold, and return the hours whose ids in memory and on disk are not those in Gold.

        The caller must drop these hours from memory, and `unload` them. None if Gold cannot be read now.
        """
        try:
            self._gold.reload()
            gone = {hour for hour in hours if not self._is_proven(hour)}
            new = {hour for hour in hours if hour not in gone and not self._is_read(hour)}
        except CatalogError as error:
            log.warning("window: its ids stay in memory until the next commit: %s", one_line(error))
            return None
        self._forget(gone)
        return gone | new

    def unload(self, hours: set[int]) -> None:
        """Find no key of some hours until `load` has compared them with Gold again."""
        self._forget({hour for hour in hours if hour not in self._proofs})
        self._set_live(set(), hours)

    def spill(self, memory: list[SortedRuns], hours: set[int]) -> bool:
        """Move all ids of all `hours` from memory to disk, after `differing`. Returns whether it did."""
        number = self._gold.position.number
        written = self.write([[*runs] for runs in memory], hours)
        if written is None:
            return False
        for runs in memory:
            runs.clear()
        self._read = {hour: (number, self._gold.rows(hour, number)) for hour in hours}
        self._written.clear()
        self.add(written, hours)
        return True

    def write(self, forms: Sequence[Sequence[SortedRun]], hours: Iterable[int]) -> list[tuple[int, SpilledRun]] | None:
        """Write all keys of each form, which are of these `hours`, to disk. They are not found there before `add`.

        Returns the runs with their forms; None if nothing was written, which is warned of once.
        """
        hours = [*hours]
        if not self.can_write or len({hour % TAGS for hour in hours}) < len(hours):
            return None
        written = []
        try:
            for form, runs in enumerate(forms):
                if runs:
                    new = write_run(self._folder.new_path(), self._folder.share, runs, hours, CORES)
                    written += [(form, new)] if new else []
        except OSError as error:
            for _, new in written:
                new.path.unlink(missing_ok=True)
            self._stop_writing(error)
            return None
        return written

    def add(self, written: Iterable[tuple[int, SpilledRun]], hours: set[int], complete: bool = True) -> None:
        """Find the keys of some hours in written runs from now on.

        `complete`: all ids that Gold had in these hours, when they were read, are on disk; else some are in memory.
        """
        for form, run in written:
            run.kept = frozenset(hours & run.counts.keys())
            run.set_live(hours)
            self._runs[form].append(run)
        for hour in hours:
            self._proofs.pop(hour, None)
        if complete:
            self._proofs |= {hour: (self._read[hour],) for hour in hours}
        try:
            self._write_manifest()
        except OSError as error:
            self._stop_writing(error)

    def merge(self) -> None:
        """Use the merge of runs that has ended, if any, and begin the next one. Raises CacheError."""
        if not self.can_write:
            return
        try:
            if self._merge and self._merge.has_ended:
                merge, self._merge = self._merge, None
                new = merge.result()
                for runs in self._runs:
                    if any(run in merge.runs for run in runs):
                        runs[:] = [*(run for run in runs if run not in merge.runs), *new]
                self._write_manifest()
            if not self._merge and (some := self._to_merge()):
                self._merge = Merge(some, self._folder.new_path(), self._folder.share, self._start_merge)
        except OSError as error:
            self._stop_writing(error)

    def write_figures(self, hours: int, ids: int, memory_bytes: int) -> None:
        """Write the size and use of the whole window beside the runs, for `k2flow status`."""
        if self.can_write:
            self._folder.write_figures(
                Figures(
                    at=time.time_ns() // 1_000_000,
                    hours=hours,
                    ids=ids,
                    disk_ids=self.ids,
                    memory_bytes=memory_bytes,
                    disk_bytes=self.disk_bytes,
                    disk_hits=self.hits,
                )
            )

    def close(self) -> None:
        """Let another process use the folder."""
        if self._merge:
            self._merge.cancel()
            self._merge = None
        self._folder.close()

    def _all(self) -> Iterator[SpilledRun]:
        return (run for runs in self._runs for run in runs)

    def _stop_writing(self, error: OSError) -> None:
        self._folder.warn(f"it cannot be written ({error.strerror or error}): new ids stay in memory until a restart")
        self.close()

    def _is_proven(self, hour: int) -> bool:
        return all(self._gold.rows(hour, number) == rows for number, rows in self._proofs.get(hour, ()))

    def _is_read(self, hour: int) -> bool:
        """Return whether memory and disk hold the ids of an hour: those when it was read, and those written since."""
        number, rows = self._read[hour]
        return self._gold.rows(hour, number) == rows and self._gold.files(hour, number) == self._written[hour]

    def _proven(self, hours: Sequence[int]) -> dict[int, int]:
        """Return, for the hours whose ids on disk are still those in Gold, the number up to which they are."""
        known = [hour for hour in hours if hour in self._proofs]
        if known:
            self._gold.reload()
        self._forget({hour for hour in known if not self._is_proven(hour)})
        return {hour: min(self._proofs[hour])[0] for hour in known if hour in self._proofs}

    def _set_live(self, more: set[int], fewer: Iterable[int]) -> None:
        for run in self._all():
            run.set_live(run.live - {*fewer} | more)

    def _forget(self, hours: set[int]) -> None:
        if not hours:
            return
        for runs in self._runs:
            for run in runs:
                run.kept -= hours
                run.set_live(run.live)
            runs[:] = [run for run in runs if run.kept]
        for hour in hours:
            self._proofs.pop(hour, None)
            self._read.pop(hour, None)
            self._written.pop(hour, None)

    def _open(self) -> None:
        """Lock the folder, and open the runs that it has, or those that another number of workers left."""
        self._opened = True
        self._folder.open()
        if not self.can_write:
            return
        try:
            if own := self._folder.read():
                self._adopt([(own, [self._folder.path / entry.name for entry in own.runs])])
                self._folder.remove_other_workers()
            else:
                others = self._folder.of_other_workers()
                self._adopt([(m, [self._folder.link(path, entry.name) for entry in m.runs]) for path, m in others])
        except (CacheError, OSError) as error:
            self._folder.warn(f"{one_line(error)}: the ids of the window are read from Gold")
            self._runs, self._proofs = [[] for _ in WORDS], {}
            with suppress(OSError):
                self._folder.clear()

    def _adopt(self, parts: Sequence[tuple[Manifest, Sequence[Path]]]) -> None:
        """Open the runs of some manifests, which have all keys together.

        Of the hours that all of them have, the ids are found once `load` has compared them with Gold.
        """
        if not parts:
            return
        self._gold.reload()
        if not all(self._gold.was_at(manifest.position) for manifest, _ in parts):
            raise CacheError("it is of another table, or of a state that Gold no longer has")
        hours = frozenset.intersection(*(frozenset(manifest.hours) for manifest, _ in parts))
        self._proofs = {h: tuple((n, rows) for m, _ in parts for n, rows in m.hours[h]) for h in hours}
        for manifest, paths in parts:
            for entry, path in zip(manifest.runs, paths, strict=True):
                if hours & {*entry.kept}:
                    run = open_run(path, entry.words, self._folder.share, entry.checksums, entry.written)
                    run.kept = hours & {*entry.kept} & run.counts.keys()
                    self._runs[entry.form] += [run] if run.kept else []

    def _to_merge(self) -> list[SpilledRun]:
        return next(filter(None, (to_merge(runs, self.memory_ids) for runs in self._runs)), [])

    def _write_manifest(self) -> None:
        self._folder.write(self._manifest(), self._merge.path.name if self._merge else None)

    def _manifest(self) -> Manifest:
        entries = [
            RunEntry(run.path.name, form, run.words, run.written, sorted(run.kept), run.checksums)
            for form, runs in enumerate(self._runs)
            for run in runs
        ]
        return Manifest(self._folder.origin, self._gold.position, self._proofs, entries)
