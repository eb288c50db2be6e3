"""The window's files: runs on disk, and the cache folder with everything that can be wrong with it."""

import gc
import logging
import os
import random
import resource
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator
from concurrent.futures import CancelledError
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from k2flow.dedup import merging, spilled
from k2flow.dedup.cache import FIGURES, MANIFEST, CacheFolder, Figures, Origin, read_figures
from k2flow.dedup.keys import Share, share_of
from k2flow.dedup.run_merges import Merge, in_thread
from k2flow.dedup.sorted_runs import TAGS, SortedRun
from k2flow.dedup.spilled import SpilledRun, open_run, write_run
from k2flow.errors import CacheError
from tests.property.test_window import ORIGIN, START, File, Flow
from torture import cache as torture

WHOLE = share_of(0, 1)
Key = tuple[int, int, int]  # head, rest, hour


def write(path: Path, keys: Iterable[Key], share: Share = WHOLE) -> SpilledRun:
    ordered = sorted(keys)
    head = np.array([key[0] for key in ordered], np.uint64)
    rest = np.array([[key[1]] for key in ordered], np.uint64)
    tags = np.array([key[2] % TAGS for key in ordered], np.uint16)
    run = write_run(path, share, [SortedRun(head, rest, tags, share)], {key[2] for key in ordered})
    assert run
    run.kept = frozenset(run.counts)
    run.set_live(run.kept)
    return run


def merged_run(path: Path, runs: list[SpilledRun]) -> SpilledRun | None:
    return next(iter(Merge(runs, path, WHOLE, in_thread).result()), None)


def found(run: SpilledRun, keys: Iterable[Key]) -> list[bool]:
    pairs = list(keys)
    head, rest = (np.array([key[i] for key in pairs], np.uint64) for i in range(2))
    return run.find(head, rest.reshape(-1, 1)).tolist()


