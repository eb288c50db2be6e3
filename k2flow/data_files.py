"""Rows into Parquet data files of an Iceberg table: written by every worker, committed by none of them."""

import itertools
import uuid
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.io.pyarrow import write_file
from pyiceberg.manifest import DATA_FILE_TYPE, DataFile
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table, WriteTask

from k2flow.tables import TableDefinition

SORT_ORDER_ID = [field.name for field in DATA_FILE_TYPE[2].fields].index("sort_order_id")


class DataFileWriter:
    """Writes batches of one table into data files, one or more for each partition value.

    A file that is written but never committed is an orphan: no reader sees it, maintenance removes it. The rows must be
    of the definition's Arrow schema. A sorted table's files are each sorted. Raises OSError where the storage fails.
    """

    def __init__(self, table: Table, definition: TableDefinition) -> None:
        self._table = table
        self._definition = definition
        self._columns = [column for column, _, _ in definition.partitioned_by]
        self._bytes = definition.file_size_mb << 20

    def write(self, rows: pa.RecordBatch) -> list[DataFile]:
        """The data files that now hold `rows`; none for no rows."""
        if rows.num_rows == 0:
            return []
        if self._definition.sorted_by:
            rows = _sorted(rows, self._definition.sorted_by)
        name, count = uuid.uuid4(), itertools.count()
        tasks = [
            WriteTask(name, next(count), self._table.schema(), [piece], partition_key=self._key(part))
            for part in _by_partition(rows, self._columns)
            for piece in _pieces(part, self._bytes)
        ]
        files = list(write_file(self._table.io, self._table.metadata, iter(tasks)))
        if self._definition.sorted_by:
            for file in files:  # PyIceberg leaves it out: apache/iceberg-python issue 271
                file[SORT_ORDER_ID] = self._table.metadata.default_sort_order_id
        return files

    def _key(self, part: pa.RecordBatch) -> PartitionKey:
        spec, schema = self._table.spec(), self._table.schema()
        values = [
            PartitionFieldValue(field, part.column(column)[0].as_py())
            for field, column in zip(spec.fields, self._columns, strict=True)
        ]
        return PartitionKey(field_values=values, partition_spec=spec, schema=schema)


def _sorted(rows: pa.RecordBatch, column: str) -> pa.RecordBatch:
    values = rows.column(column).cast(pa.int64()).to_numpy()
    if (values[1:] >= values[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(values, kind="stable")))


def _by_partition(rows: pa.RecordBatch, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """`rows` split by the values of `columns`, in which every row's order among its equals is kept."""
    keys = np.column_stack([_numbers(rows.column(column)) for column in columns])
    if (keys == keys[0]).all():
        yield rows
        return
    starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
    distinct = len(np.unique(keys, axis=0))
    if len(starts) != distinct:  # equal keys are not side by side: bring them together
        order = np.lexsort(keys.T[::-1])
        rows, keys = rows.take(pa.array(order)), keys[order]
        starts = np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))
    for start, end in itertools.pairwise([*starts.tolist(), rows.num_rows]):
        yield rows.slice(start, end - start)


def _numbers(column: pa.Array) -> npt.NDArray[np.int32]:
    numbers: npt.NDArray[np.int32] = pc.cast(column, pa.int32()).to_numpy()
    return numbers


def _pieces(rows: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    """`rows` in pieces of at most `size` bytes in memory, which is more than they take in a file."""
    step = max(1, rows.num_rows * size // max(rows.nbytes, 1))
    for start in range(0, rows.num_rows, step):
        yield rows.slice(start, step)
