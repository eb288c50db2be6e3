"""Row hashes: their SQL, and a database for an audit or a replacement: a DuckDB file that is deleted at the end.

DuckDB does the sorts and joins within MEMORY_MB and spills the rest to disk, so memory does not grow with the tables.
Python sees batches, sums and samples.
"""

import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from filelock import FileLock, Timeout

from k2flow.errors import AuditError
from k2flow.exchange import Exchange
from k2flow.layers import HOUR_US, MIN_TIME_US, SILVER, Layer, Stream

POSITION = ("topic", "partition", "offset")  # the columns that name a message
WORDING = ("detail",)  # text for people, which may change with k2flow
FOLDER, LOCK = "k2flow-hashes-", "lock"
SETTLED_SECONDS = 60  # a live process certainly holds the lock of its folder this long after it created the folder
MEMORY_MB = 320  # in use; freed memory comes on top. With 200, a check of 10 million messages failed
FLUSH_MB = 16  # DuckDB returns freed memory to the system when it is this much: its own defaults are 128 and 512 MB
THREADS = 1  # with two, an audit of 10 million messages takes a fifth more CPU, and no less time
HOUR = f"(epoch_us(timestamp) - {MIN_TIME_US}) // {HOUR_US} + {MIN_TIME_US // HOUR_US}"
"""The SQL of a trade's hour since 1970, rounded down."""


@contextmanager
def _database_errors() -> Iterator[None]:
    try:
        yield
    except duckdb.Error as error:
        raise AuditError(f"the database of row hashes failed: {' '.join(str(error).split())}") from error


def _set_up(connection: duckdb.DuckDBPyConnection) -> duckdb.DuckDBPyConnection:
    """Set what is not of the database but of one connection. DuckDB prints progress if it takes Python for a shell."""
    connection.execute("SET TimeZone = 'UTC'")
    connection.execute("SET enable_progress_bar = false")
    return connection


class RowHashStore:
    """The tables of `schema`. Raises AuditError, above all if the disk or the memory is full."""

    def __init__(self, folder: Path, schema: str) -> None:
        self._db = duckdb.connect(
            str(folder / "hashes.duckdb"),
            config={
                "memory_limit": f"{MEMORY_MB}MB",
                "allocator_flush_threshold": f"{FLUSH_MB}MB",
                "allocator_bulk_deallocation_flush_threshold": f"{FLUSH_MB}MB",
                "threads": THREADS,
                "temp_directory": str(folder / "spilled"),
                "preserve_insertion_order": False,
            },
        )
        _set_up(self._db)
        self.run(schema)

    @_database_errors()
    def run(self, sql: str, values: Sequence[Any] = ()) -> list[tuple[Any, ...]]:
        """Return the rows of one statement: for aggregates and samples only."""
        return self._db.execute(sql, values).fetchall()

    def one(self, sql: str, values: Sequence[Any] = ()) -> tuple[Any, ...]:
        """Return the one row of a statement."""
        return self.run(sql, values)[0]

    def column(self, sql: str, values: Sequence[Any] = ()) -> list[Any]:
        """Return the first column of a statement: for aggregates and samples only."""
        return [row[0] for row in self.run(sql, values)]

    def count(self, rows: str) -> int:
        """Return the number of rows of `rows`, the FROM clause of a statement."""
        return int(self.one(f"SELECT count(*) {rows}")[0])

    @_database_errors()
    def arrays(self, sql: str, values: Sequence[Any] = ()) -> dict[str, npt.NDArray[Any]]:
        """Return the rows of one statement, as one numpy array per column."""
        found = self._db.execute(sql, values).fetchnumpy()
        return {name: np.ma.getdata(column) for name, column in found.items()}

    @_database_errors()
    def arrays_beside(self, sql: str, values: Sequence[Any] = ()) -> dict[str, npt.NDArray[Any]]:
        """Return the rows of one statement, as `arrays`, while another thread uses the store."""
        found = _set_up(self._db.cursor()).execute(sql, values).fetchnumpy()
        return {name: np.ma.getdata(column) for name, column in found.items()}

    def hashes(self, batch: pa.RecordBatch, sql: str) -> npt.NDArray[np.uint64]:
        """Return the value of a hash expression for each row of a batch, in their order."""
        self._db.register("batch", batch.append_column("row_number", pa.array(np.arange(batch.num_rows))))
        values = self.arrays(f"SELECT {sql} AS value FROM batch ORDER BY row_number")["value"]
        self._db.unregister("batch")
        return values

    def insert(self, table: str, batch: pa.RecordBatch, columns: str = "*", where: str = "true") -> None:
        """Insert `columns` (SQL over the batch's columns) of the batch's rows that meet a condition."""
        self._db.register("batch", batch)
        self.run(f"INSERT INTO {table} SELECT {columns} FROM batch WHERE {where}")
        self._db.unregister("batch")

    def select(self, batch: pa.RecordBatch, sql: str) -> list[tuple[Any, ...]]:
        """Return the rows of a statement over `batch`."""
        self._db.register("batch", batch)
        rows = self.run(sql)
        self._db.unregister("batch")
        return rows

    def close(self) -> None:
        """Close the database."""
        self._db.close()


