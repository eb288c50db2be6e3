"""The ids of the database's rows in order, a range of ids at a time: DuckDB would hold all of them to sort them."""

from collections.abc import Iterator

import numpy as np

from k2flow.audit.id_runs import Ids, ranges
from k2flow.inspection.row_hashes import SCAN_MB, RowHashStore


def sorted_ids(store: RowHashStore, rows: str) -> Iterator[Ids]:
    """Yield the different ids that a statement gives, in ascending order, about CHUNK at once. Raises AuditError."""
    for first, last in ranges(store.count(f"FROM ({rows})")):
        sql = f"SELECT id FROM ({rows}) WHERE id BETWEEN {first} AND {last}"
        if len(ids := np.unique(store.arrays(sql, memory_mb=SCAN_MB)["id"])):
            yield ids
