"""The ids of the database's rows in order, a range of ids at a time.

DuckDB 1.5 would hold nearly all of tens of millions of ids to sort, group or join them, whatever its memory limit.
"""

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from k2flow.audit.id_runs import Ids, ranges
from k2flow.errors import AuditError
from k2flow.inspection.row_hashes import RowHashStore


def sorted_ids(store: RowHashStore, rows: str) -> Iterator[Ids]:
    """Yield the different ids that a statement gives, in ascending order, about CHUNK at once. Raises AuditError."""
    for ids in ids_without(store, rows):
        yield np.unique(ids)


def repeated_ids(store: RowHashStore, rows: str) -> Iterator[Ids]:
    """Yield the ids that a statement gives more than once, in ascending order, some at a time. Raises AuditError."""
    for ids in ids_without(store, rows):
        repeated = np.unique(ids[1:][ids[1:] == ids[:-1]])
        if len(repeated):
            yield repeated


def count_without(store: RowHashStore, rows: str, *others: str) -> int:
    """Return the number of ids that `ids_without` gives. Raises AuditError."""
    return sum(map(len, ids_without(store, rows, *others)))


def ids_without(store: RowHashStore, rows: str, *others: str) -> Iterator[Ids]:
    """Yield the ids that a statement gives, as often as it does, without those that `others` give.

    They are in ascending order, up to about CHUNK at once. Raises AuditError, also if an id is null.
    """
    expected, read = store.count(f"FROM ({rows})"), 0
    for part in ranges(expected):
        ids = _in_range(store, rows, part)
        read += len(ids)
        for other in others:
            if len(ids):
                ids = ids[~_found(ids, _in_range(store, other, part))]
        if len(ids):
            yield ids
    if read != expected:
        raise AuditError(f"the database of row hashes has {expected - read:,} rows without a hash")


def _in_range(store: RowHashStore, rows: str, part: tuple[int, int]) -> Ids:
    first, last = part
    ids: Ids = np.sort(store.arrays(f"SELECT id FROM ({rows}) WHERE id BETWEEN {first} AND {last}")["id"])
    return ids


def _found(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Return which of n ids are among others, both in order: (n,)."""
    if not len(others):
        return np.zeros(len(ids), np.bool_)
    found: npt.NDArray[np.bool_] = others[np.minimum(np.searchsorted(others, ids), len(others) - 1)] == ids
    return found
