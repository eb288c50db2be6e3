"""Checks of data files while the audit reads them: partition value, order, derived columns."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.table import FileScanTask

from k2flow.audit.context import AuditContext
from k2flow.audit.report import SAMPLES, AuditReport, Severity
from k2flow.inspection.files import ReadPlan, read
from k2flow.layers import Field, PartitionBy

DAY_US = 86_400_000_000


@dataclass
class _WrongColumn:
    rows: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)


class FileChecks:
    """Checks each data file that is read to its end. Observes the files of one plan.

    - `file_partition`: the partition value is that of every row: of each partition field's column, and of the day of
      the layer's event time. A reader that prunes by partition misses no row.
    - `file_order`: the rows are in the order of the layer's sort columns, as the table's sort order declares.
    - `derived_column`: each derived column has the value that the layer derives from the row's other columns.

    It proves nothing about files that are left out because retention may have removed their day.
    """

    def __init__(self, plan: ReadPlan) -> None:
        self._layer = plan.layer
        self._table = plan.table.name()[-1]
        types = {column.name: column.type for column in plan.layer.fields}
        self._transforms = [(by, by.transform.transform(types[by.column])) for by in plan.layer.partitioned_by]
        self._wrong: dict[str, dict[str, dict[str, Any]]] = {"file_partition": {}, "file_order": {}}
        self._derived = {column.name: _WrongColumn() for column in plan.layer.derived}
        self.task: FileScanTask | None = None  # the file of the last batch
        self._last: list[pa.RecordBatch] = []  # the sort columns of the file's last row

    def __call__(self, task: FileScanTask, batch: pa.RecordBatch) -> None:
        """Check the next batch of a file."""
        if task is not self.task:
            self.task, self._last = task, []
        if batch.num_rows == 0:
            return
        values = [task.file.partition[i] for i in range(len(self._transforms))]
        partitions = zip(self._transforms, values, strict=True)
        if not self._has_day(batch, values[0]) or not all(
            _all_have(batch, by, transform, value) for (by, transform), value in partitions
        ):
            self._note("file_partition", task)
        if self._layer.sorted_by and not self._continues(batch.select(self._layer.sorted_by)):
            self._note("file_order", task)
        for column in self._layer.derived:
            self._check_derived(column, task, batch)

    def report(self, report: AuditReport) -> None:
        """Report the wrong files and columns."""
        texts = {
            "file_partition": "{} data files have a partition value that is not that of all their rows",
            "file_order": f"{{}} data files are not in the order of {', '.join(self._layer.sorted_by)}",
        }
        for check, files in self._wrong.items():
            if files:
                text, samples = texts[check].format(len(files)), list(files.values())
                report.add(check, Severity.BROKEN, text, len(files), None, self._table, samples)
        for name, wrong in self._derived.items():
            if wrong.rows:
                text = f"{wrong.rows:,} rows have another {name} than the one derived from their other columns"
                report.add("derived_column", Severity.BROKEN, text, wrong.rows, None, self._table, wrong.samples)

    def _has_day(self, batch: pa.RecordBatch, day: int | None) -> bool:
        times = batch.column(self._layer.event_time)
        return not times.null_count and bool((times.cast(pa.int64()).to_numpy() // DAY_US == day).all())

    def _continues(self, columns: pa.RecordBatch) -> bool:
        """Return whether a batch continues the order of the file. Nulls have no order; they are other checks'."""
        rows = pa.concat_batches([*self._last, columns.drop_null()])
        self._last = [rows.slice(max(0, rows.num_rows - 1))]
        in_order = pa.scalar(True)
        for column in reversed(rows.columns):
            before, after = column[:-1], column[1:]
            in_order = pc.or_(pc.less(before, after), pc.and_(pc.equal(before, after), in_order))
        return bool(pc.all(in_order, min_count=0).as_py())

    def _check_derived(self, column: Field, task: FileScanTask, batch: pa.RecordBatch) -> None:
        found = batch.column(column.name)
        wanted = _derive(column, batch).cast(found.type)
        if wanted.equals(found):
            return
        wrong = [i for i in range(len(found)) if not wanted.slice(i, 1).equals(found.slice(i, 1))]
        self._derived[column.name].rows += len(wrong)
        samples = self._derived[column.name].samples
        for i in wrong[: SAMPLES - len(samples)]:
            values = {column.name: found[i].as_py(), "derived": wanted[i].as_py()}
            samples.append({"file": task.file.file_path, **{name: _json(value) for name, value in values.items()}})

    def _note(self, check: str, task: FileScanTask) -> None:
        file = task.file
        value = "/".join(str(file.partition[i]) for i in range(len(file.partition)))
        self._wrong[check].setdefault(
            file.file_path, {"file": file.file_path, "partition_value": value, "rows": file.record_count}
        )


def read_checked(context: AuditContext, plan: ReadPlan) -> Iterator[pa.RecordBatch]:
    """Yield all columns of a plan's rows, and `file`, and check its files. Report the wrong ones after the last row."""
    for task, batch in read_files(context, plan):
        number = np.full(batch.num_rows, context.scope.number(task.file.file_path), np.int32)
        yield batch.append_column("file", pa.array(number))


def read_files(context: AuditContext, plan: ReadPlan) -> Iterator[tuple[FileScanTask, pa.RecordBatch]]:
    """Yield all columns of a plan's rows with their file, and check the files as `read_checked`."""
    checks = FileChecks(plan)
    for batch in read(plan, plan.layer.columns, checks, context.advance(plan)):
        assert checks.task is not None
        yield checks.task, batch
    checks.report(context.report)


def _all_have(batch: pa.RecordBatch, by: PartitionBy, transform: Callable[[Any], Any], value: Any) -> bool:
    """Return whether every row's partition value is `value`. Iceberg has dates and times as numbers."""
    column = batch.column(by.column)
    if column.null_count:
        return False
    if pa.types.is_temporal(column.type):
        column = column.cast(pa.int32() if pa.types.is_date32(column.type) else pa.int64())
    if by.transform.preserves_order:
        found = list(pc.min_max(column).as_py().values())
    else:
        found = column.unique().to_pylist()
    return all(transform(each) == value for each in found)


def _derive(column: Field, batch: pa.RecordBatch) -> pa.Array:
    """Derive a column. Rows that it cannot be derived from, as only a damaged table has them, get null."""
    assert column.derive is not None
    try:
        return column.derive(batch)
    except (pa.ArrowException, ArithmeticError, TypeError, ValueError):
        if batch.num_rows == 1:
            return pa.nulls(1, batch.schema.field(column.name).type)
        kind = batch.schema.field(column.name).type
        return pa.concat_arrays([_derive(column, batch.slice(i, 1)).cast(kind) for i in range(batch.num_rows)])


def _json(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str | None) else str(value)
