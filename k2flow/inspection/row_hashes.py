"""A database of hashes of rows, for an audit or a repair: a DuckDB file that is deleted at the end.

DuckDB does the sorts and joins within its memory limit and spills what is beyond it to disk, so that memory does not
grow with the tables; Python sees batches, sums and samples.
"""

import fcntl
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.errors import AuditError
from k2flow.layers import SILVER

FOLDER, LOCK = "k2flow-hashes-", "lock"
SETTLED_SECONDS = 60
"""So long after it was made a folder's lock is surely held, if its process lives."""
MEMORY_MB = 320
THREADS = 2

AUDIT = """
CREATE TABLE runs (part INTEGER, first BIGINT, next BIGINT);  -- of Bronze's offsets, without a gap each
CREATE TABLE valid (part INTEGER, "offset" BIGINT, day INTEGER, id UBIGINT, row UBIGINT);  -- messages, decoded again
CREATE TABLE bad (part INTEGER, "offset" BIGINT, day INTEGER, reason VARCHAR, content UBIGINT);
CREATE TABLE dlq (part INTEGER, "offset" BIGINT, reason VARCHAR, content UBIGINT);
CREATE TABLE silver (exchange TINYINT, id UBIGINT, row UBIGINT);
CREATE TABLE gold (exchange TINYINT, hour INTEGER, id UBIGINT, row UBIGINT);  -- hour since 1970
CREATE TABLE parts (part INTEGER, exchange TINYINT, layer VARCHAR, first BIGINT, next BIGINT);
"""

_ROW = [name for name in SILVER.columns if name != "vendor_data"]
ID_HASH = "hash(message_id)"
_LISTS = ("vendor_keys", "vendor_values", "len(vendor_keys)", "len(trade_conditions)")
ROW_HASH = f"hash({', '.join([*_ROW, *_LISTS])})"
"""Over all of Silver's columns, of batches that went through `hashable`. To DuckDB's hash an empty list is the same as
none at all, so that the lengths are hashed as well."""
CONTENT_HASH = "hash(payload, schema_id, kafka_timestamp, reason)"


class Store:
    """The tables of `schema`. Raises AuditError, above all where the disk or the memory is full."""

    def __init__(self, folder: Path, schema: str) -> None:
        self._db = duckdb.connect(
            str(folder / "hashes.duckdb"),
            config={
                "memory_limit": f"{MEMORY_MB}MB",
                "threads": THREADS,
                "temp_directory": str(folder / "spilled"),
                "preserve_insertion_order": False,
            },
        )
        self.run("SET TimeZone = 'UTC'")
        self.run(schema)

    def run(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """The rows of one statement: aggregates and samples only."""
        try:
            return self._db.execute(sql, values).fetchall()
        except duckdb.Error as error:
            raise self._explained(error) from error

    @staticmethod
    def _explained(error: duckdb.Error) -> AuditError:
        return AuditError(f"the database of row hashes failed: {' '.join(str(error).split())}")

    def one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
        """The one row of a statement."""
        return self.run(sql, values)[0]

    def arrays(self, sql: str, values: Sequence[Any] = ()) -> dict[str, Any]:
        """The rows of one statement as one numpy array for each column."""
        try:
            found = self._db.execute(sql, values).fetchnumpy()
        except duckdb.Error as error:
            raise self._explained(error) from error
        return {name: np.ma.getdata(column) for name, column in found.items()}

    def hashes(self, batch: pa.RecordBatch, sql: str) -> npt.NDArray[np.uint64]:
        """The value of an expression like ROW_HASH for each row of a batch, in their order."""
        self._db.register("batch", batch.append_column("row_number", pa.array(np.arange(batch.num_rows))))
        values: npt.NDArray[np.uint64] = self.arrays(f"SELECT {sql} AS value FROM batch ORDER BY row_number")["value"]
        self._db.unregister("batch")
        return values

    def insert(self, table: str, batch: pa.RecordBatch, columns: str = "*", where: str = "true") -> None:
        """Adds `columns` (SQL over the batch's columns) of a batch's rows, or of those `where` a condition holds."""
        self._db.register("batch", batch)
        self.run(f"INSERT INTO {table} SELECT {columns} FROM batch WHERE {where}")
        self._db.unregister("batch")

    def select(self, batch: pa.RecordBatch, sql: str) -> list[tuple[Any, ...]]:
        """The rows of a statement over `batch`."""
        self._db.register("batch", batch)
        rows = self.run(sql)
        self._db.unregister("batch")
        return rows

    def close(self) -> None:
        self._db.close()


@contextmanager
def open_store(schema: str = AUDIT) -> Iterator[Store]:
    """A store in a folder of its own, which is removed with it, as are those of processes that were killed."""
    _remove_abandoned(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, (Path(folder) / LOCK).open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        store = Store(Path(folder), schema)
        try:
            yield store
        finally:
            store.close()


def _remove_abandoned(parent: Path) -> None:
    """Folders of stores that no process holds: they may be as large as the tables' hashes."""
    for folder in parent.glob(f"{FOLDER}*"):
        with suppress(OSError):  # in use, or somebody else's
            if time.time() - folder.stat().st_mtime < SETTLED_SECONDS:
                continue
            with (folder / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder)


def hashable(trades: pa.RecordBatch) -> pa.RecordBatch:
    """Rows of Silver or Gold with vendor_data as two lists: DuckDB hashes those six times faster than a map."""
    vendor = trades.column("vendor_data")
    columns = {name: trades.column(name) for name in trades.schema.names if name != "vendor_data"}
    columns["vendor_keys"] = _list_of(vendor, vendor.keys)
    columns["vendor_values"] = _list_of(vendor, vendor.items)
    return pa.RecordBatch.from_pydict(columns)


def _list_of(entries: pa.MapArray, part: pa.Array) -> pa.ListArray:
    """The lists that `part` (a map's keys or values) makes with the map's own offsets and nulls; copies nothing."""
    return pa.Array.from_buffers(
        pa.list_(part.type), len(entries), entries.buffers()[:2], offset=entries.offset, children=[part]
    )
