"""A local copy of the newest candles, for a connection that queries them often.

The table has a data file for each hour, so DuckDB opens 720 files for one symbol's month. The copy has a file for each
day, sorted by symbol. See docs/adr/0030-copy-of-candles.md.
"""

import logging
import shutil
import tempfile
import threading
import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path

import duckdb
from pyiceberg.manifest import ManifestFile

from k2flow.errors import K2flowError, one_line
from k2flow.iceberg.manifests import days_of, has_live_files
from k2flow.layers import CANDLES, CANDLES_TABLE
from k2flow.query.recent import UNIX_EPOCH
from k2flow.query.sql import limit_memory, query_errors, string_literal

log = logging.getLogger(__name__)
USES = 12  # before the copy is made: DuckDB asks two to four times for each statement
MAX_DAYS = 31
MAX_BYTES = 256 << 20
MEMORY_MB = 256  # of the copying connection; it spills what exceeds it
GROUP_ROWS = 6144  # DuckDB skips the groups of other symbols


class CandleRows:
    """The rows of the candle table for DuckDB: the table itself, and after some uses a copy of its newest days.

    The copy has up to MAX_DAYS days and about MAX_BYTES, and is deleted with this object. Several threads may use it.
    """

    def __init__(
        self, manifests: Callable[[], Sequence[ManifestFile]], connect: Callable[[], duckdb.DuckDBPyConnection]
    ) -> None:
        """`manifests` are those of the snapshot that the table's view reads; `connect` opens one more such view."""
        self._manifests = manifests
        self._connect = connect
        self._uses = 0
        self._sql = CANDLES_TABLE
        self._copying = threading.Lock()

    def sql(self) -> str:
        """Return SQL of the rows, for a FROM clause. The call that makes the copy takes a second or two."""
        if self._copying.acquire(blocking=False):  # others read the table meanwhile
            try:
                self._uses += 1
                if self._uses == USES:
                    self._sql = self._copy_or_table()
            finally:
                self._copying.release()
        return self._sql

    def _copy_or_table(self) -> str:
        with ExitStack() as on_error:
            try:
                folder = Path(tempfile.mkdtemp(prefix="k2flow-candles-"))
                on_error.callback(weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True))
                rows = self._copy(folder)
            except (OSError, K2flowError) as error:
                text = "the newest candles cannot be copied to temporary files, so queries of candles stay slow: %s"
                log.warning(text, one_line(error))
                return CANDLES_TABLE
            on_error.pop_all()
            return rows

    def _copy(self, folder: Path) -> str:
        """Copy the newest days, each into a file of its own. Return SQL for all rows."""
        live = [manifest for manifest in self._manifests() if has_live_files(manifest)]
        days = _days(live)
        if not days:
            return CANDLES_TABLE
        first, copied = days.stop, 0
        with closing(self._connect()) as db, query_errors():
            limit_memory(db, MEMORY_MB, str(folder))
            while first > max(days.start, days.stop - MAX_DAYS) and copied < MAX_BYTES:
                first -= 1
                copied += _copy_day(db, first, folder)
        rows = f"read_parquet({string_literal(str(folder / '*.parquet'))}, hive_partitioning = false)"
        if first > days.start:
            rows = f"(FROM {rows} UNION ALL FROM {CANDLES_TABLE} WHERE {CANDLES.date_column} < {_date(first)})"
        return rows


def _days(manifests: Sequence[ManifestFile]) -> range:
    """Return the days since 1970 of some manifests' files; none if a file of another program may have no day."""
    days = [days_of(manifest) for manifest in manifests]
    if any(not each for each in days) or any(m.partitions and m.partitions[0].contains_null for m in manifests):
        return range(0)
    return range(min((each.start for each in days), default=0), max((each.stop for each in days), default=0))


def _copy_day(db: duckdb.DuckDBPyConnection, day: int, folder: Path) -> int:
    """Copy the candles of a day since 1970. Return the size of the copy in bytes."""
    path = folder / f"{day}.parquet"
    rows = f"FROM {CANDLES_TABLE} WHERE {CANDLES.date_column} = {_date(day)} ORDER BY symbol, open_time"
    options = f"FORMAT parquet, COMPRESSION zstd, ROW_GROUP_SIZE {GROUP_ROWS}"
    db.execute(f"COPY ({rows}) TO {string_literal(str(path))} ({options})")
    return path.stat().st_size


def _date(day: int) -> str:
    return f"DATE '{UNIX_EPOCH + timedelta(days=day)}'"
