"""The cost of reading Gold through Iceberg: queries by `k2flow.connect()`, and by DuckDB on the same Parquet files."""

import os
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path
from statistics import median
from typing import Annotated, Any
from unittest.mock import patch

import duckdb
import numpy as np
import pyarrow as pa
import typer
from matplotlib.axes import Axes
from pyiceberg.expressions import AlwaysTrue, And, BooleanExpression, EqualTo
from pyiceberg.manifest import DataFile
from rich.console import Console
from rich.progress import track

import k2flow
from bench.lake import LakeWriter, message_batches
from bench.measure import run
from bench.report import BenchResult, report
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import GOLD, GOLD_TABLE
from k2flow.sandbox.producer import ProduceOptions

DAY = date(2026, 1, 15)
START = datetime(2026, 1, 14, 22, tzinfo=UTC)
HOURS = 28
"""The trades cover all of DAY, and two hours on both sides."""
LATE_SHARE = 0.001
"""The share of late trades; each one needs a file in another hour."""
BATCH = 20_000
COMMIT_FILES = 100
HOUR = 12
SYMBOL = "BTCUSDT"


@dataclass(frozen=True)
class BenchQuery:
    """A query in SQL, and its conditions on partitions, by which Iceberg finds the files."""

    name: str
    sql: str
    files: BooleanExpression


# Without the cast DuckDB multiplies DECIMAL(18, 8) into DECIMAL(18, 16), whose maximum is 99.
QUERIES = (
    BenchQuery(
        "one hour",
        f"SELECT count(*), sum(price::DECIMAL(38, 8) * quantity) FROM {GOLD_TABLE} "
        f"WHERE exchange_date = DATE '{DAY}' AND exchange_hour = {HOUR}",
        And(EqualTo("exchange_date", DAY.isoformat()), EqualTo("exchange_hour", HOUR)),
    ),
    BenchQuery("count(*)", f"SELECT count(*) FROM {GOLD_TABLE}", AlwaysTrue()),
    BenchQuery(
        "candles of a day",
        "SELECT date_trunc('minute', timestamp) AS minute, arg_min(price, timestamp), max(price), min(price), "
        f"arg_max(price, timestamp), sum(quantity) FROM {GOLD_TABLE} "
        f"WHERE symbol = '{SYMBOL}' AND exchange_date = DATE '{DAY}' GROUP BY minute ORDER BY minute",
        EqualTo("exchange_date", DAY.isoformat()),
    ),
)
READERS = ("k2flow", "read_parquet")


@dataclass(frozen=True)
class Times:
    """Seconds of each run: opening a connection with the first query on it, and the same query again."""

    first: list[float]
    again: list[float]


def query(
    files: Annotated[int, typer.Option(help="Data files of Gold, over 28 hours.")] = 10_000,
    rows: Annotated[int, typer.Option(help="Rows of most of these files.")] = 1_000,
    runs: Annotated[int, typer.Option(help="Runs of each query, alternating.")] = 7,
) -> None:
    """Compare queries on Gold's view with DuckDB's read_parquet of exactly the files that the query needs.

    First: a new connection, its views, and the query. Again: the same query on the same connection. Both run on the
    files as a flow writes them, where late trades have files of a row or two, and again after `k2flow maintain`.
    """
    with tempfile.TemporaryDirectory() as folder:
        lake = LakeWriter(Path(folder))
        written, held = write_gold(lake, files, rows)
        as_written = read_by_both(lake, folder, runs)
        run([sys.executable, "-m", "k2flow", "maintain", GOLD_TABLE], {"K2FLOW_HOME": folder})
        maintained = read_by_both(lake, folder, runs)
    _report(written, held, {"as written": as_written, "maintained": maintained})


@dataclass(frozen=True)
class TimesByReader:
    """The number of files that each query reads, and the times, by query and reader."""

    files: dict[str, int]
    times: dict[str, dict[str, Times]]


def read_by_both(lake: LakeWriter, home: str, runs: int) -> TimesByReader:
    """Run each query with each reader, on the current files."""
    paths = {one.name: paths_of(lake, one) for one in QUERIES}
    with patch.dict(os.environ, {"K2FLOW_HOME": home}):
        return TimesByReader({name: len(found) for name, found in paths.items()}, timed(paths, runs))


