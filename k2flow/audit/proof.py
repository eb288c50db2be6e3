"""What earlier audits have proven: which data files and offsets, in a folder that may be deleted.

A proof is a function of the tables. It has, for each data file, the number of its rows and two sums of their hashes,
and for each partition of a topic the extent of each ledger. Row hashes add up: the sum of a table is the sum over its
files. So a compaction is right if the sums of the files that it removed and added agree.

The folder has one file `proof`, and for the newest hours of Gold the ids: `id_runs`. The file `candles` has the hours
whose candles are proven. All have checksums. What is damaged, or was made by another version or for other tables, is
refused, and everything is read again.
"""

import hashlib
import json
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout

from k2flow.audit.id_runs import IdRun, damaged_run

FILE, CANDLES, LOCK = "proof", "candles", "lock"
HOUR_SECONDS = 3600
_MODULUS = 2**64
Hours = dict[int, dict[str, list[IdRun]]]  # of Gold, since 1970: the sorted ids of each exchange


class NotProvenError(Exception):
    """The new files and the earlier proof do not add up, so everything must be read again."""


class DroppedProofError(NotProvenError):
    """A proof was there, and cannot be used."""


class RowSum(NamedTuple):
    """A multiset of rows: their number, and two sums of their hashes, modulo 2^64.

    Two different multisets have the same one with a probability of 2^-64 or less.
    """

    rows: int = 0
    hashes: int = 0
    mixed: int = 0

    def plus(self, other: "RowSum") -> "RowSum":
        """Return the sum of both multisets."""
        return RowSum.of(*(mine + its for mine, its in zip(self, other, strict=True)))

    @classmethod
    def of(cls, rows: int, hashes: int | None, mixed: int | None) -> "RowSum":
        """Return the multiset of a statement's count and sums, which are null without rows."""
        return cls(int(rows), int(hashes or 0) % _MODULUS, int(mixed or 0) % _MODULUS)


class FileProof(NamedTuple):
    """A data file whose rows are right.

    `sums` are those of its rows by exchange in a shared table, else by "". `pending`: a table was behind, so its last
    messages are compared again.
    """

    partition: tuple[Any, ...]
    pending: bool
    sums: dict[str, RowSum]

    @property
    def total(self) -> RowSum:
        """The sum of all rows."""
        total = RowSum()
        for each in self.sums.values():
            total = total.plus(each)
        return total


Extents = dict[str, dict[str, tuple[int, int, int]]]  # of each log of a topic's partition, by layer


@dataclass(frozen=True, kw_only=True)
class Proof:
    """What was proven about the tables of some exchanges.

    `made_for` are the tables, versions and settings that it holds for. `full_at` is the time (s since 1970) of the last
    audit that read everything. `extents` are the ledgers', by exchange, `newest` Gold's newest hour of each exchange.
    """

    made_for: str
    full_at: float
    extents: Mapping[str, Extents] = field(default_factory=dict)
    tables: Mapping[str, Mapping[str, FileProof]] = field(default_factory=dict)
    newest: Mapping[str, int] = field(default_factory=dict)
    ids: Hours = field(default_factory=dict)

    @property
    def rows(self) -> int:
        """The proven rows of all tables."""
        return sum(file.total.rows for files in self.tables.values() for file in files.values())

    def to_json(self) -> bytes:
        """Return the proof as JSON."""
        return json.dumps(vars(self), separators=(",", ":")).encode()

    @classmethod
    def from_json(cls, text: bytes) -> "Proof":
        """Return the proof of `to_json`."""
        found = json.loads(text)
        found["tables"] = {
            table: {
                path: FileProof(tuple(partition), pending, {owner: RowSum(*each) for owner, each in sums.items()})
                for path, (partition, pending, sums) in files.items()
            }
            for table, files in found["tables"].items()
        }
        found["ids"] = {
            int(hour): {owner: [IdRun(*run) for run in runs] for owner, runs in owners.items()}
            for hour, owners in found["ids"].items()
        }
        found["extents"] = {
            exchange: {log: {layer: tuple(extent) for layer, extent in held.items()} for log, held in logs.items()}
            for exchange, logs in found["extents"].items()
        }
        return cls(**found)


