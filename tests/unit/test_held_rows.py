"""Rows of Gold that are written now, and rows that are held back until they make a file, or the tables commit."""

import pickle
from collections import Counter
from collections.abc import Iterator
from unittest.mock import patch

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.layers import HOUR_US, SILVER
from k2flow.trades import deduplicate
from k2flow.trades.deduplicate import FEW_ROWS, HELD_BYTES, HeldRows, OwnedTrades, are_few, split_by_owner
from k2flow.trades.messages import MessageBatch

NONE = np.zeros(0, np.bool_)
ROW_BYTES = 20  # of `trades` without a text
LIMIT = 5 * FEW_ROWS * ROW_BYTES
BATCHES = st.lists(
    st.tuples(
        st.lists(st.tuples(st.integers(-3, 3), st.integers(1, 2 * FEW_ROWS)), max_size=6),  # hours, and rows of each
        st.floats(0, 1),  # how many of them are new
        st.booleans(),  # whether it asks for a commit
    ),
    max_size=8,
)


@pytest.fixture
def small_limit() -> Iterator[None]:
    with patch.object(deduplicate, "HELD_BYTES", LIMIT):
        yield


def trades(hours: npt.NDArray[np.int64], first_number: int = 0, text: str = "") -> pa.RecordBatch:
    """Return rows of some hours, each with a number."""
    columns = [
        pa.array(hours * HOUR_US, pa.timestamp("us", "UTC")),
        pa.array(np.arange(first_number, first_number + len(hours))),
        pa.repeat(text, len(hours)),
    ]
    return pa.RecordBatch.from_arrays(columns, names=["timestamp", "number", "text"])


def all_of(rows: pa.RecordBatch) -> npt.NDArray[np.bool_]:
    return np.ones(rows.num_rows, np.bool_)


@given(BATCHES)
def test_new_rows_are_written_once_and_before_the_commit(
    batches: list[tuple[list[tuple[int, int]], float, bool]],
) -> None:
    held, chance = HeldRows(), np.random.default_rng(1)
    written: list[int] = []
    given_: list[int] = []
    with patch.object(deduplicate, "HELD_BYTES", LIMIT):
        for i, (runs, share, commit) in enumerate(batches):
            hours = np.repeat([h for h, _ in runs], [n for _, n in runs]).astype(np.int64)
            rows = trades(hours, i * 1_000_000)
            first = chance.random(len(hours)) < share
            written += held.ready(rows, first, commit).column("number").to_pylist()
            given_ += rows.filter(pa.array(first)).column("number").to_pylist()
            waiting = len(given_) - len(written)
            assert waiting == 0 if commit else 0 <= waiting * ROW_BYTES < 2 * LIMIT + ROW_BYTES
        assert Counter(written) <= Counter(given_)
        written += held.ready(trades(np.zeros(0, np.int64)), NONE, ends_checkpoint=True)["number"].to_pylist()
    assert sorted(written) == sorted(given_)


@pytest.mark.usefixtures("small_limit")
def test_parts_of_several_workers_make_one_file() -> None:
    held, part = HeldRows(), trades(np.zeros(2 * FEW_ROWS, np.int64))
    sizes = [held.ready(part, all_of(part), ends_checkpoint=False).num_rows for _ in range(6)]
    assert sizes == [0, 0, 3 * part.num_rows] * 2


@pytest.mark.usefixtures("small_limit")
def test_few_rows_of_an_hour_wait_for_the_commit() -> None:
    held = HeldRows()
    rows = trades(np.repeat([5, 6], [6 * FEW_ROWS, FEW_ROWS // 2]))
    for _ in range(3):
        ready = held.ready(rows, all_of(rows), ends_checkpoint=False)
        assert ready["timestamp"].cast(pa.int64()).to_pylist() == [5 * HOUR_US] * (6 * FEW_ROWS)
    last = held.ready(rows.slice(0, 0), NONE, ends_checkpoint=True)
    assert last["timestamp"].cast(pa.int64()).to_pylist() == [6 * HOUR_US] * (3 * FEW_ROWS // 2)


@pytest.mark.usefixtures("small_limit")
def test_only_new_rows_count_as_rows_of_an_hour() -> None:
    held, rows = HeldRows(), trades(np.zeros(10 * FEW_ROWS, np.int64))
    first = np.arange(rows.num_rows) % 20 == 0
    assert held.ready(rows, first, ends_checkpoint=False).num_rows == 0
    ready = held.ready(rows, ~first, ends_checkpoint=False)
    assert ready.num_rows == rows.num_rows


def test_rows_of_an_hour_with_few_rows_are_found() -> None:
    hours = np.repeat([5, 6, 5, 7], [1, FEW_ROWS + 1, FEW_ROWS, 2 * FEW_ROWS])
    assert np.flatnonzero(are_few(hours)).tolist() == [0, *range(FEW_ROWS + 2, 2 * FEW_ROWS + 2)]
    assert are_few(np.zeros(0, np.int64)).tolist() == []
    assert are_few(np.array([np.iinfo(np.int64).min])).tolist() == [True]


def test_held_rows_are_bounded() -> None:
    """Hours with a few large rows each, without a commit, are written once they exceed the limit."""
    held, size, waiting = HeldRows(), 50_000, 0
    rows = trades(np.arange(10), text="x" * size)
    for _ in range(200):
        waiting += 10 - held.ready(rows, all_of(rows), ends_checkpoint=False).num_rows
        assert 0 <= waiting * size <= 2 * HELD_BYTES


@pytest.mark.parametrize(
    ("offsets", "ends_checkpoint", "sent"),
    [
        ([(0, 5, 9)], True, True),  # it must write the rows it holds back
        ([], False, True),  # a source's first batch: the owner's step begins
        ([(0, 5, 9)], False, False),
    ],
)
def test_owner_without_new_keys_gets_what_it_needs(
    offsets: list[tuple[int, int, int]], ends_checkpoint: bool, sent: bool
) -> None:
    empty = pa.RecordBatch.from_pylist([], schema=SILVER.arrow_schema)
    batch = MessageBatch(empty, np.zeros(0, np.int32), np.zeros(0, np.int64), offsets, ends_checkpoint)
    owned = split_by_owner(batch, {}, ("message_id",), 3)
    wanted = [(w, 3, ends_checkpoint) for w in range(3)] if sent else []
    assert [(each.owner, each.owners, each.ends_checkpoint) for each in owned] == wanted
    assert pickle.loads(pickle.dumps(owned)) == owned


@pytest.mark.parametrize("rows", [1, 7])
def test_pickled_trades_are_the_same_without_the_parent_of_their_rows(rows: int) -> None:
    part = trades(np.arange(100_000)).slice(5, rows)
    sent = OwnedTrades(owner=1, owners=3, rows=part, kafka_hours={7: rows}, ends_checkpoint=True)
    for data in (pickle.dumps(sent), pickle.dumps(sent)):  # Bytewax pickles it twice
        assert len(data) < 3_000
        assert pickle.loads(data) == sent
