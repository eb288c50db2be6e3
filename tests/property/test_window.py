"""The window on disk against a plain set: random histories of a flow, its restarts and other programs."""

import random
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog

from k2flow.dedup import SeenIds, index, keys, loading, merging, owners_of, run_merges, sorted_runs, spilled
from k2flow.dedup.cache import MANIFEST, CacheFolder, Origin, Position
from k2flow.dedup.keys import share_of
from k2flow.dedup.run_merges import Result
from k2flow.dedup.spilled import SpilledRun
from k2flow.dedup.window import DiskWindow
from k2flow.errors import CacheError
from k2flow.trades.gold_ids import GoldIds
from tests.property import examples
from tests.property.test_changes import FIRST_HOUR, HOURS, History
from tests.property.test_dedup import POOL, TAGS, weak_scramble

WINDOW = 4
START = 500_000
ORIGIN = Origin("TEST", ("message_id",))


@dataclass(frozen=True)
class File:
    """A data file of one hour. Rows of another exchange have a text, too, but are not `own`."""

    path: str
    hour: int
    number: int
    ids: tuple[str, ...]
    others: int = 0
    owner: tuple[int, int] = (0, 1)


class Table:
    """Gold, with the sequence numbers of its files."""

    def __init__(self) -> None:
        self.files: list[File] = []
        self.number = 0
        self.snapshots = [(0, 0)]
        self.made = 0

    def add(self, hour: int, ids: Sequence[str], number: int, others: int = 0, owner: tuple[int, int] = (0, 1)) -> str:
        self.made += 1
        self.files.append(File(f"{self.made}", hour, number, tuple(ids), others, owner))
        return f"{self.made}"

    def next(self) -> int:
        self.number += 1
        self.snapshots.append((self.number, self.number * 1000 + self.made))
        return self.number

    def rows(self) -> list[tuple[str, int]]:
        return [(text, file.hour) for file in self.files for text in file.ids]


class GoldOfWorker:
    """What one worker reads of Gold, as it was at the last load."""

    def __init__(self, table: Table, worker: int, workers: int) -> None:
        self._table, self._share = table, share_of(worker, workers)
        self._files: list[File] = []
        self.position = Position("table", 0, None)

    def reload(self) -> Position:
        self._files = list(self._table.files)
        self.position = Position("table", *self._table.snapshots[-1])
        return self.position

    def was_at(self, position: Position) -> bool:
        return (position.number, position.snapshot) in self._table.snapshots

    def rows(self, hour: int, until: int) -> int:
        return sum(len(f.ids) + f.others for f in self._files if f.hour == hour and f.number <= until)

    def files(self, hour: int, after: int) -> set[str]:
        return {file.path for file in self._of(hour, after)}

    def newest(self, until: Sequence[int]) -> list[int | None]:
        self.reload()
        return [max((f.hour for f in self._files if f.hour <= hour and f.ids), default=None) for hour in until]

    def load(
        self, hours: Sequence[int], after: Mapping[int, int] | None = None
    ) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        self.reload()
        for hour in hours:
            files = self._of(hour, (after or {}).get(hour, -1))
            yield hour, (pa.array(["-", *file.ids], pa.string())[1:] for file in files)

    def _of(self, hour: int, after: int) -> list[File]:
        return [
            file
            for file in self._files
            if file.hour == hour and file.number > after and file.ids and share_of(*file.owner).meets(self._share)
        ]


