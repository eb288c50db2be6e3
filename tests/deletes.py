"""Delete files as another engine writes them: equality deletes and position deletes."""

import uuid
from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pyiceberg.io.pyarrow import schema_to_pyarrow
from pyiceberg.manifest import (
    DataFile,
    DataFileContent,
    FileFormat,
    ManifestContent,
    ManifestEntry,
    ManifestEntryStatus,
    ManifestFile,
    ManifestWriterV2,
)
from pyiceberg.table import Table
from pyiceberg.table.snapshots import Operation
from pyiceberg.table.update.snapshot import _FastAppendFiles

POSITIONS = pa.schema(
    [
        pa.field("file_path", pa.string(), nullable=False, metadata={"PARQUET:field_id": "2147483546"}),
        pa.field("pos", pa.int64(), nullable=False, metadata={"PARQUET:field_id": "2147483545"}),
    ]
)
PATH_COLUMN = 2147483546


class _DeleteManifestWriter(ManifestWriterV2):
    def content(self) -> ManifestContent:
        return ManifestContent.DELETES

    @property
    def _meta(self) -> dict[str, str]:
        return {**super()._meta, "content": "deletes"}


class _AddDeletes(_FastAppendFiles):
    """A snapshot with new delete files, and perhaps new data files, as an upsert has."""

    deletes: Sequence[DataFile] = ()

    def _manifests(self) -> list[ManifestFile]:
        found = super()._manifests()
        for delete in self.deletes:
            spec = self._transaction.table_metadata.specs()[delete.spec_id]
            writer = _DeleteManifestWriter(
                spec, self.schema(), self.new_manifest_output(), self._snapshot_id, self._compression
            )
            with writer:
                writer.add_entry(
                    ManifestEntry.from_args(
                        status=ManifestEntryStatus.ADDED,
                        snapshot_id=self._snapshot_id,
                        sequence_number=None,
                        file_sequence_number=None,
                        data_file=delete,
                    )
                )
            found.append(writer.to_manifest_file())
        return found


def delete_equal(
    table: Table, column: str, values: Sequence[Any], like: DataFile, upserted: DataFile | None = None
) -> str:
    """Delete the rows of one partition, that of `like`, with these values of a column. Return the delete file.

    `upserted` is added in the same commit, which the deletes do not reach.
    """
    field = table.schema().find_field(column)
    schema = schema_to_pyarrow(table.schema().select(column), include_field_ids=True)
    rows = pa.table([pa.array(values, schema.field(0).type)], schema=schema)
    return _commit(table, rows, DataFileContent.EQUALITY_DELETES, like, upserted, equality_ids=[field.field_id])


def delete_positions(table: Table, like: DataFile, positions: Sequence[int]) -> str:
    """Delete rows of one data file by their positions. Return the delete file."""
    rows = pa.table([pa.array([like.file_path] * len(positions)), pa.array(positions, pa.int64())], schema=POSITIONS)
    bound = {PATH_COLUMN: like.file_path.encode()}
    return _commit(table, rows, DataFileContent.POSITION_DELETES, like, None, lower_bounds=bound, upper_bounds=bound)


def _commit(
    table: Table, rows: pa.Table, content: DataFileContent, like: DataFile, added: DataFile | None, **arguments: Any
) -> str:
    path = table.location_provider().new_data_location(f"{uuid.uuid4()}-deletes.parquet")
    with table.io.new_output(path).create() as stream:
        pq.write_table(rows, stream)
    file = DataFile.from_args(
        content=content,
        file_path=path,
        file_format=FileFormat.PARQUET,
        partition=like.partition,
        record_count=rows.num_rows,
        file_size_in_bytes=len(table.io.new_input(path)),
        **arguments,
    )
    file.spec_id = like.spec_id
    with table.transaction() as transaction:
        producer = _AddDeletes(Operation.OVERWRITE, transaction, table.io)
        producer.deletes = [file]
        if added is not None:
            producer.append_data_file(added)
        producer.commit()
    return path
