"""Merges sorted streams of batches into one, in little memory."""

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.iceberg.writer import sort_rows

CHUNK_ROWS = 256_000
LIMIT_ROWS = 1_000_000


@dataclass(frozen=True)
class Source:
    """Batches in ascending order of a time column; no row is earlier than `lower`. `open` starts to read them."""

    lower: int
    open: Callable[[], Iterator[pa.RecordBatch]]


def merge_sorted(
    sources: Sequence[Source], time_column: str, chunk_rows: int = CHUNK_ROWS, limit_rows: int = LIMIT_ROWS
) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield all rows of all sources, in batches of about `chunk_rows`, each with the number of its run.

    Rows ascend within a run. There is one run, unless the sources overlap so much that `limit_rows` rows wait for
    sources that are not read yet. Then the waiting rows are yielded, and a new run begins. A source is opened once its
    first row may be the next. Memory: about `limit_rows` rows, and one batch of each open source.
    """
    # By the position of each source. The earliest source is read next; only rows up to its position can be yielded.
    heap: list[tuple[int, int]] = [(source.lower, i) for i, source in enumerate(sources)]
    heapq.heapify(heap)
    reading: dict[int, Iterator[pa.RecordBatch]] = {}
    held: list[pa.RecordBatch] = []
    rows = run = 0
    while heap:
        _, i = heap[0]
        if i not in reading:
            reading[i] = sources[i].open()
        batch = next(reading[i], None)
        if batch is None:
            heapq.heappop(heap)
            del reading[i]
        elif batch.num_rows:
            held.append(batch)
            rows += batch.num_rows
            heapq.heapreplace(heap, (int(_times(batch, time_column)[-1]), i))
        if rows < chunk_rows or not heap:
            continue
        cuts = [int(np.searchsorted(_times(each, time_column), heap[0][0], side="right")) for each in held]
        ready = sum(cuts)
        if rows - ready >= limit_rows or (rows >= limit_rows and ready < chunk_rows // 2):
            yield run, _sorted_chunk(held, time_column)
            held, rows = [], 0
            run += 1
        elif ready >= chunk_rows // 2:
            yield run, _sorted_chunk([each.slice(0, cut) for each, cut in zip(held, cuts, strict=True)], time_column)
            held = [each.slice(cut) for each, cut in zip(held, cuts, strict=True) if cut < each.num_rows]
            rows -= ready
    if held:
        yield run, _sorted_chunk(held, time_column)


def concatenate(sources: Sequence[Source], chunk_rows: int = CHUNK_ROWS) -> Iterator[tuple[int, pa.RecordBatch]]:
    """Yield all rows of all sources, one source after the other, as one run."""
    held: list[pa.RecordBatch] = []
    for source in sources:
        for batch in source.open():
            held.append(batch)
            if sum(each.num_rows for each in held) >= chunk_rows:
                yield 0, pa.concat_batches(held)
                held = []
    if held:
        yield 0, pa.concat_batches(held)


def _sorted_chunk(batches: Sequence[pa.RecordBatch], time_column: str) -> pa.RecordBatch:
    return sort_rows(pa.concat_batches(batches), time_column)


def _times(batch: pa.RecordBatch, time_column: str) -> npt.NDArray[np.int64]:
    times: npt.NDArray[np.int64] = batch.column(time_column).cast(pa.int64()).to_numpy()
    return times
