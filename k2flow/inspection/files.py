"""Reads the data files of a table in bounded batches, and looks at each one's partition value and order on the way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, TypeVar

import pyarrow as pa
from pyiceberg.table import FileScanTask, Table

from k2flow.errors import AuditError, DataFileError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.reader import FileReader
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import LAYERS

BATCH_ROWS = 32_768
_AHEAD = 2
_FIELDS = {layer.name: layer for layer in LAYERS}

T = TypeVar("T")


@dataclass(frozen=True)
class Plan:
    """The files to read of one table, and how many rows and files are left out because of their day."""

    layer: str
    table: Table
    tasks: Sequence[FileScanTask]
    skipped_rows: int

    @property
    def rows(self) -> int:
        return sum(task.file.record_count for task in self.tasks)

    @property
    def first_day(self) -> int | None:
        """The oldest partition day, in days since 1970."""
        return min((task.file.partition[0] for task in self.tasks), default=None)


def plan(pinned: PinnedTables, layer: str, first_day: int, last_day: int | None = None) -> Plan:
    """The files of the pinned snapshot whose partition day (since 1970) is in [first_day, last_day]."""
    table = pinned.tables[layer]
    with catalog_errors():
        tasks = list(table.scan().plan_files())
    if any(task.delete_files for task in tasks):
        raise AuditError(f"{pinned.name(layer)} has delete files, which the audit does not read: compact it first")
    wanted = [
        task
        for task in tasks
        if (day := task.file.partition[0]) is not None and day >= first_day and (last_day is None or day <= last_day)
    ]
    rows, wanted_rows = (sum(task.file.record_count for task in some) for some in (tasks, wanted))
    return Plan(layer, table, wanted, rows - wanted_rows)


class FileObserver(Protocol):
    """What looks at each file while it is read."""

    def begin(self) -> None:
        """Begin a file."""

    def look(self, task: FileScanTask, batch: pa.RecordBatch) -> None:
        """Take the next batch of the file."""


def read(
    plan: Plan, columns: Sequence[str], checks: FileObserver | None, advance: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """The rows of a plan's files, file after file, at most BATCH_ROWS at once; `columns` as the definition has them.

    Raises AuditError, CatalogError.
    """
    types = {field.name: field for field in _FIELDS[plan.layer].arrow_schema}
    wanted = pa.schema([types[name] for name in columns])
    reader = FileReader(plan.table, wanted, find_by_name=True, buffered=True)
    for task in plan.tasks:
        if checks:
            checks.begin()
        try:
            for batch in reader.stream(task.file, BATCH_ROWS):
                if checks:
                    checks.look(task, batch)
                yield batch
                advance(batch.num_rows)
        except DataFileError as error:
            raise AuditError(str(error)) from error


def ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, the next _AHEAD of which are made in another thread while one is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
