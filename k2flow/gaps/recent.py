"""The holes of the newest hours of Gold, kept up to date at the cost of new rows."""

import time
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from datetime import UTC, datetime
from tempfile import TemporaryDirectory

import duckdb
import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.errors import QueryError
from k2flow.exchange import Exchange
from k2flow.gaps.find import SymbolGaps
from k2flow.gaps.runs import bits_of, chunk_of, holes, joined, numbered, runs_between, runs_of, sums
from k2flow.iceberg.catalog import catalog_errors, find_table
from k2flow.iceberg.manifests import data_manifests, days_of
from k2flow.iceberg.reader import FileReader
from k2flow.layers import GOLD, GOLD_TABLE
from k2flow.maintain.plans import LiveFile, live_files
from k2flow.query.sql import limit_memory, query_errors, string_literal

HOURS = 24
DAY_SECONDS = 86_400
MEMORY_MB = 256
MAX_RUNS = 2_000_000  # in memory, about 60 bytes each
READ_ROWS = 65_536
COLUMNS = pa.schema([GOLD.arrow_schema.field(name) for name in ("exchange", "symbol", "trade_id")])
SYMBOL = "{'exchange': exchange, 'symbol': symbol}"  # what `runs` calls a symbol
RUNS = pa.schema(
    {"symbol": pa.struct({"exchange": pa.string(), "symbol": pa.string()}), "first": pa.int64(), "last": pa.int64()}
)
Found = Mapping[tuple[str, str], SymbolGaps]  # by exchange name and symbol


@dataclass
class _Hour:
    """The files of an hour that were read, and the runs of all their ids."""

    paths: set[str] = field(default_factory=set)
    runs: pa.Table = field(default_factory=RUNS.empty_table)


class RecentGaps:
    """The holes of the newest HOURS hours of Gold up to now, in the ids of some exchanges with dense ids.

    Each data file is read once. If a file of an hour is gone, the hour is read again. Memory holds the runs of these
    hours, and of one hour before them: a trade in it still fills a hole. Rows that delete files of another engine
    remove still count.
    """

    def __init__(self, catalog: Catalog, exchanges: Sequence[Exchange]) -> None:
        self._catalog = catalog
        self._names = {each.code: each.name for each in exchanges}
        self._manifests: dict[str, list[LiveFile]] = {}
        self._hours: dict[int, _Hour] = defaultdict(_Hour)

    def update(self, seconds: float) -> Found | None:
        """Read what is new for about `seconds`, one file at least. Return the holes, or None if there is more to read.

        Raises CatalogError, DataFileError, TableDiffersError and QueryError.
        """
        table = find_table(self._catalog, GOLD_TABLE)
        files = self._files(table) if table else {}
        for hour in self._hours.keys() - files.keys():
            del self._hours[hour]
        if not files or table is None:
            return {}
        reader = FileReader(table, COLUMNS, find_by_name=True, buffered=True)
        deadline = time.monotonic() + seconds
        with TemporaryDirectory(prefix="k2flow-gaps-") as folder, closing(duckdb.connect()) as db:
            limit_memory(db, MEMORY_MB, folder)
            unread = [(hour, file) for hour in sorted(files, reverse=True) for file in self._unread(hour, files[hour])]
            with query_errors():
                for left, (hour, file) in zip(range(len(unread) - 1, -1, -1), unread, strict=True):
                    self._read(db, reader, hour, file)
                    if left and time.monotonic() > deadline:
                        return None
                return self._found(db, newest=max(files))

    def _files(self, table: Table) -> dict[int, list[DataFile]]:
        """Return the files of the newest hours, and of the one before them, by hour since 1970."""
        now = int(datetime.now(UTC).timestamp()) // 3600
        with catalog_errors():
            days = [days_of(manifest) for manifest in data_manifests(table)]
            newest_day = min(now // 24, max((each.stop - 1 for each in days if each), default=0))
            live = live_files(table, GOLD.event_time, self._manifests, newest_day - 1)
        by_hour: dict[int, list[DataFile]] = defaultdict(list)
        for each in live:
            hour = each.day * 24 + (each.hour or 0)
            if hour <= now:
                by_hour[hour].append(each.file)
        newest = max(by_hour, default=0)
        return {hour: found for hour, found in by_hour.items() if hour >= newest - HOURS}

    def _unread(self, hour: int, files: Iterable[DataFile]) -> list[DataFile]:
        """Return the files of an hour that are to be read: all of them if one that was read is gone."""
        by_path = {file.file_path: file for file in files}
        if self._hours[hour].paths - by_path.keys():
            self._hours[hour] = _Hour()
        return [by_path[path] for path in sorted(by_path.keys() - self._hours[hour].paths)]

    def _read(self, db: duckdb.DuckDBPyConnection, reader: FileReader, hour: int, file: DataFile) -> None:
        own = self._hours[hour]
        own.runs = self._joined(db, own.runs, reader, file)
        own.paths.add(file.file_path)
        if sum(each.runs.num_rows for each in self._hours.values()) > MAX_RUNS:
            self._hours.clear()
            raise QueryError(
                f"the trade ids of Gold's newest {HOURS} hours have more than {MAX_RUNS:,} holes: "
                "`k2flow gaps` shows whether they are dense"
            )

    def _joined(self, db: duckdb.DuckDBPyConnection, known: pa.Table, reader: FileReader, file: DataFile) -> pa.Table:
        """Return the runs of known ids and of those in a file."""
        rows = pa.RecordBatchReader.from_batches(COLUMNS, reader.stream(file, READ_ROWS))
        codes = ", ".join(map(string_literal, self._names))
        db.register("known", known)
        db.register("rows", rows)
        return db.execute(
            f"""
            WITH chunks AS MATERIALIZED (
                SELECT {SYMBOL} AS symbol, {chunk_of("number")} AS chunk, {bits_of("number")} AS bits
                FROM ({numbered("exchange", f"FROM rows WHERE exchange IN ({codes})")})
                WHERE number IS NOT NULL GROUP BY ALL)
            {joined(f"FROM known UNION ALL {runs_of('chunks')}")}"""
        ).to_arrow_table()

    def _found(self, db: duckdb.DuckDBPyConnection, newest: int) -> Found:
        inside = [its.runs for hour, its in self._hours.items() if hour > newest - HOURS]
        db.register("inside", pa.concat_tables(inside))
        db.register("nearby", pa.concat_tables([its.runs for its in self._hours.values()]))
        db.execute(
            "CREATE TABLE bounds AS SELECT symbol, min(first) AS low, max(last) AS high FROM inside GROUP BY symbol"
        )
        db.execute(f"CREATE TABLE holes AS {holes(runs_between('nearby', 'bounds'))}")
        return {
            (self._names[symbol["exchange"]], symbol["symbol"]): SymbolGaps(*values)
            for symbol, *values in db.execute(sums("holes", "bounds")).fetchall()
        }
