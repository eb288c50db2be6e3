"""Sorted runs in files: 18 bytes per key of two words on disk, 1.8 in memory.

A file holds records by ascending head: the words of a key and the tag of its hour, little-endian. Memory holds a
directory of equal cells, and the low byte of each head. So a look-up reads the file for 2 % of the keys that are not in
it.
"""

import os
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from pathlib import Path
from threading import Event, Lock

import numpy as np

from k2flow.dedup.keys import EACH_BYTE, Bools, Ints, Share, Words
from k2flow.dedup.merging import Source, merged, record_type
from k2flow.dedup.run_file import Records, RunFile
from k2flow.dedup.sorted_runs import TAGS
from k2flow.errors import CacheError
from k2flow.failpoints import Point, reach

_KEYS_PER_CELL = 5
_BLOCK = 1 << 18  # records with one checksum
_MAX_PAGES = 64  # read before they are unmapped; the kernel maps up to 16 at once
_TOPS = np.uint64(0x8080808080808080)
_LOW_BYTE = np.uint64(0xFF)
_MASKS = np.array([(1 << 8 * size) - 1 for size in range(9)], np.uint64)  # the first 0-8 bytes of a word


class SpilledRun:
    """Keys in a file, each with the tag of its hour. Only keys of hours in `live` are found.

    Of the file only the keys of one worker's share are used, of any writer: `counts` has their number by hour,
    `written` that of all keys. No file has two hours of one tag. The keys of hours in `kept` may become live.
    """

    def __init__(
        self,
        file: RunFile,
        records: Records,
        index: "_Index",
        counts: Mapping[int, int],
        written: Mapping[int, int],
        checksums: Sequence[int],
    ) -> None:
        """Use `write_run` or `open_run`."""
        self.path, self.counts, self.written, self.checksums = file.path, counts, written, checksums
        self.kept: frozenset[int] = frozenset()
        self.live: frozenset[int] = frozenset()
        self._file, self._records, self._index = file, records, index
        self._valid = np.zeros(TAGS, np.bool_)
        self._pages = 0

    @property
    def keys(self) -> int:
        """The number of keys, of live hours or not."""
        return len(self._records)

    @property
    def words(self) -> int:
        """The number of words of a key."""
        return _words_of(self._records)

    @property
    def live_keys(self) -> int:
        """The number of keys of live hours."""
        return sum(self.counts[hour] for hour in self.live)

    @property
    def nbytes(self) -> int:
        """Bytes of memory."""
        return self._index.nbytes + self._valid.nbytes

    @property
    def disk_bytes(self) -> int:
        """Bytes of the file that belong to the share."""
        return self._records.nbytes

    def set_live(self, hours: Iterable[int]) -> None:
        """Find from now on exactly the keys of those `hours` that are kept."""
        self.live = frozenset(hours) & self.kept
        self._valid[:] = False
        self._valid[[hour % TAGS for hour in self.live]] = True

    def find(self, head: Words, rest: Words) -> Bools:
        """Return which of m keys are here, in a live hour: (m,). Much faster if head is ascending.

        Raises CacheError if another program has changed the file.
        """
        hit = np.zeros(len(head), np.bool_)
        row, place = self._index.candidates(head)
        if len(row):
            self._file.check()
            same = self._records["head"][place] == head.take(row)
            row, found = row[same], self._records[place[same]]
            equal = (found["rest"] == rest.take(row, axis=0)).all(axis=1) & self._valid.take(found["tag"])
            hit[row[equal]] = True
            self._file.check()
            self._pages += len(place)
            if self._pages > _MAX_PAGES:
                self.forget_pages()
        return hit

    def forget_pages(self) -> None:
        """Unmap what was read of the file: it stays in the kernel's cache, but is no memory of this process."""
        self._pages = 0
        self._file.forget_pages()

    def source(self) -> Source:
        """Return the keys of the hours that are kept now."""
        return _KeptKeys(self._file, self._records, self.kept if len(self.kept) < len(self.counts) else None)


