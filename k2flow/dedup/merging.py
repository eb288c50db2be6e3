"""Keys as records, and the merge of sorted runs: a block of heads at a time, by several threads."""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np

from k2flow.dedup.keys import Ints, Words
from k2flow.dedup.run_file import Records

_BLOCK = 1 << 16  # records sorted at once


def record_type(words: int) -> np.dtype[Any]:
    """Return the type of a record of keys of `words` words."""
    return np.dtype([("head", "<u8"), ("rest", "<u8", (words - 1,)), ("tag", "<u2")])


class Source(Protocol):
    """Keys by ascending head, in memory or in a file. Any thread may read them."""

    def __len__(self) -> int:
        """Return the number of positions, which is at least that of the keys."""

    @property
    def words(self) -> int:
        """The number of words of a key."""

    def heads(self, step: int) -> Words:
        """Return the head at every `step`-th position."""

    def positions(self, bounds: Words) -> Ints:
        """Return the position of the first head that is at least each bound."""

    def records(self, first: int, end: int) -> Records:
        """Return the keys at the positions from `first` to before `end`."""


def merged(sources: Sequence[Source], threads: int) -> Iterator[Records]:
    """Yield the records of all keys of at least one source, by ascending head. Holds a few blocks in memory."""
    largest = max(sources, key=len)
    bounds = np.unique(largest.heads(max(1, _BLOCK * len(largest) // max(1, sum(map(len, sources)))))[1:])
    edges = [[0, *source.positions(bounds).tolist(), len(source)] for source in sources]

    def block(number: int) -> Records:
        return _sorted([each.records(*at[number : number + 2]) for each, at in zip(sources, edges, strict=True)])

    if threads == 1 or not len(bounds):
        yield from map(block, range(len(bounds) + 1))
        return
    waiting: deque[Future[Records]] = deque()
    with ThreadPoolExecutor(threads, "merge ids") as pool:
        for number in range(len(bounds) + 1):
            waiting.append(pool.submit(block, number))
            if len(waiting) > 2 * threads:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _sorted(parts: Sequence[Records]) -> Records:
    """Return the records of all parts. Each part is sorted: the stable sort is a merge."""
    kind = parts[0].dtype
    # As raw bytes: field by field, it takes ten times as long.
    whole = np.concatenate([part.view(f"V{kind.itemsize}") for part in parts])
    if len(parts) > 1:
        whole = whole.take(np.argsort(np.concatenate([part["head"] for part in parts]), kind="stable"))
    return whole.view(kind)
