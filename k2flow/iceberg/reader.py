"""The rows of data files as their table has them now, whichever of its schemas they were written with."""

from collections.abc import Generator, Iterator

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.expressions import AlwaysTrue
from pyiceberg.io import InputStream
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import DataFile
from pyiceberg.table import FileScanTask, Table

from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import in_order, same_columns, with_field_ids

READ_ROWS = 64_000


class FileReader:
    """Reads files of one table, each sorted as the table is. May be used by several threads. Raises CatalogError."""

    def __init__(self, table: Table, definition: TableDefinition) -> None:
        own = definition.as_in(table)
        self._table = table
        self._sorted_by = own.sorted_by
        self._schema = own.arrow_schema
        self._with_ids = with_field_ids(own.arrow_schema, table)

    def read(self, file: DataFile, rows: int = READ_ROWS, skip: int = 0) -> Generator[pa.RecordBatch, None, None]:
        """The rows of a file as the table has them now, about `rows` at once, without the first `skip`.

        A small file is read whole and closed before its rows are given out: of those thousands may wait at once.
        """
        if file.record_count <= READ_ROWS:
            yield from list(self._read_open(file, READ_ROWS, skip))
        else:
            yield from self._read_open(file, rows, skip)

    def _read_open(self, file: DataFile, rows: int, skip: int) -> Iterator[pa.RecordBatch]:
        with catalog_errors(), self._table.io.new_input(file.file_path).open() as stream:
            for batch in self._batches(file, stream, rows):
                if skip < batch.num_rows:
                    yield batch.slice(skip).cast(self._schema)
                skip = max(0, skip - batch.num_rows)

    def _batches(self, file: DataFile, stream: InputStream, rows: int) -> Iterator[pa.RecordBatch]:
        parquet = pq.ParquetFile(stream)
        sorted_as_now = file.sort_order_id == self._table.metadata.default_sort_order_id
        known = same_columns(parquet.schema_arrow, self._with_ids)
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
