"""The deduplication window on disk: bytes per id, look-ups per second, and starts with and without the cache."""

import logging
import os
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer
from matplotlib.axes import Axes

from bench.commits import HOUR
from bench.dedup import BATCHES, WINDOW_HOURS, IdSource, load_hour, trimmed, uuid_texts, write_hour
from bench.measure import Stopwatch, in_child, peak_resident
from bench.report import BenchResult, report
from k2flow.config.settings import WINDOW_MEMORY_IDS
from k2flow.dedup.cache import CacheFolder, Origin, Position
from k2flow.dedup.index import SeenIds
from k2flow.dedup.window import DiskWindow

LOOKED_UP = {100_000: 20, 2_000: 200}
"""Batches that are looked up, by their size."""
ORIGIN = Origin("BINANCE", ("message_id",))
HOURS = range(HOUR - WINDOW_HOURS + 1, HOUR + 1)
PART = 250_000


class MadeGold:
    """A Gold of random ids that is made while it is read: each id is a function of its hour and its place."""

    def __init__(self, ids: int) -> None:
        self._per_hour = ids // WINDOW_HOURS
        self.position = Position("made", 1, 1)
        self.read = 0  # ids

    def reload(self) -> Position:
        """Return the only state."""
        return self.position

    def was_at(self, position: Position) -> bool:
        """Compare with the only state."""
        return position == self.position

    def rows(self, hour: int, until: int) -> int:
        """Return the rows of an hour: all are in one commit."""
        return self._per_hour if hour in HOURS and until >= 1 else 0

    def files(self, hour: int, after: int) -> set[str]:
        """Return the file of an hour."""
        return {str(hour)} if self.rows(hour, 1) and after < 1 else set()

    def newest_hours(self, until: Sequence[int]) -> list[int | None]:
        """Return the newest hour."""
        return [min(hour, HOUR) if hour >= HOURS[0] else None for hour in until]

    def load(
        self, hours: Sequence[int], after: Mapping[int, int] | None = None
    ) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        """Yield the ids of each hour that are not in a cache."""
        for hour in hours:
            yield hour, self._ids(hour) if self.files(hour, (after or {}).get(hour, 0)) else iter(())

    def _ids(self, hour: int) -> Iterator[pa.Array]:
        source = IdSource(hour)
        for first in range(0, self._per_hour, PART):
            self.read += min(PART, self._per_hour - first)
            yield uuid_texts(source.fresh(min(PART, self._per_hour - first)))


@dataclass(frozen=True)
class Start:
    """One start over a window: what the first batch and the merges of runs took, and what the window then takes."""

    read: int
    first: Stopwatch
    merges: Stopwatch
    resident: int
    peak: int
    disk: int
    look_ups: dict[int, Stopwatch]


