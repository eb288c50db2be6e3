"""The cost of deduplication: memory per id, look-ups per second, and the time to read an hour of ids back."""

import ctypes
import gc
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import numpy.typing as npt
import psutil
import pyarrow as pa
import typer
from matplotlib.axes import Axes

from bench.commits import HOUR, gold_of_hour
from bench.lake import LakeWriter
from bench.measure import Stopwatch, in_child, peak_resident
from bench.report import BenchResult, report
from k2flow.dedup.index import SeenIds
from k2flow.exchange import find_exchange
from k2flow.flow.process import FlowProcess
from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import GOLD_TABLE
from k2flow.trades.gold_ids import GoldIds

EXCHANGE = "binance"
SIZES = (1_000_000, 10_000_000, 50_000_000)
BATCHES = (100_000, 2_000)
FILL = 100_000
GROWTH = 8
"""The rate is measured while a set grows by one part in GROWTH; its largest run is merged about once in that time."""
MIN_BATCHES = 5
"""The rate is measured over at least this number of batches."""
DUPLICATES = 0.03
DISTANCE = 2_000
"""A duplicate comes at most this number of ids after the original, as in the market."""
WINDOW_HOURS = 24


@dataclass(frozen=True)
class SetCost:
    """The cost of a set of `ids` ids: its bytes, and the time of look-ups by batch size.

    `resident` and `peak` are the growth of the process, and `trimmed` is the growth without freed memory that the C
    library keeps; `own` is the size that the set itself reports.
    """

    ids: int
    resident: int
    trimmed: int
    own: int
    peak: int
    watches: dict[int, Stopwatch]
    rows: dict[int, int]

    def rate(self, batch: int) -> float:
        """Rows looked up, and inserted if new, per second of wall clock."""
        return self.rows[batch] / self.watches[batch].wall

    def cpu_us(self, batch: int) -> float:
        """Microseconds of CPU per row."""
        return self.watches[batch].cpu / self.rows[batch] * 1e6


def dedup(
    ids: Annotated[
        list[int] | None, typer.Option(help="Ids in the set; repeatable; 1, 10 and 50 million if not given.")
    ] = None,
    hour_ids: Annotated[int, typer.Option(help="Ids in the hour that is loaded from Gold.")] = 10_000_000,
) -> None:
    """Measure SeenIds at several sizes, each in a separate process: bytes per id, and ids per second at that size.

    The rates are those at full size: the last ninth is filled in batches of 100,000, and an eighth more in batches of
    2,000. 3 % of the ids come twice; it is an error unless exactly these are refused. Then measure how long a starting
    flow takes to read one hour of ids back from Gold, with one file per trigger.
    """
    results = [in_child(measure_set, size) for size in ids or SIZES]
    with tempfile.TemporaryDirectory() as home:
        files = in_child(write_hour, Path(home), hour_ids)
        loaded = in_child(load_hour, Path(home), hour_ids)
    rows = []
    for held in results:
        sizes = [f"{size / held.ids:.1f}" for size in (held.resident, held.trimmed, held.own, held.peak)]
        rates = [[f"{batch:,}", f"{held.rate(batch):,.0f}", f"{held.cpu_us(batch):.2f}"] for batch in BATCHES]
        first, *others = rates
        rows.append([f"{held.ids:,}", *sizes, *first])
        rows += [[""] * (1 + len(sizes)) + other for other in others]
    figures = {
        "sizes": [
            {
                "ids": held.ids,
                "resident_bytes_per_id": round(held.resident / held.ids, 2),
                "trimmed_bytes_per_id": round(held.trimmed / held.ids, 2),
                "own_bytes_per_id": round(held.own / held.ids, 2),
                "peak_bytes_per_id": round(held.peak / held.ids, 2),
                "ids_per_second": {batch: round(held.rate(batch)) for batch in BATCHES},
                "cpu_us_per_id": {batch: round(held.cpu_us(batch), 3) for batch in BATCHES},
            }
            for held in results
        ],
        "hour_ids": hour_ids,
        "hour_files": files,
        "hour_seconds": round(loaded.wall, 2),
        "hour_cpu_seconds": round(loaded.cpu, 2),
    }

    def plot(axes: Axes) -> None:
        for batch in BATCHES:
            us = [held.cpu_us(batch) for held in results]
            axes.plot([held.ids for held in results], us, "o-", label=f"{batch:,}")
        axes.set(xlabel="ids in the set", ylabel="us of CPU per id", xscale="log")
        axes.set_ylim(bottom=0)
        axes.legend(title="batches of")

    memory = ["resident bytes/id", "without freed", "own bytes/id", "peak bytes/id"]
    columns = ["ids", *memory, "batches of", "ids/s", "us CPU/id"]
    notes = [
        f"One hour of {hour_ids:,} ids in {files} files of Gold, from start to the first answer: {loaded.wall:.1f} s, "
        f"{loaded.cpu:.1f} s of CPU.",
        "ids/s is by wall clock, of one thread: other load on the machine lowers it, and hardly changes CPU.",
    ]
    report(BenchResult("dedup", columns, rows, figures, plot, notes))


