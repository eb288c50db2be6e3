"""Merging sorted streams gives the same rows as sorting everything."""

from collections.abc import Iterator

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from k2flow.maintain.compaction import Source, concatenate, merge_sorted

SCHEMA = pa.schema([("timestamp", pa.timestamp("us", "UTC")), ("id", pa.int64())])
streams = st.lists(st.lists(st.lists(st.integers(-50, 50), max_size=6), max_size=5), max_size=6)


def sources(streams: list[list[list[int]]]) -> list[Source]:
    """Return a source per stream: its values, sorted, in batches of the given lengths; each row has its own number."""
    found, number = [], 0
    for lengths in streams:
        times = sorted(time for batch in lengths for time in batch)
        batches = []
        for batch in lengths:
            here, times = times[: len(batch)], times[len(batch) :]
            ids = range(number, number + len(here))
            number += len(here)
            columns = [pa.array(here, pa.int64()).cast(SCHEMA[0].type), pa.array(ids, pa.int64())]
            batches.append(pa.RecordBatch.from_arrays(columns, schema=SCHEMA))
        lower = min((time for batch in lengths for time in batch), default=0)
        found.append(Source(lower, lambda batches=batches: iter(batches)))
    return found


def rows(batches: Iterator[tuple[int, pa.RecordBatch]]) -> list[tuple[int, int, int]]:
    return [
        (run, time, number)
        for run, batch in batches
        for time, number in zip(batch[0].cast(pa.int64()).to_pylist(), batch[1].to_pylist(), strict=True)
    ]


@given(streams, st.integers(1, 20), st.integers(1, 40))
def test_each_row_appears_once_and_each_run_ascends(streams: list[list[list[int]]], chunk: int, limit: int) -> None:
    found = rows(merge_sorted(sources(streams), "timestamp", chunk, limit))
    assert sorted(number for _, _, number in found) == list(range(len(found)))
    assert len(found) == sum(len(batch) for stream in streams for batch in stream)
    assert [(run, time) for run, time, _ in found] == sorted((run, time) for run, time, _ in found)


@given(streams, st.integers(1, 20))
def test_one_run_if_all_rows_may_be_held(streams: list[list[list[int]]], chunk: int) -> None:
    found = rows(merge_sorted(sources(streams), "timestamp", chunk, 10_000))
    assert {run for run, _, _ in found} <= {0}


@given(streams, st.integers(1, 20))
def test_concatenation_keeps_the_order_of_rows(streams: list[list[list[int]]], chunk: int) -> None:
    found = rows(concatenate(sources(streams), chunk))
    assert [number for _, _, number in found] == list(range(len(found)))


def test_source_is_opened_only_if_its_rows_may_be_next() -> None:
    opened: list[int] = []

    def source(n: int) -> Source:
        def read() -> Iterator[pa.RecordBatch]:
            opened.append(n)
            times = pa.array(range(n * 100, n * 100 + 100)).cast(SCHEMA[0].type)
            yield pa.RecordBatch.from_arrays([times, pa.array([n] * 100)], schema=SCHEMA)

        return Source(n * 100, read)

    batches = merge_sorted([source(n) for n in range(50)], "timestamp", chunk_rows=100, limit_rows=1_000)
    next(batches)
    assert len(opened) < 5
