"""Sorted runs of the ids (64-bit hashes of keys) in Gold's newest hours: 8 bytes an id, in files with a checksum."""

import uuid
import zlib
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

MAX_RUNS = 8
"""The runs of one hour of one exchange. More are merged."""
CHUNK = 2_000_000  # ids held in memory at once, of each run
Ids = npt.NDArray[np.uint64]


class IdRun(NamedTuple):
    """One file: its name, the number of ids and the checksum of its bytes."""

    name: str
    ids: int
    checksum: int


def ranges(ids: int) -> list[tuple[int, int]]:
    """Return ranges of all 64-bit hashes, first and last one, which have about CHUNK of `ids` hashes each."""
    parts = 1 + ids // CHUNK
    starts = [part * (2**64 // parts) for part in range(parts)]
    return list(zip(starts, [*(start - 1 for start in starts[1:]), 2**64 - 1], strict=True))


def write_run(folder: Path, batches: Iterable[Ids]) -> IdRun | None:
    """Write ids, in ascending order over all batches, into a new file; None if there are none. Raises OSError."""
    name, ids, checksum = f"{uuid.uuid4().hex}.ids", 0, 0
    with (folder / name).open("wb") as file:
        for batch in batches:
            content = np.ascontiguousarray(batch, "<u8").data
            file.write(content)
            ids, checksum = ids + len(batch), zlib.crc32(content, checksum)
    if ids:
        return IdRun(name, ids, checksum)
    (folder / name).unlink()
    return None


def damaged_run(folder: Path, runs: Iterable[IdRun]) -> str | None:
    """Return the first run whose file does not have its ids, and why. Reads all of them."""
    for run in runs:
        checksum, size = 0, 0
        try:
            with (folder / run.name).open("rb") as file:
                while content := file.read(CHUNK * 8):
                    checksum, size = zlib.crc32(content, checksum), size + len(content)
        except OSError as error:
            return f"{run.name} cannot be read ({error})"
        if (size, checksum) != (run.ids * 8, run.checksum):
            return f"{run.name} has another checksum"
    return None


def found_in(folder: Path, run: IdRun, ids: Ids) -> npt.NDArray[np.bool_]:
    """Return which of n ids (ascending) a run has: (n,). Holds CHUNK ids of the run at once."""
    found = np.zeros(len(ids), np.bool_)
    stored = np.memmap(folder / run.name, "<u8", "r")
    first, end = int(np.searchsorted(stored, ids[0])), int(np.searchsorted(stored, ids[-1], "right"))
    for start in range(first, end, CHUNK):
        chunk = _read(folder / run.name, start, min(CHUNK, end - start))
        part = slice(int(np.searchsorted(ids, chunk[0])), int(np.searchsorted(ids, chunk[-1], "right")))
        wanted = ids[part]
        at = np.minimum(np.searchsorted(chunk, wanted), len(chunk) - 1)
        found[part] |= chunk[at] == wanted
    return found


def merge_runs(folder: Path, runs: Sequence[IdRun]) -> list[IdRun]:
    """Return `runs`, as one if they are more than MAX_RUNS. Holds about CHUNK ids of all runs at once."""
    if len(runs) <= MAX_RUNS:
        return list(runs)
    merged = write_run(folder, _merged(folder, runs))
    return [merged] if merged else []


def _merged(folder: Path, runs: Sequence[IdRun]) -> Iterator[Ids]:
    stored = [np.memmap(folder / run.name, "<u8", "r") for run in runs]
    ends = np.array([last for _, last in ranges(sum(run.ids for run in runs))], np.uint64)
    cuts = [np.append(0, np.searchsorted(each, ends, "right")) for each in stored]
    for part in range(len(ends)):
        pieces = [
            _read(folder / run.name, cut[part], cut[part + 1] - cut[part]) for run, cut in zip(runs, cuts, strict=True)
        ]
        yield np.sort(np.concatenate(pieces))


def _read(path: Path, first: int, count: int) -> Ids:
    return np.fromfile(path, "<u8", count, offset=first * 8)
