"""Writes rows into Parquet data files of an Iceberg table. Every worker writes; none of them commits."""

import itertools
import uuid
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from pyiceberg.io.pyarrow import compute_statistics_plan, parquet_path_to_id_mapping
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.partitioning import PartitionFieldValue, PartitionKey
from pyiceberg.table import Table
from pyiceberg.table.locations import load_location_provider
from pyiceberg.types import IcebergType, ListType, MapType, StructType

from k2flow.compat.pyiceberg.statistics import data_file_statistics, only
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import catalog_errors
from k2flow.iceberg.concurrent import CORES, THREADS, ByteBudget
from k2flow.iceberg.tables import TableDefinition
from k2flow.timeouts import SENT

FIELD_ID = b"PARQUET:field_id"
WRITING_BYTES = 192 << 20
STREAM_BYTES = 12 << 20  # of a file that is being sent to an object store, in Arrow's client, however small it is
SEND_BYTES = 8 << 20


class EncodedFile(NamedTuple):
    """A Parquet file in memory, and where it goes."""

    path: str
    key: PartitionKey
    footer: pq.FileMetaData
    content: pa.Buffer


class DataFileWriter:
    """Writes batches of one table into data files, one or more for each partition value.

    A file that is never committed is an orphan: no reader sees it, and maintenance deletes it. The rows must have the
    definition's Arrow schema. Each file of a sorted table is sorted. Raises CatalogError if the storage fails.

    PyIceberg's own writer gives every column a dictionary. Without one for unique columns (ids, payloads), a file of
    Silver or Gold takes a quarter less CPU and a tenth less space.
    """

    def __init__(self, table: Table, definition: TableDefinition, prefix: str = "") -> None:
        """`prefix` begins the names of the files."""
        metadata = table.metadata
        self._prefix = prefix
        self._io = table.io
        self._schema = table.schema()
        self._spec = table.spec()
        self._sort_order_id = metadata.default_sort_order_id if definition.layer.sorted_by else None
        self._sorted_by = definition.layer.sorted_by
        self._columns = [by.column for by in definition.layer.partitioned_by]
        self._bytes = definition.file_size_mb << 20
        self.is_local = metadata.location.startswith(("file:", "/"))
        self._locations = load_location_provider(metadata.location, metadata.properties)
        self.arrow_schema = with_field_ids(definition.arrow_schema, table)
        self._options: dict[str, Any] = {
            "compression": metadata.properties["write.parquet.compression-codec"],
            "use_dictionary": definition.repeating_columns,
            "store_decimal_as_integer": True,
        }
        plan = compute_statistics_plan(self._schema, metadata.properties)
        self._statistics = plan if definition.layer.pruned_by is None else only(plan, definition.layer.pruned_by)
        self._paths = parquet_path_to_id_mapping(self._schema)

    def write(self, rows: pa.RecordBatch) -> list[DataFile]:
        """Write `rows` into data files. No rows give no file."""
        return [self.write_file(piece) for piece in self.pieces(rows)]

    def pieces(self, rows: pa.RecordBatch) -> list[pa.RecordBatch]:
        """Return `rows`, sorted as the table is and split into one batch for each file."""
        if rows.num_rows == 0:
            return []
        if self._sorted_by:
            rows = sort_rows(rows, self._sorted_by)
        return [piece for part in _by_partition(rows, self._columns) for piece in _pieces(part, self._bytes)]

    def write_file(self, piece: pa.RecordBatch) -> DataFile:
        """Write one of the `pieces` into one file. Several threads may call it at once."""
        return self.write_stream(iter((piece,)))

    def encode(self, piece: pa.RecordBatch) -> "EncodedFile":
        """Return one of the `pieces` as a file in memory. Several threads may call it at once."""
        encoded = pa.BufferOutputStream()
        footer = self._encode(encoded, iter((piece,)))
        path, key = self._new_path(piece)
        return EncodedFile(path, key, footer, encoded.getvalue())

    def send(self, file: "EncodedFile") -> DataFile:
        """Write an encoded file to the storage. Several threads may call it at once."""
        content = file.content
        with catalog_errors():
            with self._io.new_output(file.path).create(overwrite=True) as stream:
                for start in range(0, content.size, SEND_BYTES):
                    stream.write(content.slice(start, min(SEND_BYTES, content.size - start)))
                    SENT.made()
            SENT.made()
            reach(Point.FILE_WRITTEN)
        return self._data_file(file.path, file.key, file.footer, content.size)

    def write_stream(self, batches: Iterator[pa.RecordBatch]) -> DataFile:
        """Write `batches` into one file, a row group each: rows of one partition, in the table's order.

        An error of the iterator is raised, and leaves no file. Raises StopIteration without a batch.
        """
        first = next(batches)
        path, key = self._new_path(first)
        with catalog_errors():
            with self._io.new_output(path).create(overwrite=True) as stream:
                footer = self._encode(stream, itertools.chain((first,), batches))
                size = stream.tell()
            SENT.made()
            reach(Point.FILE_WRITTEN)
        return self._data_file(path, key, footer, size)

    def _encode(self, stream: Any, batches: Iterator[pa.RecordBatch]) -> pq.FileMetaData:
        """Write batches as Parquet, a row group each, and return the footer."""
        with pq.ParquetWriter(stream, self.arrow_schema, **self._options) as parquet:
            for rows in batches:
                parquet.write_batch(rows, row_group_size=rows.num_rows)
            parquet.close()
            return parquet.writer.metadata

    def _new_path(self, rows: pa.RecordBatch) -> tuple[str, PartitionKey]:
        key = self._partition_key(rows)
        return self._locations.new_data_location(f"{self._prefix}{uuid.uuid4()}.parquet", key), key

    def _data_file(self, path: str, key: PartitionKey, footer: pq.FileMetaData, size: int) -> DataFile:
        file = DataFile.from_args(
            content=DataFileContent.DATA,
            file_path=path,
            file_format=FileFormat.PARQUET,
            partition=key.partition,
            file_size_in_bytes=size,
            sort_order_id=self._sort_order_id,
            equality_ids=None,
            key_metadata=None,
            **data_file_statistics(footer, self._statistics, self._paths),
        )
        file.spec_id = self._spec.spec_id
        return file

    def _partition_key(self, rows: pa.RecordBatch) -> PartitionKey:
        values = [
            PartitionFieldValue(field, rows.column(column)[0].as_py())
            for field, column in zip(self._spec.fields, self._columns, strict=True)
        ]
        return PartitionKey(field_values=values, partition_spec=self._spec, schema=self._schema)


