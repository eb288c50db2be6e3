"""Reads the data files of a pinned table in bounded batches, and shows each batch to an observer."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import pyarrow as pa
from pyiceberg.table import FileScanTask, Table

from k2flow.errors import AuditError, DataFileError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.manifests import data_manifests, without_statistics
from k2flow.iceberg.reader import FileReader
from k2flow.inspection.pinned import FIRST_DAY, PinnedTables
from k2flow.layers import Layer

BATCH_ROWS = 32_768
T = TypeVar("T")
Advance = Callable[[int], None]  # takes the number of rows read since the last call
Observer = Callable[[FileScanTask, pa.RecordBatch], None]  # sees each batch of each file as it is read
Progress = Callable[[str, int, int], None]
"""Takes the name of a table or step, the rows read since the last call, and the rows to read in all."""


@dataclass(frozen=True)
class ReadPlan:
    """The files to read of one table, and the number of rows left out because of their day."""

    layer: Layer
    table: Table
    tasks: Sequence[FileScanTask]
    skipped_rows: int

    @property
    def rows(self) -> int:
        """The rows of all files."""
        return sum(task.file.record_count for task in self.tasks)

    @property
    def first_day(self) -> int | None:
        """The oldest partition day, in days since 1970."""
        return min((task.file.partition[0] for task in self.tasks), default=None)


def plan(pinned: PinnedTables, layer: Layer, first_day: int = FIRST_DAY, last_day: int | None = None) -> ReadPlan:
    """Return the files of the pinned snapshot whose partition day (since 1970) is in [first_day, last_day].

    Raises AuditError if another engine's delete files apply to the table, and CatalogError.
    """
    table = pinned.tables[layer]
    if deletes := applied_deletes(table, table.current_snapshot()):
        raise AuditError(deletes_text(pinned.name(layer), deletes))
    with catalog_errors():
        tasks = [
            FileScanTask(without_statistics(entry.data_file))
            for manifest in data_manifests(table)
            for entry in manifest.fetch_manifest_entry(table.io)
        ]
    wanted = [
        task
        for task in tasks
        if (day := task.file.partition[0]) is not None and day >= first_day and (last_day is None or day <= last_day)
    ]
    rows, wanted_rows = (sum(task.file.record_count for task in some) for some in (tasks, wanted))
    return ReadPlan(layer, table, wanted, rows - wanted_rows)


def read(
    plan: ReadPlan, columns: Sequence[str], observer: Observer | None, advance: Advance
) -> Iterator[pa.RecordBatch]:
    """Yield the rows of a plan's files, file after file, at most BATCH_ROWS at once, `columns` as the layer has them.

    Raises AuditError if a file cannot be read, and CatalogError.
    """
    wanted = pa.schema([plan.layer.arrow_schema.field(name) for name in columns])
    reader = FileReader(plan.table, wanted, find_by_name=True, buffered=True)
    for task in plan.tasks:
        try:
            for batch in reader.stream(task.file, BATCH_ROWS):
                if observer:
                    observer(task, batch)
                yield batch
                advance(batch.num_rows)
        except DataFileError as error:
            raise AuditError(str(error)) from error


def prefetch(items: Iterable[T]) -> Iterator[T]:
    """Yield `items`; another thread computes the next one meanwhile. At the end, return freed memory to the system."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, iterator, end)
        while (item := following.result()) is not end:
            following = pool.submit(next, iterator, end)
            yield item  # type: ignore[misc]
    pa.default_memory_pool().release_unused()