class Flow:
    """A flow whose workers share one cache, and the table that it commits to."""

    def __init__(self, cache: Path, seed: int) -> None:
        self.cache, self.table, self.chance = cache, Table(), random.Random(seed)
        self.accepted: list[tuple[str, int]] = []
        self.now, self.workers = START, 1
        self.disks: list[DiskWindow] = []
        self.merges: list[tuple[Callable[[], SpilledRun | None], Result]] = []
        self.start()

    def start(self) -> None:
        """Start again, without what was not committed. A merge has not begun, or its result is not in use."""
        self.accepted.clear()
        if self.chance.random() < 0.5:
            self.end_merges()
        for disk in self.disks:
            disk.close()
        self.disks, self.seen = [], []
        for worker in range(self.workers):
            gold = GoldOfWorker(self.table, worker, self.workers)
            disk = DiskWindow(CacheFolder(self.cache, ORIGIN, worker, self.workers), gold, 6, self.begin_merge)
            self.disks.append(disk)
            self.seen.append(SeenIds(disk.load, gold.newest, WINDOW, worker, self.workers, disk))

    def begin_merge(self, call: Callable[[], SpilledRun | None]) -> Result:
        result = Result()
        self.merges.append((call, result))
        return result

    def end_merges(self) -> None:
        """Run the merges that began, at any later moment. Their results come into use at the next commit."""
        for call, result in self.merges:
            if result.set_running_or_notify_cancel():
                try:
                    result.set_result(call())
                except (CacheError, OSError) as error:
                    result.set_exception(error)
        self.merges.clear()

    def commit(self, between: str = "") -> None:
        """Commit, and let the workers know. `between`: what another program does before they know."""
        written: list[list[tuple[int, str]]] = [[] for _ in self.seen]
        if self.accepted:
            number = self.table.next()
            owners = owners_of(pa.array([text for text, _ in self.accepted], pa.string()), self.workers).tolist()
            for worker, hour in sorted({(o, h) for o, (_, h) in zip(owners, self.accepted, strict=True)}):
                own = [t for o, (t, h) in zip(owners, self.accepted, strict=True) if (o, h) == (worker, hour)]
                path = self.table.add(hour, own, number, owner=(worker, self.workers))
                written[worker].append((hour, path))
        self.accepted.clear()
        if between:
            getattr(self, between)()
        for seen, files in zip(self.seen, written, strict=True):
            seen.on_commit(files)

    def accept(self, rows: list[tuple[str, int]], kafka: list[int]) -> None:
        owners = owners_of(pa.array([text for text, _ in rows], pa.string()), self.workers)
        for worker, seen in enumerate(self.seen):
            own = [rows[i] for i in np.flatnonzero(owners == worker).tolist()]
            ids = pa.array(["-", *(text for text, _ in own)], pa.string())[1:]
            hours = np.array([hour for _, hour in own], np.int64)
            marks = seen.accept_new(ids, hours, Counter(kafka)).tolist()
            known = {text for text, hour in self.table.rows() + self.accepted if hour in seen.hours}
            for (text, hour), first in zip(own, marks, strict=True):
                assert first == (text not in known), (text, hour, first)
                known.add(text)
                if first:
                    self.accepted.append((text, hour))

    def compact(self) -> None:
        """Compact some files of an hour, as maintenance does."""
        if self.table.files:
            hour = self.chance.choice(self.table.files).hour
            some = [file for file in self.table.files if file.hour == hour and self.chance.random() < 0.7]
            if some:
                self.table.next()
                self.table.files = [file for file in self.table.files if file not in some]
                ids = [text for file in some for text in file.ids]
                self.table.add(hour, ids, max(file.number for file in some), sum(file.others for file in some))

    def other_exchange(self) -> None:
        self.table.add(self.now - self.chance.randrange(3), (), self.table.next(), others=2)

    def replace_rows(self) -> None:
        """Replace the rows of some files by as many others, or fewer; as `reprocess` and other engines do."""
        files = [file for file in self.table.files if self.chance.random() < 0.3]
        number = self.table.next()
        for file in files:
            self.table.files.remove(file)
            ids = [self.chance.choice([text, self.chance.choice(POOL)]) for text in file.ids]
            self.table.add(file.hour, ids[self.chance.randrange(2) :], number, file.others)

    def append_rows(self) -> None:
        self.table.add(self.now - self.chance.randrange(3), self.chance.sample(POOL, 3), self.table.next())

    def roll_back(self) -> None:
        """Go back to an earlier snapshot: the rows of later commits are gone. Compacted files hide when they came."""
        last = self.chance.randrange(self.table.number + 1)
        self.table.files = [file for file in self.table.files if file.number <= last]
        kept = [each for each in self.table.snapshots if each[0] <= last]
        self.table.snapshots = [*kept, *(each for each in self.table.snapshots if each[0] > last), kept[-1]]

    def damage(self) -> None:
        """Delete, cut or flip bits of a file of the cache, or all of it."""
        files = sorted(path for path in self.cache.rglob("*") if path.suffix in (".run", ".json"))
        if not files or self.chance.random() < 0.2:
            shutil.rmtree(self.cache, ignore_errors=True)
            return
        path = self.chance.choice(files)
        data = bytearray(path.read_bytes())
        match self.chance.randrange(4):
            case 0:
                path.unlink()
            case 1:
                path.write_bytes(data[: self.chance.randrange(len(data))])
            case 2:
                data[self.chance.randrange(len(data))] ^= 1 << self.chance.randrange(8)
                path.unlink()  # runs that are mapped, or linked by another number of workers, stay
                path.write_bytes(data)
            case 3 if path.name == MANIFEST:
                path.write_text("00000000\n{}")

    def spilled(self) -> int:
        return sum(disk.ids for disk in self.disks)


