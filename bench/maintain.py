"""The cost of maintenance: compaction, snapshot expiry with orphan files, and its effect on a running flow."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pyarrow as pa
import typer
from matplotlib.axes import Axes

from bench.commits import gold_of_hour, timed
from bench.dedup import IdSource, uuid_texts
from bench.freshness import FreshnessStream, StreamResult, measure
from bench.lake import LakeWriter
from bench.measure import Usage, run
from bench.report import BenchResult, report
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.tables import create, definitions
from k2flow.layers import GOLD_TABLE, HOUR_US
from k2flow.maintain.plans import live_files
from k2flow.sandbox.kafka.local import LocalKafka, free_port

HOUR = 490_000
"""The hour of all trades, in hours since 1970: closed long ago."""
EVERY = "2s"
RATE = 10_000
TRIGGER_SECONDS = 1.0
CLEAN = ("--orphan-older-than", "0s", "--reader-grace", "0s")


def maintain(
    files: Annotated[int, typer.Option(help="Small files of the one hour that is compacted.")] = 1_000,
    rows: Annotated[int, typer.Option(help="Rows of all these files together.")] = 10_000_000,
    commits: Annotated[int, typer.Option(help="Commits of the table whose orphan files are removed.")] = 10_000,
    seconds: Annotated[int, typer.Option(help="Seconds that a flow runs, without maintenance and beside it.")] = 90,
) -> None:
    """Measure `k2flow maintain` as a separate process: on an hour of small files, after many commits, beside a flow.

    A run with nothing to do is measured too, and subtracted: its time is start-up and imports.
    """
    with tempfile.TemporaryDirectory() as folder:
        write_hour(Path(folder), files, rows)
        compaction = maintain_once(Path(folder), GOLD_TABLE)
        idle = maintain_once(Path(folder), GOLD_TABLE)
        left = len(live_files(load_table(LakeWriter(Path(folder)).catalog, GOLD_TABLE), "timestamp"))
    with tempfile.TemporaryDirectory() as folder:
        timed(Path(folder), commits, rows=10)
        before = count_files(Path(folder))
        removal = maintain_once(Path(folder), GOLD_TABLE, *CLEAN)
        after = count_files(Path(folder))
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        alone = flow(Path(folder) / "alone", kafka, seconds)
        with maintaining(Path(folder) / "beside"):
            beside = flow(Path(folder) / "beside", kafka, seconds)
    _report(files, rows, commits, compaction.minus(idle), left, removal.minus(idle), (before, after), alone, beside)


def write_hour(home: Path, files: int, rows: int) -> None:
    """Write an hour of Gold in `files` files, in order of time, one commit each; a few rows come late."""
    lake, source, n = LakeWriter(home), IdSource(), rows // files
    base, step = gold_of_hour(lake, n, HOUR), HOUR_US // files
    chance = np.random.default_rng(1)
    for i in range(files):
        times = i * step + chance.integers(0, step, n)
        late = chance.random(n) < 0.001
        times[late] = chance.integers(0, i * step + 1, int(late.sum()))
        values = {"message_id": uuid_texts(source.fresh(n)), "timestamp": pa.array(np.sort(times) + HOUR * HOUR_US)}
        batch = base
        for name, value in values.items():
            field = base.schema.field(name)
            batch = batch.set_column(base.schema.get_field_index(name), field, value.cast(field.type))
        offsets = [OffsetRange(0, i * n, (i + 1) * n, n)]
        lake.committers[GOLD_TABLE].commit(lake.write_files(GOLD_TABLE, batch), offsets)


def maintain_once(home: Path, *arguments: str) -> Usage:
    """Run maintenance once."""
    return run([sys.executable, "-m", "k2flow", "maintain", *arguments], {"K2FLOW_HOME": str(home)})


def count_files(home: Path) -> int:
    return sum(path.is_file() for path in (home / "warehouse").rglob("*"))


def flow(home: Path, kafka: LocalKafka, seconds: int) -> StreamResult:
    """Measure Binance's flow at RATE messages per second, with a commit each second."""
    exchange = find_exchange("binance")
    stream = FreshnessStream(exchange, TRIGGER_SECONDS, RATE, home.name)
    kafka.start({stream.topic: exchange.settings.partitions})
    (found,) = measure([stream], seconds, home, kafka.bootstrap)
    return found


@contextmanager
def maintaining(home: Path) -> Iterator[None]:
    """Run maintenance of all tables under `home` in a loop. Raise RuntimeError if it fails."""
    settings = load_settings(exchange_names()).model_copy(update={"home": home})
    create(open_catalog(settings), definitions(find_exchange("binance")).values())  # they exist from the first run on
    command = [sys.executable, "-m", "k2flow", "maintain", "--every", EVERY, *CLEAN[2:]]
    with (home / "maintain.log").open("wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "K2FLOW_HOME": str(home)}, stdout=log, stderr=log)
    try:
        yield
        process.terminate()
        if process.wait(60):
            raise RuntimeError(f"maintenance failed: {(home / 'maintain.log').read_text()[-4000:]}")
    finally:
        process.kill()
        process.wait()


def _report(
    files: int,
    rows: int,
    commits: int,
    compaction: Usage,
    left: int,
    removal: Usage,
    counts: tuple[int, int],
    alone: StreamResult,
    beside: StreamResult,
) -> None:
    rate = rows / compaction.wall
    before, after = counts
    table = [
        ["compaction", f"{files:,} files of an hour, {rows:,} rows, into {left}", f"{compaction.wall:.1f}",
         f"{compaction.cpu:.1f}", f"{compaction.peak / 1e6:.0f}", f"{rate:,.0f} rows/s"],
        ["expiry, orphan files", f"{commits:,} commits: {before:,} files, {after:,} afterwards",
         f"{removal.wall:.1f}", f"{removal.cpu:.1f}", f"{removal.peak / 1e6:.0f}", ""],
    ]  # fmt: skip
    p99 = {"alone": percentile(alone.delays), "beside": percentile(beside.delays)}
    ratio = p99["beside"] / p99["alone"]
    notes = [
        f"A flow at {RATE:,} msg/s and a trigger of {TRIGGER_SECONDS:g} s, trigger to commit p99: {p99['alone']:.2f} s "
        f"alone, {p99['beside']:.2f} s beside `k2flow maintain --every {EVERY}`: {ratio:.2f} times "
        f"({len(alone.delays)} and {len(beside.delays)} commits; {alone.behind + beside.behind} messages left behind)."
    ]
    figures: dict[str, Any] = {
        "compaction": {
            "files": files,
            "rows": rows,
            "into": left,
            "rows_per_second": round(rate),
            **_usage(compaction),
        },
        "removal": {"commits": commits, "files": before, "left": after, **_usage(removal)},
        "trigger_to_commit_p99_s": {name: round(value, 3) for name, value in p99.items()},
    }

    def plot(axes: Axes) -> None:
        for name, found in (("alone", alone), ("beside maintenance", beside)):
            shares = np.linspace(0, 1, len(found.delays))
            axes.plot(np.sort(found.delays), shares, label=name, drawstyle="steps-post")
        axes.set(xlabel="seconds from trigger to commit", ylabel="share of commits")
        axes.legend()

    report(BenchResult("maintain", ["step", "of", "s", "CPU s", "peak MB", "rate"], table, figures, plot, notes))


def percentile(delays: Sequence[float] | np.ndarray) -> float:
    return float(np.percentile(delays, 99))


def _usage(used: Usage) -> dict[str, float]:
    return {"seconds": round(used.wall, 2), "cpu_seconds": round(used.cpu, 2), "peak_mb": round(used.peak / 1e6)}
