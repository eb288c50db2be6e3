"""Reads the data files of a table in bounded batches, and looks at each one's partition value and order on the way."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.table import FileScanTask, Table

from k2flow.audit.report import Report, Severity
from k2flow.errors import AuditError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.projection import Projection
from k2flow.iceberg.tables import BRONZE_FIELDS, DLQ_FIELDS, GOLD_FIELDS, SILVER_FIELDS, arrow_schema
from k2flow.inspection.pinned import PinnedTables

BATCH_ROWS = 32_768
BUFFER_BYTES = 1 << 20
_AHEAD = 2
_DAY_US, _HOUR_US = 86_400_000_000, 3_600_000_000
_DATED_BY = {
    "bronze": ("ingestion_date", "ingestion_timestamp"),
    "silver": ("exchange_date", "timestamp"),
    "dlq": ("failed_date", "failed_at"),
    "gold": ("exchange_date", "timestamp"),
}

_FIELDS = {"bronze": BRONZE_FIELDS, "silver": SILVER_FIELDS, "dlq": DLQ_FIELDS, "gold": GOLD_FIELDS}

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


class FileChecks:
    """What is wrong with whole data files. Proves for each file that was read to its end:

    - `file_partition`: its partition value is what its rows say: every row's date column, the day of every row's
      time and, for Gold, the hour are those of the partition. A reader that prunes by partition misses no row.
    - `file_order` (Gold): its rows are in the order of `timestamp`, as the table's sort order declares.

    It says nothing of files that are left out because their day is beyond retention.
    """

    def __init__(self, plan: Plan) -> None:
        self._layer = plan.layer
        self._name = plan.table.name()[-1]
        self._date, self._time = _DATED_BY[plan.layer]
        self._wrong: dict[str, dict[str, dict[str, Any]]] = {"file_partition": {}, "file_order": {}}
        self._last = np.iinfo(np.int64).min

    def begin(self) -> None:
        self._last = np.iinfo(np.int64).min

    def look(self, task: FileScanTask, batch: pa.RecordBatch) -> None:
        """Takes the next batch of a file."""
        days, times = batch.column(self._date), batch.column(self._time)
        values = times.cast(pa.int64()).to_numpy(zero_copy_only=False)
        day = task.file.partition[0]
        bad = self._not(days.cast(pa.int32()), day) or times.null_count or (values // _DAY_US != day).any()
        if self._layer == "gold":
            hour = task.file.partition[1]
            bad = bad or self._not(batch.column("exchange_hour"), hour) or (values // _HOUR_US % 24 != hour).any()
            if len(values) and (values[0] < self._last or (values[1:] < values[:-1]).any()):
                self._note("file_order", task)
            self._last = values[-1] if len(values) else self._last
        if bad:
            self._note("file_partition", task)

    def report(self, report: Report) -> None:
        texts = {
            "file_partition": "the partition value of {} data files is not what their rows say",
            "file_order": "{} data files are not in the order of timestamp",
        }
        for check, files in self._wrong.items():
            if files:
                samples = list(files.values())
                report.add(
                    check, Severity.BROKEN, texts[check].format(len(files)), len(files), None, self._name, samples
                )

    def _note(self, check: str, task: FileScanTask) -> None:
        file = task.file
        value = "/".join(str(file.partition[i]) for i in range(len(file.partition)))
        self._wrong[check].setdefault(
            file.file_path, {"file": file.file_path, "partition_value": value, "rows": file.record_count}
        )

    @staticmethod
    def _not(column: pa.Array, value: int | None) -> bool:
        found = pc.min_max(column).as_py()
        return bool(column.null_count or (len(column) and (found["min"] != value or found["max"] != value)))


def read(
    plan: Plan, columns: Sequence[str], checks: FileChecks | None, advance: Callable[[int], None]
) -> Iterator[pa.RecordBatch]:
    """The rows of a plan's files, file after file, at most BATCH_ROWS at once; `columns` as the definition has them.

    Raises AuditError, CatalogError.
    """
    types = {field.name: field for field in arrow_schema(_FIELDS[plan.layer])}
    wanted = pa.schema([types[name] for name in columns])
    for task in plan.tasks:
        if checks:
            checks.begin()
        with catalog_errors(), plan.table.io.new_input(task.file.file_path).open() as stream:
            try:
                file = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES, pre_buffer=False)
                found = Projection(file.schema_arrow, plan.table.schema(), wanted)
                for batch in map(found.of, file.iter_batches(BATCH_ROWS, columns=found.names, use_threads=False)):
                    if checks:
                        checks.look(task, batch)
                    yield batch
                    advance(batch.num_rows)
            except (pa.ArrowException, KeyError) as error:
                raise AuditError(f"{task.file.file_path} cannot be read: {error}") from error


def ahead(items: Iterable[T]) -> Iterator[T]:
    """`items`, the next _AHEAD of which are made in another thread while one is used."""
    iterator, end = iter(items), object()
    with ThreadPoolExecutor(1) as pool:
        waiting = deque(pool.submit(next, iterator, end) for _ in range(_AHEAD))
        while (item := waiting.popleft().result()) is not end:
            waiting.append(pool.submit(next, iterator, end))
            yield item  # type: ignore[misc]