class TableWriters:
    """The writers of several tables, each opened at its first rows. They write in threads.

    Arrow and zstd release the interpreter's lock, so the next steps continue while files are written. As many threads
    encode as there are cores; to a local folder they write as they encode. Up to THREADS files are sent to an object
    store at once: it takes its time for each of them, thus many small files wait together. Memory: WRITING_BYTES for
    their rows and the client's buffers, or the encoded file of one larger batch.
    """

    def __init__(
        self, tables: Mapping[str, Table], definitions: Mapping[str, TableDefinition], wait: bool = False
    ) -> None:
        """Take the tables and their definitions by name. With `wait`, `write` returns only after the files exist."""
        self._tables = tables
        self._definitions = definitions
        self._wait = wait
        self._writers: dict[tuple[str, str], DataFileWriter] = {}
        self._encoding = ThreadPoolExecutor(max(2, CORES), "encode")
        self._sending = ThreadPoolExecutor(THREADS, "send")
        self._budget = ByteBudget(WRITING_BYTES)

    def write(self, table: str, rows: pa.RecordBatch, prefix: str = "") -> Callable[[], list[DataFile]]:
        """Begin to write `rows` into files whose names begin with `prefix`.

        Return a function that waits for the files, and raises their errors.
        """
        if (writer := self._writers.get((table, prefix))) is None:
            writer = DataFileWriter(self._tables[table], self._definitions[table], prefix)
            self._writers[table, prefix] = writer
        writing = [self._encoding.submit(self._begin, writer, piece) for piece in writer.pieces(rows)]

        def files() -> list[DataFile]:
            return [each.result()() for each in writing]

        if self._wait:
            files()
        return files

    def _begin(self, writer: DataFileWriter, piece: pa.RecordBatch) -> Callable[[], DataFile]:
        """Write a local file; or encode one and begin to send it, once its rows fit into the budget.

        Return a function that waits for the file.
        """
        if writer.is_local:
            file = writer.write_file(piece)
            return lambda: file
        size = piece.nbytes + STREAM_BYTES
        self._budget.take(size)
        try:
            sending = self._sending.submit(writer.send, writer.encode(piece))
        except BaseException:
            self._budget.give_back(size)
            raise
        sending.add_done_callback(lambda _: self._budget.give_back(size))
        return sending.result