class ProofStore:
    """The proof in one folder, which this process alone uses."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._before = {path.name for path in folder.iterdir()}

    def load(self, made_for: str) -> Proof:
        """Return the proof. Raises NotProvenError if there is none, DroppedProofError if it cannot be used."""
        try:
            checksum, text = (self.folder / FILE).read_bytes().split(b"\n", 1)
        except FileNotFoundError:
            raise NotProvenError("no earlier audit has proven anything") from None
        except (OSError, ValueError) as error:
            raise DroppedProofError(f"the proof of earlier audits cannot be read ({error})") from error
        if checksum != digest(text):
            raise DroppedProofError("the proof of earlier audits is damaged")
        try:
            proof = Proof.from_json(text.split(b"\n", 1)[1])
        except (ValueError, TypeError, LookupError, AttributeError) as error:
            raise DroppedProofError("the proof of earlier audits has another format") from error
        if proof.made_for != made_for:
            raise DroppedProofError("the proof of earlier audits is of another version, other settings or other tables")
        if _is_ahead(proof.full_at, *(hour * HOUR_SECONDS for hour in proof.newest.values())):
            raise DroppedProofError("the proof of earlier audits is from the future: the clock was ahead, or is behind")
        if name := damaged_run(self.folder, runs_of(proof)):
            raise DroppedProofError(f"the proof of earlier audits is damaged: {name}")
        return proof

    def last_full(self) -> str | None:
        """Return the time (ISO 8601) of the last audit that read everything and found all invariants to hold."""
        try:
            with (self.folder / FILE).open("rb") as file:
                _, full_at = file.readline(), float(file.readline(50))
            return None if _is_ahead(full_at) else datetime.fromtimestamp(full_at, UTC).isoformat()
        except (OSError, ValueError, OverflowError):
            return None

    def save(self, proof: Proof) -> None:
        """Replace the proof, and remove the runs that it does not use. Raises OSError."""
        self._write(FILE, f"{proof.full_at}\n".encode() + proof.to_json())
        self._remove_others({run.name for run in runs_of(proof)} | {FILE, CANDLES, LOCK})

    def load_candles(self) -> dict[tuple[int, ...], str]:
        """Return the digests of the hours whose candles are proven, by day and hour; none if they cannot be used."""
        try:
            checksum, text = (self.folder / CANDLES).read_bytes().split(b"\n", 1)
            return {(day, hour): files for day, hour, files in json.loads(text)} if checksum == digest(text) else {}
        except (OSError, ValueError, TypeError):
            return {}

    def save_candles(self, hours: Mapping[tuple[int, ...], str]) -> None:
        """Replace the digests of `load_candles`. Raises OSError."""
        self._write(CANDLES, json.dumps([[*hour, files] for hour, files in hours.items()]).encode())

    def undo(self) -> None:
        """Remove what was written since the store was opened, if possible: a full disk must not fill up further."""
        with suppress(OSError):
            self._remove_others(self._before)

    def _write(self, name: str, text: bytes) -> None:
        partial = self.folder / f"{name}.new"
        partial.write_bytes(digest(text) + b"\n" + text)
        partial.replace(self.folder / name)

    def _remove_others(self, used: Collection[str]) -> None:
        for path in self.folder.iterdir():
            if path.name not in used:
                path.unlink()


def runs_of(proof: Proof) -> Iterator[IdRun]:
    """Yield all runs of ids."""
    for owners in proof.ids.values():
        for runs in owners.values():
            yield from runs


@contextmanager
def open_proofs(folder: Path) -> Iterator[ProofStore | str]:
    """Open the store in a folder; return why not, if another process uses it or it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / LOCK, blocking=False)
        lock.acquire()
    except Timeout:
        yield f"another audit uses {folder}"
        return
    except (OSError, NotImplementedError) as error:
        yield f"{folder} cannot be written ({error})"
        return
    try:
        yield ProofStore(folder)
    finally:
        lock.release()


def _is_ahead(*times: float) -> bool:
    """Return whether a time (s since 1970) is later than Gold's newest hour may begin."""
    return max(times) > time.time() + HOUR_SECONDS


def digest(text: bytes) -> bytes:
    """Return the checksum of a proof."""
    return hashlib.blake2b(text, digest_size=16).hexdigest().encode()
