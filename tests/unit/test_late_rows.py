"""Rows of Gold that are written now, and rows that are held back until the tables commit."""

from collections import Counter
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from k2flow.layers import SILVER
from k2flow.trades.deduplicate import FEW_ROWS, HELD_BYTES, LateRows, are_few, split_by_owner
from k2flow.trades.messages import MessageBatch

NONE = np.zeros(0, np.bool_)
BATCHES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 2 * FEW_ROWS)), max_size=6),  # hours, and rows of each
        st.floats(0, 1),  # how many of them are new
        st.booleans(),  # whether it asks for a commit
    ),
    max_size=8,
)


@given(BATCHES)
def test_new_rows_are_written_once_and_before_the_commit(
    batches: list[tuple[list[tuple[int, int]], float, bool]],
) -> None:
    late, chance = LateRows(), np.random.default_rng(1)
    written: list[int] = []
    given_: list[int] = []
    for runs, share, commit in batches:
        hours = np.repeat([h for h, _ in runs], [n for _, n in runs]).astype(np.int64)
        numbers = np.arange(len(hours)) + len(given_) * 1_000_000
        first = chance.random(len(hours)) < share
        rows = numbered(numbers)
        ready = late.ready(rows, first, hours, commit)
        given_ += numbers[first].tolist()
        written += ready.column("number").to_pylist()
        if commit:
            assert len(given_) == len(written)
        else:
            of_hour = Counter(hours[first].tolist())
            assert all(of_hour[hour] <= 6 * FEW_ROWS for hour in hours[first & ~np.isin(numbers, written)].tolist())
    assert Counter(written) <= Counter(given_)
    written += late.ready(numbered(np.zeros(0, np.int64)), NONE, np.zeros(0, np.int64), ends_checkpoint=True)[
        "number"
    ].to_pylist()
    assert sorted(written) == sorted(given_)


def numbered(numbers: npt.NDArray[np.int64], text: str = "") -> pa.RecordBatch:
    return pa.RecordBatch.from_arrays([pa.array(numbers), pa.repeat(text, len(numbers))], names=["number", "text"])


def test_only_new_rows_count_as_rows_of_an_hour() -> None:
    late, numbers = LateRows(), np.arange(3 * FEW_ROWS)
    first = numbers % 100 == 0
    assert late.ready(numbered(numbers), first, np.zeros_like(numbers), ends_checkpoint=False).num_rows == 0
    new = late.ready(numbered(numbers), ~first, np.zeros_like(numbers), ends_checkpoint=False)
    assert new.num_rows == np.count_nonzero(~first)


def test_rows_of_an_hour_with_few_rows_are_found() -> None:
    hours = np.repeat([5, 6, 5, 7], [1, FEW_ROWS + 1, FEW_ROWS, 2 * FEW_ROWS])
    assert np.flatnonzero(are_few(hours)).tolist() == [0, *range(FEW_ROWS + 2, 2 * FEW_ROWS + 2)]
    assert are_few(np.zeros(0, np.int64)).tolist() == []
    assert are_few(np.array([np.iinfo(np.int64).min])).tolist() == [True]


def test_held_rows_are_bounded() -> None:
    """Hours with a few large rows each, without a commit, are written once they exceed the limit."""
    late, size, held = LateRows(), 50_000, 0
    hours, first = np.arange(10), np.ones(10, np.bool_)
    for _ in range(100):
        ready = late.ready(numbered(hours, "x" * size), first, hours, ends_checkpoint=False)
        held += 10 - ready.num_rows
        assert 0 <= held * size <= HELD_BYTES
        assert ready.num_rows in (0, HELD_BYTES // size // 10 * 10 + 10)


def test_every_owner_gets_the_end_of_a_checkpoint() -> None:
    """Also an owner without new keys: it must write the rows it holds back."""
    empty = pa.RecordBatch.from_pylist([], schema=SILVER.arrow_schema)
    nothing = MessageBatch(empty, np.zeros(0, np.int32), np.zeros(0, np.int64), [])
    owned = split_by_owner(nothing, {}, ("message_id",), 3)
    assert [(each.owner, each.owners, each.ends_checkpoint) for each in owned] == [(w, 3, True) for w in range(3)]
    assert split_by_owner(replace(nothing, ends_checkpoint=False), {}, ("message_id",), 3) == []