AGES = st.sampled_from([*[0, 0, 0, 1, 2, 3, 4, 9, -1, -48] * 3, TAGS, 2 * TAGS])
TEXTS = st.one_of(st.sampled_from(POOL), st.integers(0, 300).map(str), st.integers(0, 300).map(str))
ROWS = st.lists(st.tuples(TEXTS, AGES), min_size=8, max_size=30)
KAFKA_AGES = st.lists(st.sampled_from([*[0, 0, 0, 2, 5, -48] * 3, TAGS]), max_size=3)
OTHER_PROGRAMS = ("replace_rows", "append_rows", "roll_back")
STEPS = st.lists(
    st.one_of(
        st.tuples(ROWS, KAFKA_AGES),
        st.tuples(ROWS, KAFKA_AGES).map(lambda batch: ("committed", *batch)),
        st.tuples(ROWS, KAFKA_AGES).map(lambda batch: ("committed", *batch)),
        st.tuples(ROWS, KAFKA_AGES).map(lambda batch: ("committed", *batch)),
        st.sampled_from(["commit", "commit", "commit", "restart", "compact", "other_exchange", "damage"]),
        st.just("end_merges"),
        st.just("end_merges"),
        st.sampled_from(OTHER_PROGRAMS).map(lambda name: ("before the workers know", name)),
        st.sampled_from(OTHER_PROGRAMS).map(lambda name: ("while it stands", name)),
        st.sampled_from([1, 2, 3, 5]).map(lambda workers: ("rescale", workers)),
        st.sampled_from([1, 2, 5, TAGS]).map(lambda hours: ("later by", hours)),
    ),
    min_size=12,
    max_size=40,
)