@contextmanager
def open_row_hashes(schema: str) -> Iterator[RowHashStore]:
    """Open a store in a folder of its own, and remove it at the end, with those of processes that were killed."""
    _remove_unlocked(Path(tempfile.gettempdir()))
    with tempfile.TemporaryDirectory(prefix=FOLDER) as folder, FileLock(Path(folder) / LOCK):
        store = RowHashStore(Path(folder), schema)
        try:
            yield store
        finally:
            store.close()


def _remove_unlocked(parent: Path) -> None:
    """Remove the folders of stores that no process holds: they may be as large as the tables' hashes."""
    for folder in parent.glob(f"{FOLDER}*"):
        with suppress(OSError, Timeout):  # in use, or another user's
            if time.time() - folder.stat().st_mtime >= SETTLED_SECONDS:
                with FileLock(folder / LOCK, blocking=False):
                    shutil.rmtree(folder)


def content(layer: Layer) -> tuple[str, ...]:
    """Return the columns that one hash per row compares with the message that gave the row.

    Rows of messages and dead letters are found by their position. Their write time is the flow's clock, which the
    message does not have.
    """
    if layer.stream is Stream.TRADES:
        return layer.row_hash
    other = {*POSITION, *WORDING, layer.event_time, layer.date_column}
    return tuple(name for name in layer.row_hash if name not in other)


def content_hash(layer: Layer) -> str:
    """Return the SQL that hashes `content` of a row."""
    return hash_of(content(layer), layer.arrow_schema)


def id_hash(exchange: Exchange) -> str:
    """Return the SQL that hashes the deduplication key of a trade of this exchange."""
    return hash_of(exchange.dedup_key, SILVER.arrow_schema)


def hash_of(columns: Iterable[str], schema: pa.Schema) -> str:
    """Return the SQL expression that hashes columns of batches that went through `hashable`.

    The same columns in another order give the same expression. DuckDB hashes an empty list like no list, so the lengths
    are hashed too.
    """
    terms: list[str] = []
    for name in sorted(columns):
        kind = schema.field(name).type
        if pa.types.is_map(kind):
            terms += [f'"{name}_keys"', f'"{name}_values"', f'len("{name}_keys")']
        else:
            terms += [f'"{name}"', f'len("{name}")'] if pa.types.is_list(kind) else [f'"{name}"']
    return f"hash({', '.join(terms)})"


def hashable(batch: pa.RecordBatch) -> pa.RecordBatch:
    """Return a batch with two lists in place of each map: DuckDB hashes those six times faster. Copies nothing."""
    columns: dict[str, pa.Array] = {}
    for name, values in zip(batch.schema.names, batch.columns, strict=True):
        if pa.types.is_map(values.type):
            columns[f"{name}_keys"] = _list_of(values, values.keys)
            columns[f"{name}_values"] = _list_of(values, values.items)
        else:
            columns[name] = values
    return pa.RecordBatch.from_pydict(columns)


def _list_of(entries: pa.MapArray, values: pa.Array) -> pa.ListArray:
    """Return a map's keys or values as lists, with the map's own offsets and nulls. Copies nothing."""
    return pa.Array.from_buffers(
        pa.list_(values.type), len(entries), entries.buffers()[:2], offset=entries.offset, children=[values]
    )
