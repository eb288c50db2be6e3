"""The folder of one worker's cache: who uses it, which files it has, and what they hold.

    <cache>/window/<exchange>/<worker>-of-<workers>/
        lock           locked by the process that uses the folder
        manifest.json  what the runs hold, with a checksum: replaced atomically
        figures.json   the size and use of the window, for `k2flow status`: replaced atomically
        <number>.run   sorted runs, see `spilled`. Those that the manifest does not name are garbage

All of it can be deleted at any time. What cannot be used is said in one warning, and is read from Gold instead.
"""

import errno
import fcntl
import logging
import os
import re
import sys
import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from shutil import rmtree
from typing import IO

from pydantic import TypeAdapter

from k2flow.dedup.keys import Share, share_of
from k2flow.errors import CacheError
from k2flow.failpoints import Point, reach

log = logging.getLogger(__name__)
FORMAT = f"2-{sys.byteorder}"
MANIFEST = "manifest.json"
FIGURES = "figures.json"
_PART = re.compile(r"(\d{1,4})-of-(\d{1,4})")  # a start looks at each worker of such a number


@dataclass(frozen=True)
class Origin:
    """Whose ids a cache holds: only a cache of the same origin is used."""

    exchange: str
    key: tuple[str, ...]
    format: str = FORMAT


@dataclass(frozen=True)
class Position:
    """A state of Gold: its table, the sequence number of its snapshot, and the id of the snapshot."""

    table: str
    number: int
    snapshot: int | None


@dataclass(frozen=True)
class RunEntry:
    """A run file: the form and words of its keys, their number by hour, the hours that count, a checksum per block."""

    name: str
    form: int
    words: int
    written: Mapping[int, int]
    kept: Sequence[int]
    checksums: Sequence[int]


@dataclass(frozen=True)
class Manifest:
    """What the runs of a folder hold.

    `hours` has the proofs of each hour: pairs of a sequence number and of the rows that Gold had in the hour up to it.
    If Gold still has as many, no row was removed: the runs have all ids up to the least of these numbers, and no id
    that is not in Gold.
    """

    origin: Origin
    position: Position
    hours: Mapping[int, Sequence[tuple[int, int]]]
    runs: Sequence[RunEntry]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """The size and use of one worker's window at a time (ms since 1970)."""

    at: int
    hours: int
    ids: int  # in memory and on disk
    disk_ids: int
    memory_bytes: int
    disk_bytes: int
    disk_hits: int  # duplicates found on disk since the start


_JSON: TypeAdapter[Manifest] = TypeAdapter(Manifest)
_FIGURES: TypeAdapter[Figures] = TypeAdapter(Figures)