@pytest.fixture(params=["strong", "weak"])
def small_thresholds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all thresholds so small that each is often exceeded."""
    monkeypatch.setattr(loading, "_SORT_ROWS", 6)
    monkeypatch.setattr(loading, "_THREAD_ROWS", 1 << 20)
    monkeypatch.setattr(index, "_EVICTION_GROWTH", 3)
    monkeypatch.setattr(sorted_runs, "_CHUNK", 5)
    monkeypatch.setattr(spilled, "_BLOCK", 7)
    monkeypatch.setattr(run_merges, "MAX_RUN_KEYS", 200)
    monkeypatch.setattr(merging, "_BLOCK", 7)
    monkeypatch.setattr(spilled.os, "fsync", lambda handle: None)
    if request.param == "weak":
        monkeypatch.setattr(keys, "_scramble", weak_scramble)


@pytest.mark.usefixtures("small_thresholds")
@settings(max_examples=examples(40), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(steps=STEPS, seed=st.integers(0, 2**32))
def test_window_on_disk_is_a_plain_set(steps: list[object], seed: int) -> None:
    with TemporaryDirectory() as cache:
        flow = Flow(Path(cache), seed)
        for step in steps:
            match step:
                case "restart":
                    flow.start()
                case "damage":
                    flow.damage()
                    flow.start()
                case "commit":
                    flow.commit()
                case ("before the workers know", str(name)):
                    flow.commit(between=name)
                    flow.start()
                case ("while it stands", str(name)):
                    getattr(flow, name)()
                    flow.start()
                case ("rescale", int(workers)):
                    flow.workers = workers
                    flow.start()
                case ("later by", int(hours)):
                    flow.now += hours
                case str(name):
                    getattr(flow, name)()
                case (list(rows), list(kafka)):
                    flow.accept([(text, flow.now - age) for text, age in rows], [flow.now - age for age in kafka])
                case ("committed", list(rows), list(kafka)):
                    flow.accept([(text, flow.now - age) for text, age in rows], [flow.now - age for age in kafka])
                    flow.commit()


@pytest.mark.usefixtures("small_thresholds")
def test_merges_end_at_any_later_moment(seed: int, tmp_path: Path) -> None:
    """Hours leave, rows are compacted, and the flow spills or starts again while runs are merged."""
    chance, flow, merges_ended = random.Random(seed), Flow(tmp_path, seed), 0
    for _ in range(examples(200)):
        rows = [(str(chance.randrange(1000)), flow.now - chance.randrange(3)) for _ in range(25)]
        flow.accept(rows, [flow.now])
        flow.commit()
        match chance.choices(["end", "start", "later", "compact", ""], [30, 4, 10, 3, 60])[0]:
            case "end":
                merges_ended += len(flow.merges)
                flow.end_merges()
            case "start":
                flow.start()
            case "later":
                flow.now += 1
            case "compact":
                flow.compact()
    assert merges_ended >= examples(200) // 20


@pytest.mark.parametrize("number", [0, 1])
def test_window_over_a_real_gold(catalog: Catalog, seed: int, number: int, tmp_path: Path) -> None:
    """A start after each commit, by k2flow or another program: with the cache it knows exactly the ids in Gold."""
    history, chance = History(catalog, seed + number), random.Random(seed + number)
    ever: set[tuple[str, int]] = set()
    for _ in range(12):
        history.step((*history.own, *history.foreign) if number else history.own)
        rows = history.table().scan(selected_fields=("message_id", "exchange", "timestamp")).to_arrow().to_pylist()
        own = {(r["message_id"], int(r["timestamp"].timestamp()) // 3600) for r in rows if r["exchange"] == "BINANCE"}
        ever |= own
        if not ever or chance.random() < 0.3:
            continue
        workers = chance.choice([1, 1, 2])
        for worker in range(workers):
            gold = GoldIds(catalog, "BINANCE", worker=worker, workers=workers)
            disk = DiskWindow(CacheFolder(tmp_path, ORIGIN, worker, workers), gold, memory_ids=1)
            seen = SeenIds(disk.load, gold.newest_hours, HOURS, worker, workers, disk)
            texts = [text for text, _ in sorted(ever)]
            mine = owners_of(pa.array(texts), workers) == worker
            asked = [each for each, is_mine in zip(sorted(ever), mine.tolist(), strict=True) if is_mine]
            hours = np.array([hour for _, hour in asked], np.int64)
            new = seen.accept_new(pa.array([text for text, _ in asked], pa.string()), hours, {FIRST_HOUR + HOURS: 1})
            assert new.tolist() == [each not in own for each in asked]
            disk.close()
