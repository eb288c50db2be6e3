"""Where the time of a flow goes: what each stage takes for a message, with no Kafka and no Bytewax around it."""

import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import pyarrow as pa
import typer
from matplotlib.axes import Axes
from pyiceberg.manifest import DataFile

from bench.lake import Lake, slices
from bench.report import Report, report
from k2flow.dedup.index import SeenIds
from k2flow.exchange import GOLD
from k2flow.flow import bronze_rows
from k2flow.gold import gold_rows, hours_of
from k2flow.ledger import Range
from k2flow.messages import Slice
from k2flow.produce import ProduceOptions
from k2flow.runtime import keep_freed_memory

STAGES = (
    "bronze rows",
    "Bronze's files",
    "decode, validate",
    "Silver's files",
    "DLQ files",
    "gold rows, dedup",
    "Gold's files",
    "commits",
)
TOTAL = "total"


class Stopwatch:
    """Adds up what the blocks under `with` take: `wall` and `cpu` (all threads of this process) in seconds."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> "Stopwatch":
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *_: object) -> None:
        wall, cpu = self._began
        self.cpu += time.process_time() - cpu
        self.wall += time.perf_counter() - wall


def stages(
    messages: Annotated[int, typer.Option(help="Messages in all, the first batch of which warms.")] = 1_000_000,
    batch: Annotated[int, typer.Option(help="Messages in one batch, about: a multiple of 20,000.")] = 100_000,
) -> None:
    """CPU and wall clock a message of each stage of the flow, one after the other in one process.

    2 % bad messages, 3 % duplicates, 6 partitions; each batch is committed into all four tables.
    """
    counted = 0
    took = {stage: Stopwatch() for stage in STAGES}
    with tempfile.TemporaryDirectory() as home:
        flow = StagedFlow(Path(home))
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        for i, one in enumerate(slices(options, batch)):
            if i == 0:
                flow.run(one, {stage: Stopwatch() for stage in STAGES})
            else:
                flow.run(one, took)
                counted += one.rows.num_rows
    if not counted:
        raise typer.BadParameter("needs two batches at least: the first one is not counted")
    _report(messages, batch, counted, took)


class StagedFlow:
    """The stages of a flow on tables under `home`, each timed."""

    def __init__(self, home: Path) -> None:
        keep_freed_memory()
        self._lake = Lake(home)
        self._seen = SeenIds(lambda hour: [], None)

    def run(self, messages: Slice, took: Mapping[str, Stopwatch]) -> None:
        """One batch through all stages, in the order of offsets; `took` has a watch for each of STAGES."""
        exchange = self._lake.exchange
        with took["bronze rows"]:
            bronze = bronze_rows(messages, exchange.settings.topic)
        with took["Bronze's files"]:
            written = {exchange.bronze: self._write(exchange.bronze, bronze, messages)}
        with took["decode, validate"]:
            decoded = self._lake.decoder.decode(messages)
        with took["Silver's files"]:
            written[exchange.silver] = self._write(exchange.silver, decoded.trades.rows, decoded.trades)
        with took["DLQ files"]:
            written[exchange.dlq] = self._write(exchange.dlq, decoded.failures.rows, decoded.failures)
        with took["gold rows, dedup"]:
            gold = gold_rows(decoded.trades.rows)
            first = self._seen.first_seen(gold.column("message_id"), hours_of(gold))
            fresh = gold.filter(pa.array(first))
        with took["Gold's files"]:
            written[GOLD] = self._write(GOLD, fresh, decoded.trades)
        with took["commits"]:
            for name, (files, ranges) in written.items():
                self._lake.committers[name].commit(files, ranges)
            self._seen.commit()

    def _write(self, table: str, rows: pa.RecordBatch, origin: Slice) -> tuple[Sequence[DataFile], list[Range]]:
        """`rows` in data files that are finished, and the offsets of `origin`."""
        return self._lake.writers[table].write(rows), origin.ranges()


def _report(messages: int, batch: int, counted: int, took: Mapping[str, Stopwatch]) -> None:
    cpu = {stage: watch.cpu / counted * 1e6 for stage, watch in took.items()}
    wall = {stage: watch.wall / counted * 1e6 for stage, watch in took.items()}
    cpu[TOTAL], wall[TOTAL] = sum(cpu.values()), sum(wall.values())
    rows = [[s, f"{cpu[s]:.2f}", f"{wall[s]:.2f}", f"{cpu[s] / cpu[TOTAL]:.0%}"] for s in cpu]
    figures = {
        "messages": messages,
        "batch": batch,
        "cpu_us_per_message": {stage: round(us, 3) for stage, us in cpu.items()},
        "wall_us_per_message": {stage: round(us, 3) for stage, us in wall.items()},
    }

    def plot(axes: Axes) -> None:
        bars = axes.barh(STAGES, [cpu[stage] for stage in STAGES])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set(xlabel="us of CPU a message", ylabel="stage")

    notes = [
        "The consumer is left out, and so is Bytewax: `catchup` measures the whole. A message is one of the topic, "
        "whatever its stage. Commits: four for each batch."
    ]
    report(Report("stages", ["stage", "us CPU/message", "us wall/message", "share of CPU"], rows, figures, plot, notes))