def random_keys(rng: np.random.Generator, count: int, spread: int, hours: int = 3) -> list[Key]:
    heads = rng.integers(0, spread, count, np.uint64) * np.uint64(((1 << 64) - 1) // spread)
    return [(head, int(rng.integers(4)), 500_000 + int(rng.integers(hours))) for head in heads.tolist()]


class TestRuns:
    @pytest.mark.parametrize("spread", [3, 1 << 10, 1 << 40])
    def test_keys_of_live_hours_are_found(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, spread: int) -> None:
        monkeypatch.setattr(spilled, "_BLOCK", 64)
        monkeypatch.setattr(merging, "_BLOCK", 50)
        rng = np.random.default_rng(spread)
        runs, held = [], list[Key]()
        for number in range(4):
            keys = random_keys(rng, 300, spread)
            run = write(tmp_path / f"{number}", keys)
            live = {500_000 + number % 3, 500_001}
            run.set_live(live)
            known = {key[:2] for key in keys if key[2] in live}
            asked = [*keys, *random_keys(rng, 300, spread)]
            assert found(run, asked) == [key[:2] in known for key in asked]
            run.kept = frozenset(live)
            runs.append(run)
            held += [key for key in keys if key[2] in live]
        merged = merged_run(tmp_path / "merged", runs)
        assert merged
        assert (merged.keys, merged.live_keys, merged.disk_bytes) == (len(held), len(held), 18 * len(held))
        known = {key[:2] for key in held}
        asked = [*held, *random_keys(rng, 500, spread)]
        assert found(merged, asked) == [key[:2] in known for key in asked]
        for workers in (1, 2, 3, 5):
            for worker in range(workers):
                share = share_of(worker, workers)
                part = open_run(merged.path, 2, share, merged.checksums, merged.written)
                assert not any(found(part, [key for key in held if share.first <= key[0] >> 32 < share.end]))
                part.kept = frozenset(part.counts)
                part.set_live(part.kept)
                own = [key for key in asked if share.first <= key[0] >> 32 < share.end]
                assert found(part, own) == [key[:2] in known for key in own]

    def test_memory_and_disk_per_key(self, tmp_path: Path) -> None:
        rng = np.random.default_rng(1)
        run = write(tmp_path / "run", random_keys(rng, 100_000, 1 << 50))
        assert run.nbytes - TAGS < 1.9 * 100_000
        assert run.path.stat().st_size == 18 * 100_000

    @pytest.mark.parametrize("damage", ["cut", "longer", "flipped", "empty", "gone"])
    def test_damaged_file_is_noticed(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: str) -> None:
        monkeypatch.setattr(spilled, "_BLOCK", 64)
        run = write(tmp_path / "run", random_keys(np.random.default_rng(2), 500, 1 << 40))
        data = bytearray(run.path.read_bytes())
        for bit in range(0, 8 * len(data), 1001) if damage == "flipped" else [0]:
            changed = bytearray(data)
            changed[bit >> 3] ^= 1 << (bit & 7)
            new = {"cut": data[:-18], "longer": data + data[:18], "flipped": changed, "empty": b"", "gone": b""}[damage]
            run.path.unlink(missing_ok=True)
            if damage != "gone":
                run.path.write_bytes(new)
            with pytest.raises((CacheError, FileNotFoundError)):
                open_run(run.path, 2, WHOLE, run.checksums, run.written)

    def test_damage_moves_no_end_of_a_share(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A share is found by a search in the file: a damaged record must not lead it to intact blocks."""
        monkeypatch.setattr(spilled, "_BLOCK", 16)
        run = write(tmp_path / "run", random_keys(np.random.default_rng(6), 200, 1 << 40))
        shares = [share_of(worker, workers) for workers in (2, 3, 5) for worker in range(workers)]
        own = [open_run(run.path, 2, share, run.checksums, run.written).counts for share in shares]
        data = run.path.read_bytes()
        top = range(7, len(data), 3 * 18)  # the highest byte of each head, which decides the search
        changes = [data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :] for at in top]
        noticed = 0
        for changed in (*changes, bytes(byte ^ 0xA5 for byte in data), bytes(len(data)), b"\xff" * len(data)):
            run.path.unlink()
            run.path.write_bytes(changed)
            for share, counts in zip(shares, own, strict=True):
                try:
                    assert open_run(run.path, 2, share, run.checksums, run.written).counts == counts
                except CacheError:
                    noticed += 1
        assert noticed > len(changes)

    @pytest.mark.parametrize("damage", ["flip", "truncate", "append", "overwrite"])
    def test_change_in_place_is_noticed(self, tmp_path: Path, damage: str) -> None:
        """It raises: a look-up behind the end of a mapped file would kill the process."""
        keys = random_keys(np.random.default_rng(3), 500, 1 << 40)
        run = write(tmp_path / "run", keys)
        assert all(found(run, keys))
        time.sleep(0.02)  # longer than a tick of the file system's clock
        data = run.path.read_bytes()
        with run.path.open("r+b") as file:
            match damage:
                case "flip":
                    file.write(bytes([data[0] ^ 1]))
                case "truncate":
                    file.truncate(0)
                case "append":
                    file.seek(0, 2)
                    file.write(data[:18])
                case "overwrite":
                    file.write(data)
        for use in (lambda: found(run, keys), lambda: merged_run(tmp_path / "merged", [run])):
            with pytest.raises(CacheError, match="run was changed while the flow used it: start the flow again"):
                use()
        assert not (tmp_path / "merged").exists()

    def test_file_that_is_replaced_or_deleted_stays_in_use(self, tmp_path: Path) -> None:
        keys = random_keys(np.random.default_rng(4), 500, 1 << 40)
        run = write(tmp_path / "run", keys)
        run.path.unlink()
        assert all(found(run, keys))
        run.path.write_bytes(b"other")
        assert all(found(run, keys))
        merged = merged_run(tmp_path / "merged", [run])
        assert merged
        assert all(found(merged, keys))

    def test_hours_leave_during_a_merge(self, tmp_path: Path) -> None:
        keys = random_keys(np.random.default_rng(6), 500, 1 << 40)
        runs = [write(tmp_path / "0", keys[:250]), write(tmp_path / "1", keys[250:])]
        merge = Merge(runs, tmp_path / "merged", WHOLE, in_thread)
        for run in runs:
            run.kept -= {500_001}
            run.set_live({500_000})
        (merged,) = merge.result()
        assert merged.kept == {500_000, 500_002}
        assert found(merged, keys) == [key[2] == 500_000 for key in keys]

    def test_cancelled_merge_leaves_no_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(merging, "_BLOCK", 1)
        keys = random_keys(np.random.default_rng(7), 5000, 1 << 40)
        run = write(tmp_path / "run", keys)
        merge = Merge([run], tmp_path / "merged", WHOLE, in_thread)
        merge.cancel()
        assert merge.has_ended
        with pytest.raises(CancelledError):
            merge.result()
        assert [path.name for path in tmp_path.iterdir()] == ["run"]
        assert all(found(run, keys))

    def test_files_are_closed(self, tmp_path: Path) -> None:
        keys = random_keys(np.random.default_rng(5), 10, 1 << 40)
        gc.collect()
        before = len(os.listdir("/proc/self/fd"))
        for number in range(20):
            write(tmp_path / f"{number}", keys)
        gc.collect()
        assert len(os.listdir("/proc/self/fd")) == before


@pytest.fixture
def flow(tmp_path: Path) -> Iterator[Flow]:
    """A flow that has spilled, and has more ids in memory."""
    flow = Flow(tmp_path / "cache", 1)
    for batch in range(5):
        flow.accept([(f"{batch}-{i}", START - i % 3) for i in range(20)], [START])
        flow.commit()
    assert flow.spilled() >= 80
    yield flow
    for disk in flow.disks:
        disk.close()


def restarted(flow: Flow) -> list[str]:
    """Start the flow, check that it knows every id, and return the hours' files that it read."""
    flow.start()
    read: list[str] = []
    gold = flow.disks[0]._gold
    of = gold._of  # type: ignore[attr-defined]

    def spy(hour: int, after: int) -> list[File]:
        files: list[File] = of(hour, after)
        read.extend(file.path for file in files)
        return files

    gold._of = spy  # type: ignore[attr-defined]
    new = (f"new {len(flow.table.rows())}", START)
    flow.accept([*flow.table.rows(), new], [START])
    assert flow.accepted == [new]
    return read


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


class TestCache:
    def test_start_reads_only_what_is_new(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        assert restarted(flow) == []
        flow.commit()
        flow.accept([("newer", START), ("newest", START - 1)], [START])
        flow.commit()
        assert len(restarted(flow)) == 3  # files of the last two commits
        assert not warnings(caplog)

    def test_second_copy_works_without_the_cache(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        other = Flow(flow.cache, 2)
        other.table = flow.table
        assert len(restarted(other)) > 3
        (warning,) = warnings(caplog)
        assert warning.endswith("another process uses it: the ids of the window stay in memory")
        assert other.spilled() == 0
        flow.accept([(f"last {i}", START) for i in range(20)], [START])
        flow.commit()
        assert flow.spilled() >= 120

    @pytest.mark.parametrize("how", ["deleted", "moved", "made again", "manifest deleted"])
    def test_folder_is_lost_while_the_flow_runs(self, flow: Flow, how: str, caplog: pytest.LogCaptureFixture) -> None:
        """The flow knows all ids, spills no more, and touches no folder that another process made in the place."""
        folder = flow.disks[0]._folder.path
        match how:
            case "moved":
                folder.rename(folder.with_name("elsewhere"))
            case "manifest deleted":
                (folder / MANIFEST).unlink()
            case _:
                shutil.rmtree(flow.cache)
        other = None
        if how == "made again":
            other = Flow(flow.cache, 2)
            other.accept([(f"other {i}", START) for i in range(20)], [START])
            other.commit()
            assert other.spilled() == 20
        left = {path: path.read_bytes() for path in flow.cache.rglob("*") if path.is_file()}
        spilled_before = flow.spilled()
        for batch in range(5, 9):
            flow.accept([(f"{batch}-{i}", START - i % 3) for i in range(20)], [START])
            flow.commit()
            flow.disks[0].write_figures(1, 2, 3)
        flow.accept(flow.table.rows(), [START])
        assert not flow.accepted
        if how == "manifest deleted":
            assert flow.spilled() == 180
            assert not warnings(caplog)
        else:
            assert {path: path.read_bytes() for path in flow.cache.rglob("*") if path.is_file()} == left
            (warning,) = warnings(caplog)
            assert "it cannot be written (" in warning
            assert "): new ids stay in memory until a restart" in warning
            assert (flow.spilled(), flow.seen[0].ids) == (spilled_before, 180)
        if other:
            other.disks[0].close()
        restarted(flow)

    @pytest.mark.parametrize("in_place", [False, True])
    def test_faults_of_torture(self, flow: Flow, seed: int, in_place: bool, tmp_path: Path) -> None:
        """A damaged file is refused at the next start. It replaces one while the flow runs, or changes between starts.

        So is, or harmless, an older copy of the folder that is put back.
        """
        chance = random.Random(seed)
        cache = torture.Cache(flow.cache, ORIGIN.exchange, tmp_path)
        for number in range(6):
            copy = cache.copy()
            flow.accept([(f"{number} {i}", START - i % 3) for i in range(20)], [START])
            flow.commit()
            assert cache.damage(chance.random(), in_place)
            if not in_place:
                flow.accept([(f"{number} {i}", START - i % 3) for i in range(25)], [START])
                flow.commit()
            if chance.random() < 0.3:
                assert cache.put_back(copy)
            flow.workers = chance.choice([1, 1, 2])
            restarted(flow)
            flow.commit()

    def test_folder_that_cannot_be_made(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        (tmp_path / "cache").write_text("a file")
        flow = Flow(tmp_path / "cache", 1)
        for batch in range(5):
            flow.accept([(f"{batch}-{i}", START) for i in range(20)], [START])
            flow.commit()
        (warning,) = warnings(caplog)
        assert "it cannot be written (Not a directory): the ids of the window stay in memory" in warning
        assert (flow.spilled(), flow.seen[0].ids) == (0, 100)

    def test_full_disk(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        """A limit for the size of files stands for the end of the disk."""
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            for batch in range(5, 9):
                flow.accept([(f"{batch}-{i}", START - i % 3) for i in range(20)], [START])
                flow.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (warning,) = warnings(caplog)
        assert "it cannot be written (File too large): new ids stay in memory until a restart" in warning
        assert flow.seen[0].ids == 180
        flow.accept(flow.table.rows(), [START])
        assert not flow.accepted
        assert 0 < len(restarted(flow)) <= 12

    def test_merge_of_runs(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        """The runs stay until the merged one is in the manifest; the folder may be closed at any time."""
        folder = flow.disks[0]._folder.path
        assert len(flow.merges) == 1
        merge = flow.disks[0]._merge
        assert merge
        merge.path.write_bytes(b"half")
        flow.accept([(f"another {i}", START) for i in range(20)], [START])
        flow.commit()
        assert merge.path.exists()
        merge.path.unlink()
        flow.end_merges()
        before = {path.name for path in folder.glob("*.run")}
        flow.accept([("more", START)], [START])
        flow.commit()
        after = {path.name for path in folder.glob("*.run")}
        assert len(before) > len(after) == sum(map(len, flow.disks[0]._runs))
        assert after < before
        assert restarted(flow) == [flow.table.files[-1].path]
        assert not warnings(caplog)

    def test_full_disk_during_a_merge(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
        try:
            flow.end_merges()
            flow.commit()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (warning,) = warnings(caplog)
        assert "it cannot be written (File too large): new ids stay in memory until a restart" in warning
        flow.accept(flow.table.rows(), [START])
        assert not flow.accepted
        assert restarted(flow) == []

    @pytest.mark.parametrize(
        ("origin", "text"),
        [
            (replace(ORIGIN, exchange="OTHER"), "it is of exchange TEST"),
            (replace(ORIGIN, key=("symbol", "trade_id")), "key message_id, format"),
            (replace(ORIGIN, format="0-big"), "not of exchange TEST, key message_id, format 0-big"),
        ],
    )
    def test_cache_of_another_origin(self, flow: Flow, origin: Origin, text: str) -> None:
        own = flow.disks[0]._folder.path
        folder = CacheFolder(flow.cache, origin, 0, 1)
        folder.path.mkdir(parents=True, exist_ok=True)
        if folder.path != own:
            (folder.path / MANIFEST).write_bytes((own / MANIFEST).read_bytes())
        with pytest.raises(CacheError, match=text):
            folder.read()

    def test_cache_of_another_table(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        flow.table.snapshots = [(number, -1) for number, _ in flow.table.snapshots]
        assert len(restarted(flow)) > 3
        (warning,) = warnings(caplog)
        assert (
            "it is of another table, or of a state that Gold no longer has: the ids of the window are read" in warning
        )
        flow.commit()
        assert flow.spilled() == 100

    def test_another_number_of_workers_uses_it(self, flow: Flow, caplog: pytest.LogCaptureFixture) -> None:
        for workers in (3, 2, 5, 1):
            flow.workers = workers
            flow.start()
            flow.accept(flow.table.rows(), [START])
            assert not flow.accepted
            assert flow.spilled() > 60
            flow.accept([(f"{workers}-{i}-new", START) for i in range(40)], [START])
            flow.commit()
            flow.start()
            flow.accept(flow.table.rows(), [START])
            assert not flow.accepted
        assert not warnings(caplog)

    def test_folder_with_an_absurd_name_is_ignored(self, flow: Flow) -> None:
        own = flow.disks[0]._folder.path
        foreign = own.with_name("0-of-99999999999")
        foreign.mkdir()
        (foreign / MANIFEST).write_bytes((own / MANIFEST).read_bytes())
        assert CacheFolder(flow.cache, ORIGIN, 0, 2).of_other_workers() == [
            (own, CacheFolder(flow.cache, ORIGIN, 0, 1).read())
        ]


def written(cache: Path, worker: int, workers: int, at: int) -> Figures:
    """Write figures whose `ids` are the number of the worker."""
    folder = CacheFolder(cache, ORIGIN, worker, workers)
    folder.open()
    one = Figures(at=at, hours=1, ids=worker, disk_ids=0, memory_bytes=0, disk_bytes=0, disk_hits=0)
    folder.write_figures(one)
    folder.close()
    return one


class TestFigures:
    def test_flow_writes_its_size_and_use(self, flow: Flow) -> None:
        (disk,), (seen,) = flow.disks, flow.seen
        flow.accept([(text, hour) for text, hour in flow.table.rows() if text.startswith("0-")], [START])
        disk.write_figures(len(seen.hours), seen.ids, seen.nbytes)
        found = read_figures(flow.cache, ORIGIN.exchange)
        assert found
        workers, (one,) = found
        assert (workers, one.ids, one.disk_ids, one.disk_hits) == (1, 100, flow.spilled(), 20)
        assert (one.hours, one.memory_bytes, one.disk_bytes) == (len(seen.hours), seen.nbytes, disk.disk_bytes)
        assert one.disk_bytes == sum(path.stat().st_size for path in flow.cache.rglob("*.run"))

    def test_second_copy_writes_none(self, flow: Flow) -> None:
        other = Flow(flow.cache, 2)
        other.table = flow.table
        restarted(other)
        other.disks[0].write_figures(1, 2, 3)
        assert read_figures(flow.cache, ORIGIN.exchange) is None
        flow.disks[0].write_figures(1, 2, 3)
        assert read_figures(flow.cache, ORIGIN.exchange)

    def test_number_of_workers_that_wrote_last(self, tmp_path: Path) -> None:
        three = [written(tmp_path, worker, 3, at=10 + worker) for worker in range(3)]
        assert read_figures(tmp_path, ORIGIN.exchange) == (3, three)
        two = [written(tmp_path, worker, 2, at=20 + worker) for worker in range(2)]
        assert read_figures(tmp_path, ORIGIN.exchange) == (2, two)
        assert read_figures(tmp_path, "OTHER") is None

    def test_damaged_figures_are_left_out(self, tmp_path: Path) -> None:
        one, other = (written(tmp_path, worker, 2, at=1) for worker in range(2))
        path = tmp_path / "window" / ORIGIN.exchange / "1-of-2" / FIGURES
        data = path.read_bytes()
        assert read_figures(tmp_path, ORIGIN.exchange) == (2, [one, other])
        flipped = [bytearray(data) for _ in range(8 * len(data))]
        for bit, each in enumerate(flipped):
            each[bit >> 3] ^= 1 << (bit & 7)
        manifest = b"%08x\n{}" % zlib.crc32(b"{}")
        for damaged in (*flipped, *(data[:end] for end in range(len(data))), b"\xff" * 99, manifest):
            path.write_bytes(damaged)
            found = read_figures(tmp_path, ORIGIN.exchange)
            # A capital or an added digit in the checksum changes nothing.
            assert found in ((2, [one]), (2, [one, other])), damaged
        path.unlink()
        path.mkdir()
        assert read_figures(tmp_path, ORIGIN.exchange) == (2, [one])
