"""Whether a table's age costs anything: a Gold of three years beside one of a day, with the same day on top."""

import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from matplotlib.axes import Axes
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from bench.commits import gold_of_hour
from bench.lake import LakeWriter
from bench.measure import Stopwatch, Usage, in_child, logged_commits, run
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import OffsetRange
from k2flow.layers import GOLD_TABLE, HOUR_US
from k2flow.sandbox.kafka.local import LocalKafka, free_port

DAY_HOURS = 24
MANIFEST_FILES = 2_000
"""Files of each commit of old hours, and so of each of their manifests: as many as maintenance leaves in one."""
COMMIT_FILES = 10
MEBIBYTE = 1 << 20


@dataclass
class Measured:
    """What one of the two tables cost: the seconds of each run by action, and the peak bytes of processes."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    peak: dict[str, int] = field(default_factory=dict)

    def add(self, action: str, seconds: float, peak: int = 0) -> None:
        self.seconds.setdefault(action, []).append(seconds)
        self.peak[action] = max(peak, self.peak.get(action, 0))

    def add_process(self, action: str, usage: Usage) -> None:
        """Add a process by its CPU: the wall time of a start says more of the other processes here."""
        self.add(f"{action}, wall", usage.wall, usage.peak)
        self.add(f"{action}, CPU", usage.cpu)


def age(
    hours: Annotated[int, typer.Option(help="Hours of the old table before its last day, one file each.")] = 26_280,
    files: Annotated[int, typer.Option(help="Small files of the last day.")] = 1_440,
    rows: Annotated[int, typer.Option(help="Rows of each of them.")] = 100,
    commits: Annotated[int, typer.Option(help="Commits to measure.")] = 40,
    runs: Annotated[int, typer.Option(help="Runs of each other action; the two tables alternate.")] = 3,
) -> None:
    """Measure what people and flows do with an old Gold, and with one of a day: no action may cost much more.

    The old hours have metadata and empty files, no rows. Maintenance has run on them before the last day. The last day
    is the same in both tables: small files, as a flow leaves them.
    """
    tables = {"a day": 0, "old": hours}
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        binance = find_exchange("binance").settings
        kafka.start({binance.topic: binance.partitions})
        homes = {name: Path(folder) / name.replace(" ", "-") for name in tables}
        found = {name: Measured() for name in tables}
        for name, home in homes.items():
            environment = environment_of(home, kafka)
            with Stopwatch() as watch:
                in_child(write_old, home, tables[name])
            typer.echo(f"{name}: {tables[name]:,} old hours in {watch.wall:.0f} s", err=True)
            run([sys.executable, "-m", "k2flow", "maintain"], environment)
            for wall, cpu in in_child(write_day, home, files, rows, commits):
                found[name].add("commit, wall", wall)
                found[name].add("commit, CPU", cpu)
        for _ in range(runs):
            for name, home in homes.items():
                measure(found[name], home, environment_of(home, kafka))
        for name, home in homes.items():
            found[name].add_process("maintain, first pass", command(home, kafka, "maintain"))
        for _ in range(runs):
            for name, home in homes.items():
                found[name].add_process("maintain, nothing to do", command(home, kafka, "maintain"))
    _report(hours, files, found)


def environment_of(home: Path, kafka: LocalKafka) -> dict[str, str]:
    return {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}


def command(home: Path, kafka: LocalKafka, *arguments: str) -> Usage:
    return run([sys.executable, "-m", "k2flow", *arguments], environment_of(home, kafka))


def last_hour() -> int:
    """Return the newest hour of both tables, in hours since 1970: the one before this hour."""
    return int(time.time()) // 3_600 - 1


def write_old(home: Path, hours: int) -> None:
    """Write the metadata of old hours, one data file each, MANIFEST_FILES in a manifest, and empty files."""
    lake = LakeWriter(home)
    table = load_table(lake.catalog, GOLD_TABLE)
    first = last_hour() - DAY_HOURS + 1 - hours
    (written,) = lake.write_files(GOLD_TABLE, gold_of_hour(lake, 1_000, first))
    folder = Path(table.location().removeprefix("file://")) / "data"
    offset = 0
    for start in range(0, hours, MANIFEST_FILES):
        some = [
            old_file(table, written, hour) for hour in range(first + start, first + min(hours, start + MANIFEST_FILES))
        ]
        for file in some:
            (folder / Path(file.file_path).name).touch()
        rows = sum(file.record_count for file in some)
        lake.committers[GOLD_TABLE].commit(some, [OffsetRange(0, offset, offset + rows, rows)])
        offset += rows


def old_file(table: Table, written: DataFile, hour: int) -> DataFile:
    """Return a data file like `written` of another hour (since 1970), with the statistics that maintenance leaves."""
    schema = table.schema()
    moved = {
        schema.find_field("timestamp").field_id: [_bytes(us, 8) for us in (hour * HOUR_US, (hour + 1) * HOUR_US - 1)],
        schema.find_field("exchange_date").field_id: [_bytes(hour // DAY_HOURS, 4)] * 2,
        schema.find_field("exchange_hour").field_id: [_bytes(hour % DAY_HOURS, 4)] * 2,
    }
    bounds = {
        name: {**getattr(written, name), **{column: values[i] for column, values in moved.items()}}
        for i, name in enumerate(("lower_bounds", "upper_bounds"))
    }
    kept = ("content", "file_format", "record_count", "file_size_in_bytes", "sort_order_id")
    kept += ("column_sizes", "value_counts", "null_value_counts", "split_offsets")
    partition = type(written.partition)(hour // DAY_HOURS, hour % DAY_HOURS)
    path = f"{table.location()}/data/hour-{hour}.parquet"
    file = DataFile.from_args(
        file_path=path, partition=partition, **bounds, **{name: getattr(written, name) for name in kept}
    )
    file.spec_id = written.spec_id
    return file


def _bytes(value: int, width: int) -> bytes:
    return value.to_bytes(width, "little", signed=True)


def write_day(home: Path, files: int, rows: int, commits: int) -> list[tuple[float, float]]:
    """Write the last day in small files, COMMIT_FILES a commit.

    Return the seconds and CPU seconds of further commits, of one file each.
    """
    lake = LakeWriter(home)
    committer, first = lake.committers[GOLD_TABLE], last_hour() - DAY_HOURS + 1
    content = [gold_of_hour(lake, rows, first + hour) for hour in range(DAY_HOURS)]
    offset, took, waiting = committer.ledger.partitions[0].next if committer.ledger.partitions else 0, [], []
    for i in range(files + commits):
        waiting += lake.write_files(GOLD_TABLE, content[min(i * DAY_HOURS // files, DAY_HOURS - 1)])
        if len(waiting) < (COMMIT_FILES if i < files - 1 else 1):
            continue
        held = sum(file.record_count for file in waiting)
        with Stopwatch() as watch:
            committer.commit(waiting, [OffsetRange(0, offset, offset + held, held)])
        took += [(watch.wall, watch.cpu)] if i >= files else []
        offset, waiting = offset + held, []
    return took


def measure(found: Measured, home: Path, environment: dict[str, str]) -> None:
    """Measure one run of each action."""
    found.add_process("query of an hour", run([sys.executable, "-m", "k2flow", "query", hour_query()], environment))
    found.add_process("status", run([sys.executable, "-m", "k2flow", "status"], environment))
    page = ["--html", str(home / "report.html"), "--no-audit"]
    found.add_process("report", run([sys.executable, "-m", "k2flow", "report", *page], environment))
    run([sys.executable, "-m", "k2flow", "produce", "binance", "--count", "1000"], environment)
    began = time.time()
    # The tables were written without Kafka: their topic is not this one.
    once = {"K2FLOW_UNTIL_CAUGHT_UP": "1", "K2FLOW_BINANCE_ACCEPT_LOST_OFFSETS": "1"}
    usage = run([sys.executable, "-m", "bytewax.run", "flows.binance"], {**environment, **once})
    found.add_process("flow, start to end", usage)
    log = home / "flow.log"
    log.write_text(usage.output)
    first = next(commit.at for commit in logged_commits(log) if commit.table == GOLD_TABLE)
    found.add("flow, start to first commit", first - began)


def hour_query() -> str:
    """Return the SQL of a query of one hour of the last day."""
    at = datetime.fromtimestamp((last_hour() - DAY_HOURS // 2) * 3_600, UTC)
    hour = f"exchange_date = DATE '{at:%Y-%m-%d}' AND exchange_hour = {at.hour}"
    return f"SELECT count(*), sum(price) FROM {GOLD_TABLE} WHERE {hour}"


def _report(hours: int, files: int, found: dict[str, Measured]) -> None:
    young, old = found.values()
    table: list[list[str]] = []
    figures: dict[str, Any] = {"hours": hours, "files": files}
    for action in young.seconds:
        medians = [statistics.median(each.seconds[action]) for each in (young, old)]
        peaks = [each.peak[action] // MEBIBYTE for each in (young, old)]
        shown = [f"{peak:,}" if peak else "" for peak in peaks]
        table.append([action, *(f"{s * 1000:,.0f}" for s in medians), f"{medians[1] / medians[0]:.2f}", *shown])
        figures[action] = {"ms": [round(s * 1000, 1) for s in medians], "peak_mb": peaks}

    def plot(axes: Axes) -> None:
        actions = list(young.seconds)
        ratios = [statistics.median(old.seconds[a]) / statistics.median(young.seconds[a]) for a in actions]
        axes.barh(np.arange(len(actions)), ratios)
        axes.set_yticks(np.arange(len(actions)), actions, fontsize="x-small")
        axes.axvline(1.0, color="black", linewidth=0.8)
        axes.set_xlabel("time with the old table / with the table of a day")

    columns = ["action", "a day: ms", "old: ms", "ratio", "a day: peak MB", "old: peak MB"]
    notes = [
        f"Old: {hours:,} hours of one file each, and the same last day of {files:,} small files as the other table."
    ]
    report(BenchResult("age", columns, table, figures, plot, notes))
