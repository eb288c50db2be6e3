"""The columns of a data file that was written with an earlier schema of its table, as today's definition has them."""

import pyarrow as pa
from pyiceberg.schema import Schema

from k2flow.iceberg.writer import FIELD_ID


class Projection:
    """Finds the columns `wanted` of `table` in a file by their ids (Iceberg spec, "Column Projection").

    `names` are the file's own names of those that it has. In a file without ids, which another engine may have added,
    columns are found by their names.
    """

    def __init__(self, file: pa.Schema, table: Schema, wanted: pa.Schema) -> None:
        self._wanted = wanted
        ids = {field.metadata[FIELD_ID]: field.name for field in file if FIELD_ID in (field.metadata or {})}
        by_name = {field.name: field.name for field in file}
        numbers = {field.name: str(field.field_id).encode() for field in table.fields}
        self._sources = [
            ids.get(numbers[name]) if ids and name in numbers else by_name.get(name) if not ids else None
            for name in wanted.names
        ]
        self.names = [source for source in self._sources if source is not None]

    def of(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The columns wanted, of rows of the file: one that it lacks is null, one of a narrower type is cast.

        Raises pyarrow's ArrowInvalid for one that cannot be.
        """
        columns = [
            pa.nulls(batch.num_rows, field.type) if source is None else _cast(batch.column(source), field.type)
            for source, field in zip(self._sources, self._wanted, strict=True)
        ]
        return pa.RecordBatch.from_arrays(columns, schema=self._wanted)


def _cast(column: pa.Array, kind: pa.DataType) -> pa.Array:
    return column if column.type == kind else column.cast(kind)
