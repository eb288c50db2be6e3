"""What reading Gold through Iceberg costs: queries on `k2flow.connect()`, beside DuckDB on the same Parquet files."""

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
from bench.lake import Lake, slices
from bench.measure import run
from bench.report import Report, report
from k2flow.exchange import GOLD
from k2flow.flow.dedup import gold_rows
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import Range
from k2flow.sandbox.producer import ProduceOptions

DAY = date(2026, 1, 15)
START = datetime(2026, 1, 14, 22, tzinfo=UTC)
HOURS = 28
"""The trades: all of DAY, and two hours to both sides."""
LATE_SHARE = 0.001
"""Of the market's trades: each makes a file in another hour."""
BATCH = 20_000
COMMIT_FILES = 100
HOUR = 12
SYMBOL = "BTCUSDT"


@dataclass(frozen=True)
class Query:
    """SQL, and what its conditions say of partitions, for Iceberg to find the files by."""

    name: str
    sql: str
    files: BooleanExpression


# Without the cast DuckDB multiplies DECIMAL(18, 8) into DECIMAL(18, 16), which ends at 99.
QUERIES = (
    Query(
        "one hour",
        f"SELECT count(*), sum(price::DECIMAL(38, 8) * quantity) FROM {GOLD} "
        f"WHERE exchange_date = DATE '{DAY}' AND exchange_hour = {HOUR}",
        And(EqualTo("exchange_date", DAY.isoformat()), EqualTo("exchange_hour", HOUR)),
    ),
    Query("count(*)", f"SELECT count(*) FROM {GOLD}", AlwaysTrue()),
    Query(
        "candles of a day",
        "SELECT date_trunc('minute', timestamp) AS minute, arg_min(price, timestamp), max(price), min(price), "
        f"arg_max(price, timestamp), sum(quantity) FROM {GOLD} "
        f"WHERE symbol = '{SYMBOL}' AND exchange_date = DATE '{DAY}' GROUP BY minute ORDER BY minute",
        EqualTo("exchange_date", DAY.isoformat()),
    ),
)
READERS = ("k2flow", "read_parquet")


@dataclass(frozen=True)
class Times:
    """Seconds of each run: of opening a connection and the first query on it, and of the same query again."""

    first: list[float]
    again: list[float]


def query(
    files: Annotated[int, typer.Option(help="Data files of Gold, over 28 hours.")] = 10_000,
    rows: Annotated[int, typer.Option(help="Rows of most of them.")] = 1_000,
    runs: Annotated[int, typer.Option(help="Runs of each query, in turn.")] = 7,
) -> None:
    """Queries on Gold's view, beside DuckDB's read_parquet of exactly the files that hold what is asked for.

    First: a new connection, its views, and the query. Again: the same query on the same connection. Once on the files
    as a flow leaves them, where late trades make files of a row or two, and once after `k2flow maintain`.
    """
    with tempfile.TemporaryDirectory() as folder:
        lake = Lake(Path(folder))
        written, held = write_gold(lake, files, rows)
        as_written = read_by_both(lake, folder, runs)
        run([sys.executable, "-m", "k2flow", "maintain", GOLD], {"K2FLOW_HOME": folder})
        maintained = read_by_both(lake, folder, runs)
    _report(written, held, {"as written": as_written, "maintained": maintained})


@dataclass(frozen=True)
class Read:
    """How many files each query reads, and the times, by query and reader."""

    files: dict[str, int]
    times: dict[str, dict[str, Times]]


def read_by_both(lake: Lake, home: str, runs: int) -> Read:
    """Each query by each reader, on the files that there are now."""
    paths = {one.name: paths_of(lake, one) for one in QUERIES}
    with patch.dict(os.environ, {"K2FLOW_HOME": home}):
        return Read({name: len(found) for name, found in paths.items()}, timed(paths, runs))


def write_gold(lake: Lake, files: int, rows: int) -> tuple[int, int]:
    """Gold of `files` data files, in commits of COMMIT_FILES. How many files and rows there are."""
    pieces = files / (1 + LATE_SHARE * rows)
    options = ProduceOptions(files * rows, rate=pieces * rows / (HOURS * 3600), seed=1, start=START)
    waiting: list[DataFile] = []
    written, committed, held = 0, 0, 0
    for piece in track(trades_of(lake, options, rows), "writing", total=pieces, console=Console(stderr=True)):
        waiting += lake.writers[GOLD].write(piece)
        held += piece.num_rows
        done = written + len(waiting) >= files
        if done or len(waiting) >= COMMIT_FILES:
            lake.committers[GOLD].commit(waiting, [Range(0, committed, held, held - committed)])
            written, committed, waiting = written + len(waiting), held, []
        if done:
            break
    return written, held


def trades_of(lake: Lake, options: ProduceOptions, rows: int) -> Iterator[pa.RecordBatch]:
    """Gold rows of the market in the order in which they come, `rows` at a time."""
    for messages in slices(options, BATCH, partitions=1):
        trades = gold_rows(lake.decoder.decode(messages).trades.rows)
        for begin in range(0, trades.num_rows, rows):
            yield trades.slice(begin, rows)


def paths_of(lake: Lake, of: Query) -> list[str]:
    """The data files that Iceberg reads for a query."""
    tasks = load_table(lake.catalog, GOLD).scan(row_filter=of.files).plan_files()
    return sorted(task.file.file_path.removeprefix("file://") for task in tasks)


def timed(paths: Mapping[str, list[str]], runs: int) -> dict[str, dict[str, Times]]:
    """By query and reader. Raises ValueError where the two readers' answers differ."""
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
    """A new connection with Gold as a view: k2flow's, or DuckDB's own of `paths`."""
    if reader == "k2flow":
        return k2flow.connect()
    connection = duckdb.connect()
    connection.execute("SET TimeZone = 'UTC'")
    connection.read_parquet(paths).create_view(GOLD)
    return connection


def _report(files: int, rows: int, states: Mapping[str, Read]) -> None:
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
    report(Report("query", ["files are", "query", "files", *moments], table, figures, plot, notes))
