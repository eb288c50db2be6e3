"""Which rows of Gold are written now, and which are held back until the tables commit."""

from collections import Counter

import numpy as np
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from k2flow import gold
from k2flow.gold import FEW_ROWS, HELD_ROWS, LateRows, are_few
from k2flow.messages import Slice
from k2flow.routing import worker_key
from k2flow.tables import SILVER_FIELDS, arrow_schema

BATCHES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 2 * FEW_ROWS)), max_size=6),  # hours, and rows of each
        st.floats(0, 1),  # how many of them are new
        st.booleans(),  # whether it asks for a commit
    ),
    max_size=8,
)


@given(BATCHES)
def test_each_new_row_is_written_once_and_before_the_commit(
    batches: list[tuple[list[tuple[int, int]], float, bool]],
) -> None:
    late, chance = LateRows(), np.random.default_rng(1)
    written: list[int] = []
    given_: list[int] = []
    held = 0
    for runs, share, commit in batches:
        hours = np.repeat([h for h, _ in runs], [n for _, n in runs]).astype(np.int64)
        numbers = np.arange(len(hours)) + len(given_) * 1_000_000
        first = chance.random(len(hours)) < share
        rows = pa.RecordBatch.from_arrays([pa.array(numbers), pa.array(hours)], names=["number", "hour"])
        ready = late.ready(rows, first, hours, commit)
        given_ += numbers[first].tolist()
        written += [number for each in ready for number in each.column("number").to_pylist()]
        held = len(given_) - len(written)
        assert 0 <= held <= HELD_ROWS
        if commit:
            assert held == 0
        assert sum(each.num_rows > 0 for each in ready) <= 2
    assert Counter(written) <= Counter(given_)
    late_again = late.ready(rows_without_any(), np.zeros(0, np.bool_), np.zeros(0, np.int64), commit=True)
    written += [number for each in late_again for number in each.column("number").to_pylist()]
    assert sorted(written) == sorted(given_)


def rows_without_any() -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array([], pa.int64()), pa.array([], pa.int64())], names=["number", "hour"])


def test_hours_of_few_rows() -> None:
    hours = np.repeat([5, 6, 5, 7], [1, FEW_ROWS + 1, FEW_ROWS, 2 * FEW_ROWS])
    assert np.flatnonzero(are_few(hours)).tolist() == [0, *range(FEW_ROWS + 2, 2 * FEW_ROWS + 2)]
    assert are_few(np.zeros(0, np.int64)).tolist() == []
    assert are_few(np.array([np.iinfo(np.int64).min])).tolist() == [True]


def test_what_is_held_is_bounded() -> None:
    """Hours of a few rows each, without a commit: they are written once they are many."""
    late = LateRows()
    most = 0
    for start in range(0, 3 * HELD_ROWS, FEW_ROWS):
        numbers = np.arange(start, start + FEW_ROWS)
        rows = pa.RecordBatch.from_arrays([pa.array(numbers)], names=["number"])
        ready = late.ready(rows, np.ones(FEW_ROWS, np.bool_), numbers, commit=False)
        most = max(most, sum(each.num_rows for each in ready))
    assert most == HELD_ROWS + FEW_ROWS


def test_every_owner_is_told_of_a_commit() -> None:
    """Also the ones of whose ids there is none: what they hold back must be written."""
    empty = pa.RecordBatch.from_pylist([], schema=arrow_schema(SILVER_FIELDS))
    nothing = Slice(empty, np.zeros(0, np.int32), np.zeros(0, np.int64), [])
    told = gold.candidates(nothing, 3)
    assert [(key, one.owner, one.commit) for key, one in told] == [(worker_key(w, 3), w, True) for w in range(3)]
    assert gold.candidates(Slice(empty, nothing.partition, nothing.offset, [], commit=False), 3) == []