class _KeptKeys:
    """The keys of some hours of a file, which may be deleted meanwhile."""

    def __init__(self, file: RunFile, records: Records, hours: Collection[int] | None) -> None:
        """Take the records of a share of a file. `hours` is None for all hours."""
        self._file, self._records = file, records
        self._kept = None if hours is None else np.zeros(TAGS, np.bool_)
        if self._kept is not None:
            self._kept[[hour % TAGS for hour in hours or ()]] = True

    def __len__(self) -> int:
        return len(self._records)

    @property
    def words(self) -> int:
        return _words_of(self._records)

    def heads(self, step: int) -> Words:
        self._file.check()
        return self._records["head"][::step].astype(np.uint64)

    def positions(self, bounds: Words) -> Ints:
        self._file.check()
        return _positions(self._records, bounds)

    def records(self, first: int, end: int) -> Records:
        self._file.check()
        found = self._records[first:end].copy()
        self._file.check()
        self._file.forget_pages()
        return found if self._kept is None else found[self._kept.take(found["tag"])]


class _Index:
    """The directory and the low byte of each head."""

    def __init__(self, share: Share, keys: int) -> None:
        """Make room for `keys` keys."""
        self._share = share
        self._cells = np.zeros(max(1, keys // _KEYS_PER_CELL) + 1, np.uint32)
        self._bytes = np.zeros(keys + 8, np.uint8)
        self._words = np.ndarray(keys + 1, "<u8", self._bytes, strides=(1,))  # the 8 bytes from each position on
        self._lock = Lock()

    @property
    def nbytes(self) -> int:
        return self._cells.nbytes + self._bytes.nbytes

    def note(self, at: int, head: Words) -> None:
        """Note the heads of the records from position `at` on; in any thread."""
        if len(head):
            self._bytes[at : at + len(head)] = head & _LOW_BYTE
            cell = self._share.cells(head, len(self._cells) - 1)
            counts = np.bincount(cell - cell[0])
            with self._lock:
                self._cells[cell[0] + 1 : cell[0] + 1 + len(counts)] += counts.astype(np.uint32)

    def complete(self) -> None:
        """Sum up the cells, after all heads were noted."""
        np.cumsum(self._cells, out=self._cells)

    def candidates(self, head: Words) -> tuple[Ints, Ints]:
        """Return pairs of a row and a position whose low bytes agree."""
        cell = self._share.cells(head, len(self._cells) - 1)
        at, end = self._cells.take(cell).astype(np.int64), self._cells.take(cell + 1).astype(np.int64)
        row, wanted = np.arange(len(head)), (head & _LOW_BYTE) * EACH_BYTE
        rows, places = [], []
        while (inside := np.flatnonzero(at < end)).size:
            if len(inside) < len(at):
                row, at, end, wanted = row.take(inside), at.take(inside), end.take(inside), wanted.take(inside)
            # Bytes that are zero after the exclusive or get their top bit; the borrow of one may mark the next ones.
            # Source: H. Warren, Hacker's Delight, second edition, 6-1.
            tops = self._words[at] ^ wanted
            tops = (tops - EACH_BYTE) & ~tops & _TOPS & _MASKS.take(end - at, mode="clip")
            some = np.flatnonzero(tops)
            which, byte = tops.take(some).astype("<u8").view(np.uint8).reshape(-1, 8).nonzero()
            some = some.take(which)
            rows.append(row.take(some))
            places.append(at.take(some) + byte)
            at = at + 8
        if not rows:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate(rows), np.concatenate(places)


class _Writer:
    """Writes records, in order, into a new file."""

    def __init__(self, path: Path, words: int, share: Share, keys: int) -> None:
        """`keys` is at least the number of records."""
        self._path, self._type = path, record_type(words)
        self._stream = path.open("x+b")
        self._index = _Index(share, keys)
        self._counts = np.zeros(TAGS, np.int64)
        self._checksums, self._in_block, self._keys = [0], 0, 0

    def append(self, records: Records) -> None:
        a = 0
        while a < len(records):
            part = records[a : a + _BLOCK - self._in_block]
            data = part.view(np.uint8).data
            self._stream.write(data)
            self._checksums[-1] = zlib.crc32(data, self._checksums[-1])
            self._in_block += len(part)
            if self._in_block == _BLOCK:
                self._checksums.append(0)
                self._in_block = 0
            a += len(part)
        self._index.note(self._keys, records["head"].astype(np.uint64))
        self._counts += np.bincount(records["tag"], minlength=TAGS)
        self._keys += len(records)

    def finish(self, hours: Iterable[int]) -> SpilledRun | None:
        """Force the file to disk. Return it with the keys of these `hours`; None if there are no records."""
        self._stream.flush()
        reach(Point.RUN_WRITTEN)
        os.fsync(self._stream.fileno())
        self._index.complete()
        counts = {hour: int(self._counts[hour % TAGS]) for hour in hours if self._counts[hour % TAGS]}
        if not counts:
            self.discard()
            return None
        file = RunFile(self._path, self._type, self._stream.fileno())
        self._stream.close()
        return SpilledRun(file, file.records, self._index, counts, counts, self._checksums)

    def discard(self) -> None:
        self._stream.close()
        self._path.unlink(missing_ok=True)


def write_run(
    path: Path,
    share: Share,
    sources: Sequence[Source],
    hours: Iterable[int],
    threads: int = 1,
    cancelled: Event | None = None,
) -> SpilledRun | None:
    """Write the keys of at least one source, which are of these `hours`, into a new file. No two hours have one tag.

    Returns None if there are no keys. No hour of the run is kept or live. Raises CacheError, OSError, and
    CancelledError soon after `cancelled` is set; no file is left then.
    """
    writer = _Writer(path, sources[0].words, share, sum(map(len, sources)))
    try:
        for records in merged(sources, threads):
            if cancelled and cancelled.is_set():
                raise CancelledError
            writer.append(records)
        return writer.finish(hours)
    except BaseException:
        writer.discard()
        raise


def _words_of(records: Records) -> int:
    return 1 + int(records.dtype["rest"].shape[0])


def open_run(path: Path, words: int, share: Share, checksums: Sequence[int], written: Mapping[int, int]) -> SpilledRun:
    """Open a file that `write_run` wrote; check and index the keys in `share`, on all cores.

    `checksums` and `written` are those of the written run. No hour is live. Raises CacheError if the file is not as it
    was written, and OSError.
    """
    kind = record_type(words)
    file = RunFile(path, kind)
    whole = file.records
    if len(whole) != sum(written.values()) or len(checksums) != len(whole) // _BLOCK + 1:
        raise CacheError(f"{path.name} does not have the size it was written with")

    def checked(block: int) -> Records:
        records = np.fromfile(path, kind, _BLOCK, offset=block * _BLOCK * kind.itemsize)
        if zlib.crc32(records.view(np.uint8).data) != checksums[block]:
            raise CacheError(f"{path.name} has another checksum than it was written with")
        return records

    bounds = np.array([bound << 32 for bound in (share.first, share.end) if 0 < bound < 1 << 32], np.uint64)
    found_at = _positions(whole, bounds).tolist()
    for block in {at // _BLOCK for end in found_at for at in (end - 1, end) if 0 <= at < len(whole)}:
        checked(block)  # a damaged record may have led the search away from the share
    first, end = found_at[0] if share.first else 0, found_at[-1] if share.end < 1 << 32 else len(whole)
    index, found, lock = _Index(share, end - first), np.zeros(TAGS, np.int64), Lock()

    def note(block: int) -> None:
        start, records = block * _BLOCK, checked(block)
        own = records[max(first - start, 0) : end - start]
        index.note(max(first, start) - first, own["head"].astype(np.uint64))
        tags = np.bincount(own["tag"], minlength=TAGS)
        with lock:
            np.add(found, tags, out=found)

    with ThreadPoolExecutor(os.cpu_count() or 1, "window") as pool:
        list(pool.map(note, range(first // _BLOCK, -(-end // _BLOCK))))
    index.complete()
    file.forget_pages()
    own = {hour: int(found[hour % TAGS]) for hour in written if found[hour % TAGS]}
    return SpilledRun(file, whole[first:end], index, own, written, checksums)


def _positions(records: Records, bounds: Words) -> Ints:
    """Return the position of the first record whose head is at least each bound."""
    low, high = np.zeros(len(bounds), np.int64), np.full(len(bounds), len(records))
    while (open_ := np.flatnonzero(low < high)).size:
        middle = (low[open_] + high[open_]) >> 1
        less = records["head"][middle] < bounds[open_]
        low[open_] = np.where(less, middle + 1, low[open_])
        high[open_] = np.where(less, high[open_], middle)
    return low