def write_gold(lake: LakeWriter, files: int, rows: int) -> tuple[int, int]:
    """Write Gold in `files` data files, with COMMIT_FILES per commit. Return the numbers of files and rows."""
    pieces = files / (1 + LATE_SHARE * rows)
    options = ProduceOptions(count=files * rows, rate=pieces * rows / (HOURS * 3600), seed=1, start=START)
    waiting: list[DataFile] = []
    written, committed, held = 0, 0, 0
    for piece in track(trades_of(lake, options, rows), "writing", total=pieces, console=Console(stderr=True)):
        waiting += lake.write_files(GOLD_TABLE, piece)
        held += piece.num_rows
        done = written + len(waiting) >= files
        if done or len(waiting) >= COMMIT_FILES:
            lake.committers[GOLD_TABLE].commit(waiting, [OffsetRange(0, committed, held, held - committed)])
            written, committed, waiting = written + len(waiting), held, []
        if done:
            break
    return written, held


def trades_of(lake: LakeWriter, options: ProduceOptions, rows: int) -> Iterator[pa.RecordBatch]:
    """Yield the market's trades as rows of Gold, `rows` at a time."""
    for silver in lake.trades(message_batches(options, BATCH, partitions=1)):
        trades = GOLD.rows(silver)
        for begin in range(0, trades.num_rows, rows):
            yield trades.slice(begin, rows)


def paths_of(lake: LakeWriter, of: BenchQuery) -> list[str]:
    """Return the data files that Iceberg reads for a query."""
    tasks = load_table(lake.catalog, GOLD_TABLE).scan(row_filter=of.files).plan_files()
    return sorted(task.file.file_path.removeprefix("file://") for task in tasks)


def timed(paths: Mapping[str, list[str]], runs: int) -> dict[str, dict[str, Times]]:
    """Return the times by query and reader. Raise ValueError if the two readers' answers differ."""
    times = {one.name: {reader: Times([], []) for reader in READERS} for one in QUERIES}
    for i in track(range(runs + 1), "queries", console=Console(stderr=True)):
        for one in QUERIES:
            answers = []
            for reader in READERS:
                began = time.perf_counter()
                with connected(reader, paths[one.name]) as connection:
                    answers.append(connection.sql(one.sql).fetchall())
                    first = time.perf_counter()
                    connection.sql(one.sql).fetchall()
                    again = time.perf_counter()
                if i:  # the first run warms the page cache
                    times[one.name][reader].first.append(first - began)
                    times[one.name][reader].again.append(again - first)
            if answers[0] != answers[1]:
                raise ValueError(f"{one.name}: {READERS[0]} and {READERS[1]} differ")
    return times


def connected(reader: str, paths: list[str]) -> duckdb.DuckDBPyConnection:
    """Open a new connection with Gold as a view: k2flow's, or DuckDB's own of `paths`."""
    if reader == "k2flow":
        return k2flow.connect()
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.read_parquet(paths).create_view(GOLD_TABLE)
    return connection


def _report(files: int, rows: int, states: Mapping[str, TimesByReader]) -> None:
    ours, theirs = READERS
    table: list[list[str]] = []
    figures: dict[str, Any] = {"files": files, "rows": rows}
    for state, read in states.items():
        figures[state] = {}
        for name, of in read.times.items():
            ms = {
                moment: {reader: median(getattr(of[reader], moment)) * 1000 for reader in READERS}
                for moment in ("first", "again")
            }
            ratios = {moment: each[ours] / each[theirs] for moment, each in ms.items()}
            cells = [
                [f"{each[ours]:.0f}", f"{each[theirs]:.0f}", f"{ratios[moment]:.2f}"] for moment, each in ms.items()
            ]
            table.append([state, name, f"{read.files[name]:,}", *cells[0], *cells[1]])
            figures[state][name] = {"files": read.files[name]} | {
                moment: {f"{reader}_ms": round(t, 1) for reader, t in each.items()}
                | {"ratio": round(ratios[moment], 3)}
                for moment, each in ms.items()
            }

    def plot(axes: Axes) -> None:
        bars = [(state, name, of) for state, read in states.items() for name, of in read.times.items()]
        places = np.arange(len(bars))
        for shift, reader in zip((-0.2, 0.2), READERS, strict=True):
            axes.bar(places + shift, [median(of[reader].again) for _, _, of in bars], 0.4, label=reader)
        axes.set_xticks(places, [f"{name},\n{state}" for state, name, _ in bars], fontsize="x-small")
        axes.set_yscale("log")
        axes.set_ylabel("seconds, on an open connection")
        axes.legend()

    moments = [f"{moment}: {what}" for moment in ("first", "again") for what in (f"{ours} ms", f"{theirs} ms", "ratio")]
    notes = [
        f"Gold: {files:,} files as written, {rows:,} rows. First: with opening the connection. Again: on the same one."
    ]
    report(BenchResult("query", ["files are", "query", "files", *moments], table, figures, plot, notes))
