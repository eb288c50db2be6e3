"""Whether commits slow down as a table ages: the latency of each of many commits to one table."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from matplotlib.axes import Axes
from rich.console import Console
from rich.progress import track

from bench.lake import LakeWriter, message_batches
from bench.measure import Stopwatch
from bench.report import BenchResult, report
from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import GOLD, GOLD_TABLE, HOUR_US
from k2flow.sandbox.producer import ProduceOptions

POINTS = (1, 100, 1_000, 10_000)
BASE = 100
"""The commit that the last one is compared with: metadata is still smaller at the first ones."""
HOUR = 490_000
"""Hour of all trades, in hours since 1970."""


def commits(
    commits: Annotated[int, typer.Option(help="Commits to the table, one after the other.")] = 10_000,
    rows: Annotated[int, typer.Option(help="Rows of the one data file of each commit.")] = 1_000,
) -> None:
    """Measure the 1st, 100th, 1,000th and 10,000th commit to Gold, in a SQLite catalog and a local folder.

    Each figure covers the commits within a tenth on both sides. Writing the data files is not included.
    """
    with tempfile.TemporaryDirectory() as home:
        watches = timed(Path(home), commits, rows)
    ms, cpu = [watch.wall * 1000 for watch in watches], [watch.cpu * 1000 for watch in watches]
    windows = {p: slice(p - p // 10 - 1, p + p // 10) for p in POINTS if p <= commits}
    columns: dict[str, tuple[Callable[[list[float]], float], list[float]]] = {
        "median ms": (median, ms),
        "mean ms": (mean, ms),
        "max ms": (max, ms),
        "median CPU ms": (median, cpu),
        "mean CPU ms": (mean, cpu),
    }
    found = {name: {p: of(values[w]) for p, w in windows.items()} for name, (of, values) in columns.items()}
    table = [[f"{p:,}", f"{len(ms[w]):,}", *(f"{found[name][p]:.1f}" for name in columns)] for p, w in windows.items()]
    figures: dict[str, Any] = {"commits": commits, "rows": rows}
    figures |= {_key(name): {p: round(value, 2) for p, value in of.items()} for name, of in found.items()}
    notes = []
    last = max(windows)
    if last > BASE:
        ratios = {name: of[last] / of[BASE] for name, of in found.items()}
        figures["ratios"] = {_key(name): round(ratio, 3) for name, ratio in ratios.items()}
        ratios_text = ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items())
        notes = [f"Commit {last:,} / commit {BASE}: {ratios_text}. The mean includes the merges of manifests."]

    def plot(axes: Axes) -> None:
        axes.scatter(range(1, len(ms) + 1), ms, s=4, alpha=0.3, linewidths=0, label="one commit", rasterized=True)
        middle = found["median ms"]
        axes.plot(list(middle), list(middle.values()), "k_", markersize=12, label="median")
        axes.set(xlabel="commit", ylabel="ms", ylim=(0, float(np.quantile(ms, 0.999)) * 1.1))
        axes.legend()

    report(BenchResult("commits", ["commit", "counted around it", *columns], table, figures, plot, notes))


def timed(home: Path, commits: int, rows: int) -> list[Stopwatch]:
    """Measure each commit to Gold under `home`."""
    lake = LakeWriter(home)
    content = gold_of_hour(lake, rows, HOUR)
    watches = []
    for i in track(range(commits), "commits", console=Console(stderr=True)):
        files = lake.write_files(GOLD_TABLE, content)
        with Stopwatch() as watch:
            lake.committers[GOLD_TABLE].commit(files, [OffsetRange(0, i * rows, (i + 1) * rows, rows)])
        watches.append(watch)
    return watches


def gold_of_hour(lake: LakeWriter, rows: int, hour: int) -> pa.RecordBatch:
    """Return `rows` rows of Gold sorted by time: the market's trades, moved into one hour (since 1970)."""
    batches = message_batches(ProduceOptions(count=rows, seed=1), rows)
    gold = GOLD.rows(pa.concat_batches(list(lake.trades(batches))))
    n = gold.num_rows
    times = hour * HOUR_US + np.arange(n) * HOUR_US // n
    columns = {
        "timestamp": pa.array(times).cast(pa.timestamp("us", "UTC")),
        "exchange_date": pa.repeat(pa.scalar(hour // 24, pa.int32()).cast(pa.date32()), n),
        "exchange_hour": pa.repeat(pa.scalar(hour % 24, pa.int32()), n),
    }
    arrays = [columns.get(field.name, gold.column(field.name)) for field in gold.schema]
    return pa.RecordBatch.from_arrays(arrays, schema=gold.schema)


def _key(name: str) -> str:
    return name.lower().replace(" ", "_")
