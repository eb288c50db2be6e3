"""Damage to the cache folder of a flow: deleted, changed, or put back as it was before."""

import os
import random
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

SUFFIXES = (".run", ".json")


class Cache:
    """The cached window of one exchange."""

    def __init__(self, cache: Path, exchange_code: str, copies: Path) -> None:
        """`cache` is the folder of all caches; `copies` takes older copies."""
        self._folder = cache / "window" / exchange_code
        self._copies = copies

    def delete(self) -> bool:
        """Return whether there was one."""
        found = self._folder.exists()
        shutil.rmtree(self._folder, ignore_errors=True)
        return found

    def damage(self, pick: float, in_place: bool) -> bool:
        """Change one file: flip a bit, cut, lengthen or overwrite it. Return whether it was done.

        In place: the file itself changes, which no flow may use then. Otherwise another file takes its place, as if a
        person had copied it there.
        """
        chance = random.Random(pick)
        files = sorted(path for path in self._folder.glob("*/*") if path.suffix in SUFFIXES)
        if not files:
            return False
        path = chance.choice(files)
        try:
            data = damaged(path.read_bytes(), chance)
            if in_place:
                path.write_bytes(data)
            else:
                new = path.with_name("damaged")
                new.write_bytes(data)
                new.replace(path)
        except OSError:  # the flow has removed the file just now, or the disk is full
            return False
        return True

    def copy(self) -> Path:
        """Return a copy of the folder. A flow may write it meanwhile, so its files may not fit together."""
        copy = Path(tempfile.mkdtemp(dir=self._copies))
        _copy(self._folder, copy)
        return copy

    def put_back(self, copy: Path) -> bool:
        """Replace the folder by an older copy. Return whether the copy has any file."""
        shutil.rmtree(self._folder, ignore_errors=True)
        _copy(copy, self._folder)
        return any(copy.iterdir())


def _copy(folder: Path, to: Path) -> None:
    with suppress(OSError):  # the disk is full, or a file is gone: the copy is incomplete
        shutil.copytree(folder, to, dirs_exist_ok=True)


def damaged(data: bytes, chance: random.Random) -> bytes:
    """Return other bytes than `data`, if there are any."""
    if not data:
        return os.urandom(18)
    at = chance.randrange(len(data))
    match chance.randrange(4):
        case 0:
            return data[:at] + bytes([data[at] ^ 1 << chance.randrange(8)]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data + data
        case _:
            return bytes(byte ^ 0xA5 for byte in data)
