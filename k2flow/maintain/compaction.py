"""Rows of many small data files into few large ones, sorted as the table is."""

import itertools
from collections.abc import Sequence
from contextlib import closing
from functools import partial

import numpy as np
import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.iceberg.reader import READ_ROWS, FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import DataFileWriter, sort_rows
from k2flow.maintain.entries import LiveFile
from k2flow.maintain.merge import Source, concatenated, merged

EARLY = 50
"""One in so many rows of a file counts as early."""


class Compactor:
    """Writes the rows of files of one partition into new ones. May be used by several threads. Raises CatalogError.

    Memory: about a million rows for each call that runs, what is being written of one row group, and of a table that is
    sorted the earliest 2 % of each file's rows.
    """

    def __init__(self, table: Table, definition: TableDefinition) -> None:
        own = definition.as_in(table)
        self._writer = DataFileWriter(table, own)
        self._reader = FileReader.of_table(table, definition)
        self._sorted_by = own.sorted_by

    def compact(self, files: Sequence[LiveFile]) -> list[DataFile]:
        """The new files, which hold exactly the rows of `files`. None of them is committed."""
        if self._sorted_by:
            batches = merged(self._by_time(files, self._sorted_by), self._sorted_by)
        else:
            batches = concatenated([Source(0, partial(self._reader.read, live.file)) for live in files])
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
            count = max(1, live.file.record_count // EARLY)
            with closing(self._reader.read(live.file, count)) as batches:
                first = next(batches, None)
            if first is None:
                continue
            first = first.slice(0, count)
            early.append(first.take(pa.array(np.arange(first.num_rows))))  # a copy: the batch holds all of its file
            since = first.column(column)[-1].value
            sources.append(Source(since, partial(self._reader.read, live.file, READ_ROWS, first.num_rows)))
        if not early:
            return []
        rows = sort_rows(pa.Table.from_batches(early).combine_chunks().to_batches()[0], column)
        return [Source(rows.column(column)[0].value, lambda: iter((rows,))), *sources]
