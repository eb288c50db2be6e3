"""Message batches: replay filtering, ranges."""

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from k2flow.iceberg.ledger import OffsetRange
from k2flow.trades.messages import MessageBatch


def make(rows: list[tuple[int, int]], offsets: list[tuple[int, int, int]]) -> MessageBatch:
    batch = pa.record_batch({"row": [f"{p}:{o}" for p, o in rows]}, schema=pa.schema([("row", pa.string())]))
    partition = np.array([p for p, _ in rows], np.int32)
    return MessageBatch(batch, partition, np.array([o for _, o in rows], np.int64), offsets)


def names(part: MessageBatch) -> list[str]:
    return part.rows.column("row").to_pylist()


def test_ranges_count_rows() -> None:
    part = make([(0, 3), (2, 8), (0, 4)], [(0, 3, 6), (1, 0, 2), (2, 8, 9)])
    assert part.ranges() == [OffsetRange(0, 3, 6, 2), OffsetRange(1, 0, 2, 0), OffsetRange(2, 8, 9, 1)]


def test_ranges_of_no_rows() -> None:
    assert make([], [(4, 0, 2)]).ranges() == [OffsetRange(4, 0, 2, 0)]
    assert make([], []).ranges() == []


def test_batch_without_committed_rows_is_returned_unchanged() -> None:
    part = make([(0, 3)], [(0, 3, 4)])
    assert part.after({}) is part
    assert part.after({0: 3, 7: 100}) is part


@given(
    st.dictionaries(st.integers(0, 3), st.tuples(st.integers(0, 8), st.integers(1, 8)), max_size=4),
    st.dictionaries(st.integers(0, 3), st.integers(0, 20), max_size=4),
)
def test_after_keeps_exactly_the_uncommitted_rows(
    extents: dict[int, tuple[int, int]], committed: dict[int, int]
) -> None:
    offsets = [(p, first, first + n) for p, (first, n) in extents.items()]
    rows = [(p, o) for p, first, end in offsets for o in range(first, end) if o % 3]  # gaps, as in a compacted topic
    left = make(rows, offsets).after(committed)
    assert names(left) == [f"{p}:{o}" for p, o in rows if o >= committed.get(p, 0)]
    wanted = [(p, max(first, committed.get(p, 0)), end) for p, first, end in offsets if end > committed.get(p, 0)]
    assert left.offsets == wanted
    assert sum(r.rows for r in left.ranges()) == left.rows.num_rows
