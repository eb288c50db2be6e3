"""Rows of many small data files into few large ones, sorted as the table is."""

import itertools
from collections.abc import Generator, Iterator, Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io import InputStream
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table

from k2flow.catalog import catalog_errors
from k2flow.data_files import DataFileWriter, in_order, same_columns
from k2flow.maintain.entries import LiveFile
from k2flow.maintain.merge import Source, concatenated, merged
from k2flow.tables import TableDefinition

READ_ROWS = 64_000
EARLY = 50
"""One in so many rows of a file counts as early."""


class Compactor:
    """Writes the rows of files of one partition into new ones. May be used by several threads. Raises CatalogError.

    Memory: about a million rows for each call that runs, what is being written of one row group, and of a table that is
    sorted the earliest 2 % of each file's rows.
    """

    def __init__(self, table: Table, definition: TableDefinition) -> None:
        self._table = table
        self._writer = DataFileWriter(table, definition)
        self._sorted_by = definition.sorted_by
        self._schema = definition.arrow_schema

    def compact(self, files: Sequence[LiveFile]) -> list[DataFile]:
        """The new files, which hold exactly the rows of `files`. None of them is committed."""
        if self._sorted_by:
            batches = merged(self._by_time(files, self._sorted_by), self._sorted_by)
        else:
            batches = concatenated([Source(0, partial(self._read, live.file)) for live in files])
        return [
            self._writer.write_stream(batch for _, batch in run)
            for _, run in itertools.groupby(batches, key=lambda numbered: numbered[0])
        ]

    def _by_time(self, files: Sequence[LiveFile], column: str) -> list[Source]:
        """The files as sources of which few overlap: the earliest rows of all of them are one source of their own.

        A few late rows would make each file begin long before most of its rows, and all files overlap.
        """
        early, sources = [], []
        for live in files:
            with closing(self._read(live.file, max(1, live.file.record_count // EARLY))) as batches:
                first = next(batches, None)
            if first is None:
                continue
            early.append(first.take(pa.array(np.arange(first.num_rows))))  # a copy: the batch holds all of its file
            since = first.column(column)[-1].value
            sources.append(Source(since, partial(self._read, live.file, READ_ROWS, first.num_rows)))
        if not early:
            return []
        rows = in_order(pa.Table.from_batches(early).combine_chunks().to_batches()[0], column)
        return [Source(rows.column(column)[0].value, lambda: iter((rows,))), *sources]

    def _read(self, file: DataFile, rows: int = READ_ROWS, skip: int = 0) -> Generator[pa.RecordBatch, None, None]:
        """The rows of a file as the table has them now, about `rows` at once, without the first `skip`.

        A small file is read whole and closed before its first row is given out: of those thousands may wait at once.
        """
        batches = self._read_open(file, rows, skip)
        yield from list(batches) if file.record_count <= READ_ROWS else batches

    def _read_open(self, file: DataFile, rows: int, skip: int) -> Iterator[pa.RecordBatch]:
        with catalog_errors(), self._table.io.new_input(file.file_path).open() as stream:
            for batch in self._batches(file, stream, rows):
                if skip < batch.num_rows:
                    yield batch.slice(skip).cast(self._schema)
                skip = max(0, skip - batch.num_rows)

    def _batches(self, file: DataFile, stream: InputStream, rows: int) -> Iterator[pa.RecordBatch]:
        parquet = pq.ParquetFile(stream)
        sorted_as_now = file.sort_order_id == self._table.metadata.default_sort_order_id
        known = same_columns(parquet.schema_arrow, self._writer.arrow_schema)
        if known and (sorted_as_now or not self._sorted_by):
            yield from parquet.iter_batches(rows)
            return
        # It was written with an earlier schema of the table, or by another engine.
        scan = ArrowScan(self._table.metadata, self._table.io, self._table.schema(), AlwaysTrue())
        whole = [batch.cast(self._schema) for batch in scan.to_record_batches([FileScanTask(file)])]
        yield from (
            [in_order(pa.Table.from_batches(whole).combine_chunks().to_batches()[0], self._sorted_by)]
            if self._sorted_by and whole
            else whole
        )