class CacheFolder:
    """The folder of one worker, locked until `close` or the end of the process."""

    def __init__(self, cache: Path, origin: Origin, worker: int, workers: int) -> None:
        """Touch no file yet. `cache` is the folder of all caches."""
        self.origin, self.share = origin, share_of(worker, workers)
        self._exchange = cache / "window" / origin.exchange
        self.path = self._exchange / f"{worker}-of-{workers}"
        self._lock: IO[bytes] | None = None
        self._warned = False
        self._number = 0

    @property
    def is_open(self) -> bool:
        """Whether files can be written."""
        return self._lock is not None

    def open(self) -> None:
        """Create and lock the folder. Warns if it cannot be used: then it is not open."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            lock = (self.path / "lock").open("ab")
        except OSError as error:
            self.warn(f"it cannot be written ({error.strerror}): the ids of the window stay in memory")
            return
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            lock.close()
            self.warn("another process uses it: the ids of the window stay in memory")
            return
        self._lock = lock

    def close(self) -> None:
        """Unlock the folder."""
        if self._lock:
            self._lock.close()
            self._lock = None

    def warn(self, what: str) -> None:
        """Log the only warning about this folder."""
        if not self._warned:
            log.warning("cache of the deduplication window in %s: %s", self.path, what)
        self._warned = True

    def new_path(self) -> Path:
        """Return the path of a new run. Raises OSError."""
        self._check_own()
        self._number += 1
        while (path := self.path / f"{self._number}.run").exists():
            self._number += 1
        return path

    def read(self) -> Manifest | None:
        """Return the manifest; None if there is none. Raises CacheError if it is damaged or of another origin."""
        return _read(self.path, self.origin)

    def write(self, manifest: Manifest, unfinished: str | None = None) -> None:
        """Replace the manifest, then remove the other runs, but not an `unfinished` one. Raises OSError."""
        self._check_own()
        new = self.path / f"{MANIFEST}.new"
        with new.open("wb") as stream:
            stream.write(_with_checksum(_JSON.dump_json(manifest)))
            stream.flush()
            reach(Point.CACHE_WRITTEN)
            os.fsync(stream.fileno())
        new.replace(self.path / MANIFEST)
        _sync(self.path)
        reach(Point.CACHE_REPLACED)
        self.clear({each.name for each in manifest.runs}, unfinished)

    def write_figures(self, figures: Figures) -> None:
        """Replace the figures. Nothing depends on them, so an error is not worth a warning."""
        with suppress(OSError):
            self._check_own()
            new = self.path / f"{FIGURES}.new"
            new.write_bytes(_with_checksum(_FIGURES.dump_json(figures)))
            new.replace(self.path / FIGURES)

    def clear(self, kept: Iterable[str] = (), unfinished: str | None = None) -> None:
        """Remove all runs but those `kept` and the `unfinished` one; without any `kept`, the manifest too."""
        kept = {*kept}
        if not kept:
            (self.path / MANIFEST).unlink(missing_ok=True)
        for path in self.path.glob("*.run"):
            if path.name not in {*kept, unfinished}:
                path.unlink(missing_ok=True)

    def of_other_workers(self) -> list[tuple[Path, Manifest]]:
        """Return the newest caches of another number of workers that together have all keys of this share, or none.

        Raises CacheError if one of them is damaged.
        """
        parts: dict[int, list[Path]] = {}
        for path, share, workers in self._others():
            if share.meets(self.share):
                parts.setdefault(workers, []).append(path)
        for workers in sorted(parts, key=lambda each: -max((path / MANIFEST).stat().st_mtime for path in parts[each])):
            if sum(share_of(i, workers).meets(self.share) for i in range(workers)) == len(parts[workers]):
                found = [(path, _read(path, self.origin)) for path in parts[workers]]
                return [(path, manifest) for path, manifest in found if manifest]
        return []

    def remove_other_workers(self) -> None:
        """Remove the caches of other numbers of workers that no process uses, if possible."""
        for path, _, _ in self._others():
            with suppress(OSError), (path / "lock").open("ab") as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                rmtree(path)

    def link(self, folder: Path, name: str) -> Path:
        """Add a run of another folder, without a copy. Raises OSError."""
        path = self.new_path()
        path.hardlink_to(folder / name)
        return path

    def _check_own(self) -> None:
        """Raise OSError if the folder is not the locked one: after a deletion another process may have made it."""
        own = self._lock and os.fstat(self._lock.fileno())
        if not own or not os.path.samestat(own, (self.path / "lock").stat()):
            raise FileNotFoundError(errno.ENOENT, "it is no longer the folder that was locked")

    def _others(self) -> Iterator[tuple[Path, Share, int]]:
        for path in sorted(self._exchange.iterdir()):
            name = _PART.fullmatch(path.name)
            if name and path != self.path and int(name[1]) < int(name[2]) and (path / MANIFEST).exists():
                yield path, share_of(int(name[1]), int(name[2])), int(name[2])


def read_figures(cache: Path, exchange: str) -> tuple[int, list[Figures]] | None:
    """Return a number of workers and the figures that they wrote: the number that wrote last. None without figures.

    `cache` is the folder of all caches. Figures that are damaged, or cannot be read, are left out.
    """
    found: defaultdict[int, list[Figures]] = defaultdict(list)
    with suppress(OSError):
        for path in sorted((cache / "window" / exchange).iterdir()):
            if name := _PART.fullmatch(path.name):
                with suppress(OSError, ValueError):
                    figures = _FIGURES.validate_json(_without_checksum((path / FIGURES).read_bytes()))
                    found[int(name[2])].append(figures)
    return max(found.items(), key=lambda each: max(figures.at for figures in each[1]), default=None)


def _read(folder: Path, origin: Origin) -> Manifest | None:
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise CacheError(f"its manifest cannot be read ({error.strerror})") from error
    try:
        manifest = _JSON.validate_json(_without_checksum(data))
    except ValueError as error:
        raise CacheError("its manifest is damaged, or of another version of k2flow") from error
    if manifest.origin != origin:
        raise CacheError(f"it is of {_named(manifest.origin)}, not of {_named(origin)}")
    return manifest


def _with_checksum(text: bytes) -> bytes:
    return b"%08x\n%s" % (zlib.crc32(text), text)


def _without_checksum(data: bytes) -> bytes:
    """Return the text that `_with_checksum` was given. Raises ValueError if it is damaged."""
    checksum, _, text = data.partition(b"\n")
    if int(checksum, 16) != zlib.crc32(text):
        raise ValueError("the checksum is another one")
    return text


def _named(origin: Origin) -> str:
    return f"exchange {origin.exchange}, key {' and '.join(origin.key)}, format {origin.format}"


def _sync(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
