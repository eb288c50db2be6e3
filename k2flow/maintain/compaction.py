"""Merges many small data files into few large ones, sorted as the table is."""

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
from k2flow.maintain.merge import Source, concatenate, merge_sorted

EARLY_SHARE = 50
"""One in 50 rows of a file counts as early."""


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
            batches = merge_sorted(self._by_time(files, self._sorted_by), self._sorted_by)
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
        rows = sort_rows(pa.Table.from_batches(early).combine_chunks().to_batches()[0], column)
        return [Source(rows.column(column)[0].value, lambda: iter((rows,))), *sources]