def sort_rows(rows: pa.RecordBatch, columns: tuple[str, ...]) -> pa.RecordBatch:
    """Return `rows` in ascending order of some columns, stably. By one time column, rows in order are not copied."""
    if len(columns) > 1:
        return rows.take(pc.sort_indices(rows, [(column, "ascending") for column in columns]))
    values = rows.column(columns[0]).cast(pa.int64()).to_numpy()
    if (values[1:] >= values[:-1]).all():
        return rows
    return rows.take(pa.array(np.argsort(values, kind="stable")))


def _by_partition(rows: pa.RecordBatch, columns: list[str]) -> Iterator[pa.RecordBatch]:
    """Split `rows` by the values of `columns`; rows with equal values keep their order."""
    keys: npt.NDArray[np.int32] = np.column_stack([rows.column(name).cast(pa.int32()).to_numpy() for name in columns])
    starts = _starts(keys)
    if len({tuple(key) for key in keys[starts].tolist()}) < len(starts):  # equal keys are not side by side
        order = np.lexsort(keys.T[::-1])
        rows, keys = rows.take(pa.array(order)), keys[order]
        starts = _starts(keys)
    for start, end in itertools.pairwise([*starts.tolist(), rows.num_rows]):
        yield rows.slice(start, end - start)


def _starts(keys: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return the rows of (n, columns) keys at which another key begins."""
    return np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))


def _pieces(rows: pa.RecordBatch, size: int) -> Iterator[pa.RecordBatch]:
    """Split `rows` into pieces of about `size` bytes in memory, which is more than they take in a file."""
    step = max(1, rows.num_rows * size // max(rows.nbytes, 1))
    for start in range(0, rows.num_rows, step):
        yield rows.slice(start, step)


def with_field_ids(schema: pa.Schema, table: Table) -> pa.Schema:
    """Return `schema` with the ids of the table's columns; readers find columns by them (spec, "Column Projection")."""
    fields = []
    for field in schema:
        column = table.schema().find_field(field.name)
        fields.append(_with_id(pa.field(field.name, _typed(field.type, column.field_type)), column.field_id))
    return pa.schema(fields)


def _typed(arrow: pa.DataType, iceberg: IcebergType) -> pa.DataType:
    if isinstance(iceberg, ListType):
        element = pa.field(arrow.value_field.name, _typed(arrow.value_type, iceberg.element_type))
        return pa.list_(_with_id(element, iceberg.element_id))
    if isinstance(iceberg, MapType):
        key = pa.field("key", _typed(arrow.key_type, iceberg.key_type), nullable=False)
        item = pa.field("value", _typed(arrow.item_type, iceberg.value_type))
        return pa.map_(_with_id(key, iceberg.key_id), _with_id(item, iceberg.value_id))
    if isinstance(iceberg, StructType):
        pairs = zip(arrow, iceberg.fields, strict=True)
        return pa.struct(
            [_with_id(pa.field(own.name, _typed(own.type, field.field_type)), field.field_id) for own, field in pairs]
        )
    return arrow


def _with_id(field: pa.Field, number: int) -> pa.Field:
    return field.with_metadata({FIELD_ID: str(number).encode()})


def same_columns(one: pa.Schema, other: pa.Schema) -> bool:
    """Return whether two schemas have the same names, types and field ids. Names inside a map do not matter."""
    return one.equals(other) and list(map(_ids, one)) == list(map(_ids, other))


def _ids(field: pa.Field) -> list[bytes | None]:
    kind = field.type
    inside = [kind.key_field, kind.item_field] if pa.types.is_map(kind) else []
    inside += [kind.value_field] if pa.types.is_list(kind) else []
    inside += list(kind) if pa.types.is_struct(kind) else []
    return [(field.metadata or {}).get(FIELD_ID), *(number for each in inside for number in _ids(each))]
