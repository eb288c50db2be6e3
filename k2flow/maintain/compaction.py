"""Merges many small data files into few large ones, sorted as the table is, in little memory."""

import heapq
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import partial

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.iceberg.reader import READ_ROWS, FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import DataFileWriter, sort_rows
from k2flow.maintain.plans import LiveFile

CHUNK_ROWS = 256_000
LIMIT_ROWS = 1_000_000
EARLY_SHARE = 50  # one in 50 rows of a file counts as early


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
            yield run, sort_rows(pa.concat_batches(held), (time_column,))
            held, rows = [], 0
            run += 1
        elif ready >= chunk_rows // 2:
            first = [each.slice(0, cut) for each, cut in zip(held, cuts, strict=True)]
            yield run, sort_rows(pa.concat_batches(first), (time_column,))
            held = [each.slice(cut) for each, cut in zip(held, cuts, strict=True) if cut < each.num_rows]
            rows -= ready
    if held:
        yield run, sort_rows(pa.concat_batches(held), (time_column,))


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


def _times(batch: pa.RecordBatch, time_column: str) -> npt.NDArray[np.int64]:
    times: npt.NDArray[np.int64] = batch.column(time_column).cast(pa.int64()).to_numpy()
    return times


class Compactor:
    """Writes the rows of files of one partition into new files.

    Several threads may use it. Memory per running call: about a million rows, and one row group being written. For a
    sorted table, also the earliest 2 % of each file's rows. Raises CatalogError, DataFileError.
    """

    def __init__(self, table: Table, definition: TableDefinition) -> None:
        own = definition.as_in(table)
        self._writer = DataFileWriter(table, own)
        self._reader = FileReader.of_table(table, definition)
        self._sorted_by = own.layer.sorted_by

    def compact(self, files: Sequence[LiveFile]) -> list[DataFile]:
        """Write new files that hold exactly the rows of `files`. Commit none of them."""
        if self._sorted_by:
            (time_column,) = self._sorted_by
            batches = merge_sorted(self._by_time(files, time_column), time_column)
        else:
            batches = concatenate([Source(0, partial(self._reader.read, live.file)) for live in files])
        return [
            self._writer.write_stream(batch for _, batch in run)
            for _, run in itertools.groupby(batches, key=lambda numbered: numbered[0])
        ]

    def _by_time(self, files: Sequence[LiveFile], column: str) -> list[Source]:
        """Return sources with few overlaps: the earliest rows of all files are one source of their own.

        Otherwise a few late rows would make each file begin long before most of its rows, and all files overlap.
        """
        early, sources = [], []
        for live in files:
            count = max(1, live.file.record_count // EARLY_SHARE)
            with closing(self._reader.read(live.file, count)) as batches:
                first = next(batches, None)
            if first is None:
                continue
            first = first.slice(0, count)
            # A copy: a slice would keep the whole file in memory.
            early.append(first.take(pa.array(np.arange(first.num_rows))))
            since = first.column(column)[-1].value
            sources.append(Source(since, partial(self._reader.read, live.file, READ_ROWS, first.num_rows)))
        if not early:
            return []
        rows = sort_rows(pa.Table.from_batches(early).combine_chunks().to_batches()[0], (column,))
        return [Source(rows.column(column)[0].value, lambda: iter((rows,))), *sources]