def window(
    ids: Annotated[
        list[int] | None, typer.Option(help="Ids in the window; repeatable; 200 million if not given.")
    ] = None,
    gold_ids: Annotated[int, typer.Option(help="Ids in the hour of a real Gold that is read back.")] = 10_000_000,
) -> None:
    """Fill a window of 24 hours from a Gold that is made on the way, then start again with its cache.

    Each start is a process of its own. Bytes per id are above those of a process without ids. The ids looked up are
    new; that those of the window are found is checked with every hundredth. Then one hour of a real Gold is read back.
    """
    rows, figures = [], []
    for size in ids or [200_000_000]:
        with tempfile.TemporaryDirectory(dir=os.environ.get("TMPDIR")) as cache:
            for name, wanted in (("without the cache", size), ("with it", 0)):
                found = in_child(start, Path(cache), size)
                if found.read != wanted // WINDOW_HOURS * WINDOW_HOURS:
                    raise ValueError(f"{found.read} ids were read from Gold, not {wanted}")
                rates = {n: LOOKED_UP[n] * n / watch.wall for n, watch in found.look_ups.items()}
                rows.append(
                    [
                        *(f"{size:,}", name, f"{found.first.wall:.1f}", f"{found.first.cpu:.1f}"),
                        f"{found.merges.wall:.1f}",
                        *(f"{each / size:.2f}" for each in (found.resident, found.peak, found.disk)),
                        *(f"{rates[n]:,.0f}" for n in BATCHES),
                    ]
                )
                figures.append(
                    {
                        "ids": size,
                        "cached": not found.read,
                        "first_batch_seconds": round(found.first.wall, 2),
                        "merge_seconds": round(found.merges.wall, 2),
                        "resident_bytes_per_id": round(found.resident / size, 2),
                        "disk_bytes_per_id": round(found.disk / size, 2),
                        "ids_per_second": {n: round(rate) for n, rate in rates.items()},
                    }
                )
    with tempfile.TemporaryDirectory() as home:
        files = in_child(write_hour, Path(home), gold_ids)
        loaded = in_child(load_hour, Path(home), gold_ids)
    notes = [
        f"One hour of {gold_ids:,} ids in {files} files of a real Gold, read back without the cache: "
        f"{loaded.wall:.1f} s, {loaded.wall / gold_ids * 1e6:.2f} us an id; {loaded.cpu:.1f} s of CPU.",
        "Runs are merged beside the flow after the first batch; look-ups are measured after that.",
        "Resident bytes include the pages of the files that a process has mapped, peak bytes also those of the start.",
    ]

    def plot(axes: Axes) -> None:
        axes.bar([f"{each['ids']:,}\n{'cache' if each['cached'] else 'Gold'}" for each in figures], [
            each["first_batch_seconds"] for each in figures
        ])  # fmt: skip
        axes.set(ylabel="seconds to the first answer")

    columns = [
        "ids",
        "start",
        "first batch s",
        "CPU s",
        "merges s",
        "resident bytes/id",
        "peak bytes/id",
        "disk bytes/id",
    ]
    columns += [f"ids/s in batches of {n:,}" for n in BATCHES]
    report(BenchResult("window", columns, rows, {"starts": figures, "gold_seconds": loaded.wall}, plot, notes))


def start(cache: Path, ids: int) -> Start:
    """Open the window, answer one batch, and measure look-ups."""
    logging.basicConfig(level=logging.INFO)
    _Window(cache / "warm-up", 48).accept(IdSource(1), 1000)
    before = trimmed()
    opened = _Window(cache, ids)
    with Stopwatch() as first:
        opened.accept(IdSource(2), 1)
    with Stopwatch() as merges:
        opened.merge_runs()
    peak = peak_resident(os.getpid()) - before
    resident = trimmed() - before
    watches = {}
    for size in BATCHES:
        source, watches[size] = IdSource(size + 1), Stopwatch()
        for _ in range(LOOKED_UP[size]):
            opened.accept(source, size, watches[size])
    resident = max(resident, trimmed() - before)
    opened.check_known(ids)
    return Start(opened.gold.read, first, merges, resident, peak, opened.disk.disk_bytes, watches)


class _Window:
    def __init__(self, cache: Path, ids: int) -> None:
        self.gold = MadeGold(ids)
        self.disk = DiskWindow(CacheFolder(cache, ORIGIN, 0, 1), self.gold, min(WINDOW_MEMORY_IDS, ids // 10))
        self.seen = SeenIds(self.disk.load, self.gold.newest_hours, WINDOW_HOURS, disk=self.disk)

    def accept(self, source: IdSource, n: int, watch: Stopwatch | None = None) -> None:
        texts = uuid_texts(source.fresh(n))
        with watch or Stopwatch():
            new = self.seen.accept_new(texts, np.full(n, HOUR), {HOUR: n})
        if not new.all():
            raise ValueError("a new id was refused")

    def merge_runs(self) -> None:
        """Wait for the merges of runs, which a flow does not wait for."""
        self.disk.merge()
        while self.disk.is_merging:
            time.sleep(0.05)
            self.disk.merge()

    def check_known(self, ids: int) -> None:
        for hour in (HOURS[0], HOURS[5], HOURS[-1]):
            known = uuid_texts(IdSource(hour).fresh(min(PART, ids // WINDOW_HOURS)))[::100]
            if self.seen.accept_new(known, np.full(len(known), HOUR), {HOUR: len(known)}).any():
                raise ValueError("a known id was accepted")