def measure_set(ids: int) -> SetCost:
    """Fill a set with `ids` ids over the hours of the window, and measure it."""
    _look_up(
        SeenIds(_no_ids, _no_hours), IdSource().batch(FILL), HOUR, Stopwatch()
    )  # warm-up: allocations that happen only once
    before = trimmed()
    seen, source = SeenIds(_no_ids, _no_hours, WINDOW_HOURS), IdSource()
    watches = {batch: Stopwatch() for batch in BATCHES}
    counted = dict.fromkeys(BATCHES, 0)
    from_ids = max(0, ids - max(ids // (GROWTH + 1), MIN_BATCHES * FILL))
    filling = Stopwatch()
    while seen.ids < ids:
        hour = HOUR + seen.ids * WINDOW_HOURS // ids
        batch = source.batch(FILL)
        watch = filling
        if seen.ids >= from_ids:
            watch = watches[FILL]
            counted[FILL] += FILL
        _look_up(seen, batch, hour, watch)
    del batch
    held, resident, peak, own = seen.ids, _resident() - before, peak_resident(os.getpid()) - before, seen.nbytes
    without_freed = trimmed() - before
    small = BATCHES[-1]
    for _ in range(max(MIN_BATCHES, ids // GROWTH // small)):
        _look_up(seen, source.batch(small), HOUR + WINDOW_HOURS - 1, watches[small])
        counted[small] += small
    return SetCost(held, resident, without_freed, own, peak, watches, counted)


def _no_ids(hours: Sequence[int]) -> Iterator[tuple[int, list[pa.Array]]]:
    return ((hour, []) for hour in hours)


def _no_hours(until: Sequence[int]) -> list[int | None]:
    return [None for _ in until]


def _look_up(seen: SeenIds, batch: "IdBatch", hour: int, watch: Stopwatch) -> None:
    hours = np.full(len(batch.ids), hour, np.int64)
    with watch:
        first = seen.accept_new(batch.ids, hours, {hour: len(hours)})
        seen.on_commit()
    if int(first.sum()) != batch.new:
        raise ValueError(f"{int(first.sum())} of {len(first)} ids were taken for new ones, but {batch.new} are new")


@dataclass(frozen=True)
class IdBatch:
    """Ids as text; `new` of them have never come before."""

    ids: pa.StringArray
    new: int


class IdSource:
    """Message ids like the market's: version 4 UUIDs with duplicates of earlier ones."""

    def __init__(self, seed: int = 1) -> None:
        self._rng = np.random.default_rng(seed)
        self._latest = np.zeros((0, 16), np.uint8)

    def batch(self, n: int) -> IdBatch:
        """Return the next n ids, n > 0."""
        copy = self._rng.random(n) < DUPLICATES
        if not len(self._latest):
            copy[0] = False  # no id comes before it
        new = int(n - copy.sum())
        pool = np.concatenate([self._latest, self.fresh(new)])
        source = len(self._latest) + np.cumsum(~copy) - 1
        source[copy] -= self._rng.integers(0, DISTANCE, int(copy.sum()))
        self._latest = pool[-DISTANCE:]
        return IdBatch(uuid_texts(pool[np.maximum(source, 0)]), new)

    def fresh(self, n: int) -> npt.NDArray[np.uint8]:
        """Return n new ids as bytes, shape (n, 16)."""
        ids = self._rng.integers(0, 256, (n, 16), np.uint8)
        ids[:, 6] = ids[:, 6] & 0x0F | 0x40
        ids[:, 8] = ids[:, 8] & 0x3F | 0x80
        return ids


def uuid_texts(ids: npt.NDArray[np.uint8]) -> pa.StringArray:
    """Format n UUIDs, shape (n, 16), as text."""
    digits = np.frombuffer(ids.tobytes().hex().encode(), np.uint8).reshape(-1, 32)
    text = np.insert(digits, [8, 12, 16, 20], ord("-"), axis=1)
    edges = np.arange(0, text.size + 1, text.shape[1], dtype=np.int32)
    return pa.StringArray.from_buffers(len(ids), pa.py_buffer(edges), pa.py_buffer(text.tobytes()))


def write_hour(home: Path, ids: int) -> int:
    """Write an hour of Gold with `ids` ids under `home`, one commit per trigger. Return the number of files."""
    lake = LakeWriter(home, EXCHANGE)
    count = math.ceil(3600 / lake.exchange.settings.trigger_seconds)
    step = math.ceil(ids / count)
    rows, source = gold_of_hour(lake, step, HOUR), IdSource()
    column = rows.schema.get_field_index("message_id")
    files = 0
    for first in range(0, ids, step):
        n = min(step, ids - first)
        new = uuid_texts(source.fresh(n))
        content = rows.slice(0, n).set_column(column, rows.schema.field(column), new)
        written = lake.write_files(GOLD_TABLE, content)
        lake.committers[GOLD_TABLE].commit(written, [OffsetRange(0, first, first + n, n)])
        files += len(written)
    return files


def load_hour(home: Path, ids: int) -> Stopwatch:
    """Measure the time from a start to the first look-up, with the hour that `write_hour` wrote."""
    os.environ["K2FLOW_HOME"] = str(home)
    process = FlowProcess(find_exchange(EXCHANGE))
    one = IdSource().batch(1)
    with Stopwatch() as watch:
        gold = GoldIds(process.catalog, process.exchange.code, process.exchange.dedup_key)
        seen = SeenIds(gold.load, gold.newest_hours, WINDOW_HOURS)
        seen.accept_new(one.ids, np.array([HOUR]), {HOUR: 1})
    if seen.ids != ids + 1:
        raise ValueError(f"{seen.ids} ids are in the set, not {ids} and the new one")
    return watch


def _resident() -> int:
    """Return the resident bytes of this process."""
    return int(psutil.Process().memory_info().rss)


def trimmed() -> int:
    """Return freed memory to the kernel, then return the resident bytes of this process."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _resident()
