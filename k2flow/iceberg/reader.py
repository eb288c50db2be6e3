"""Reads data files as rows of their table's current schema, whichever of its schemas they were written with."""

from collections.abc import Callable, Generator, Iterable, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.exceptions import ResolveError
from pyiceberg.io.pyarrow import pyarrow_to_schema
from pyiceberg.manifest import DataFile
from pyiceberg.schema import Schema, prune_columns
from pyiceberg.table import Table
from pyiceberg.types import ListType, MapType

from k2flow.compat.pyiceberg.private import get_column_projection_values, to_requested_schema
from k2flow.errors import DataFileError
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import same_columns, sort_rows, with_field_ids
from k2flow.layers import Field, arrow_schema

READ_ROWS = 64_000
BUFFER_BYTES = 1 << 20
Projection = Callable[[pa.RecordBatch], pa.RecordBatch]


class FileReader:
    """Reads files of one table as columns of a given schema.

    Columns are found by their field ids (Iceberg spec, "Column Projection"). A column that the file lacks is null, or
    the file's identity partition value; a narrower type is cast. Several threads may use one reader.
    """

    def __init__(
        self,
        table: Table,
        wanted: pa.Schema,
        *,
        sorted_by: tuple[str, ...] = (),
        find_by_name: bool = False,
        buffered: bool = False,
    ) -> None:
        """Take the names, types and order of the columns `wanted`.

        Each file is sorted by `sorted_by`, unless its metadata says that it is. `find_by_name` is for files without
        field ids (another engine's): it finds columns by the table's current names, not only by its name mapping.
        `buffered` reads 1 MiB at a time, in the caller's thread: less memory, more requests.
        """
        self._table = table
        self._wanted = wanted
        self._sorted_by = sorted_by
        self._buffered = buffered
        self._names = table.name_mapping() or (table.schema().name_mapping if find_by_name else None)
        by_name = {field.name: field for field in table.schema().fields}
        columns = [by_name[name] for name in wanted.names if name in by_name]
        self._schema = schema = Schema(*columns)
        self._leaves = {i for i in schema.field_ids if not isinstance(schema.find_type(i), ListType | MapType)}
        self._arrow = arrow_schema(tuple(Field(field.name, field.field_type) for field in columns))
        self._with_ids = with_field_ids(self._arrow, table)

    @classmethod
    def of_table(cls, table: Table, definition: TableDefinition) -> "FileReader":
        """Return a reader of all columns that `table` has now, each file sorted as the table is."""
        own = definition.as_in(table)
        return cls(table, own.arrow_schema, sorted_by=own.layer.sorted_by)

    def read(self, file: DataFile, rows: int = READ_ROWS, skip: int = 0) -> Generator[pa.RecordBatch, None, None]:
        """Yield the rows of a file without the first `skip`, about `rows` at a time.

        A file of up to READ_ROWS rows is read whole and closed before its first rows are yielded: thousands of
        small files may wait at once. Raises CatalogError if the storage failed, DataFileError if the file is damaged or
        its columns do not fit the table's.
        """
        if file.record_count <= READ_ROWS:
            yield from list(self.stream(file, READ_ROWS, skip))
        else:
            yield from self.stream(file, rows, skip)

    def stream(self, file: DataFile, rows: int, skip: int = 0) -> Iterator[pa.RecordBatch]:
        """Yield the rows of a file as `read` does, but hold one batch at a time. A file to be sorted is held whole."""
        in_threads = not self._buffered and file.record_count > READ_ROWS  # threads cost small files more CPU
        with catalog_errors(), self._table.io.new_input(file.file_path).open() as stream:
            try:
                parquet = pq.ParquetFile(stream, buffer_size=BUFFER_BYTES if self._buffered else 0, pre_buffer=False)
                columns, project = self._projection(file, parquet.schema_arrow)
                found = parquet.iter_batches(rows, columns=columns, use_threads=in_threads)
                for batch in self._sorted(file, map(project, found)):
                    if skip < batch.num_rows:
                        yield batch.slice(skip)
                    skip = max(0, skip - batch.num_rows)
            except (pa.ArrowException, KeyError, ValueError, ResolveError) as error:
                raise DataFileError(f"{file.file_path} cannot be read: {error}") from error

    def _sorted(self, file: DataFile, batches: Iterable[pa.RecordBatch]) -> Iterable[pa.RecordBatch]:
        if not self._sorted_by or file.sort_order_id == self._table.metadata.default_sort_order_id:
            return batches
        whole = list(batches)  # another engine wrote it
        return [sort_rows(pa.concat_batches(whole), self._sorted_by)] if whole else []

    def _projection(self, file: DataFile, found: pa.Schema) -> tuple[list[str], Projection]:
        """Return the columns to read of a file with the schema `found`, and what turns them into those wanted."""
        names = self._arrow.names
        if set(names) <= set(found.names) and same_columns(pa.schema(map(found.field, names)), self._with_ids):
            return names, lambda batch: self._as_wanted(batch.select(names))
        whole = pyarrow_to_schema(found, self._names, downcast_ns_timestamp_to_us=True)
        own = prune_columns(whole, self._leaves, select_full_types=False)
        table, spec = self._table.schema(), self._table.specs().get(file.spec_id)
        constants = get_column_projection_values(file, self._schema, table, spec, whole.field_ids)

        def project(batch: pa.RecordBatch) -> pa.RecordBatch:
            rows = to_requested_schema(
                self._schema, own, batch, True, projected_missing_fields=constants, allow_timestamp_tz_mismatch=True
            )
            return self._as_wanted(rows)

        return [column.name for column in own.columns], project

    def _as_wanted(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return a batch of the table's columns in the schema wanted, which may be older or newer than the table's."""
        found = dict(zip(batch.schema.names, batch.columns, strict=True))
        missing = pa.nulls(batch.num_rows)
        columns = [found.get(field.name, missing).cast(field.type) for field in self._wanted]
        return pa.RecordBatch.from_arrays(columns, schema=self._wanted)
