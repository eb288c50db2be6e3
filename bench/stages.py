"""Time of each stage of a flow per message, without Kafka and Bytewax."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.lake import STAGES, LakeWriter, message_batches
from bench.measure import Stopwatch
from bench.report import BenchResult, report
from k2flow.flow.runtime import keep_freed_memory
from k2flow.sandbox.producer import ProduceOptions

TOTAL = "total"


def stages(
    messages: Annotated[int, typer.Option(help="Messages in all; the first batch is the warm-up.")] = 1_100_000,
    batch: Annotated[int, typer.Option(help="Messages per batch, approximately: a multiple of 20,000.")] = 100_000,
) -> None:
    """Measure CPU and wall clock per message of each stage of the flow, one after the other in one process.

    2 % bad messages, 3 % duplicates, 6 partitions; a commit to each of the four tables after every ten batches.
    """
    counted = 0
    took = {stage: Stopwatch() for stage in STAGES}
    with tempfile.TemporaryDirectory() as home:
        keep_freed_memory()
        lake = LakeWriter(Path(home))
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        together = lake.exchange.settings.commit_batches
        warming, *batches = message_batches(options, batch)
        lake.write(warming)
        for i, one in enumerate(batches, 1):
            lake.write(replace(one, commit=i % together == 0 or i == len(batches)), took.__getitem__)
            counted += one.rows.num_rows
    if not counted:
        raise typer.BadParameter("needs at least two batches: the first one is not counted")
    _report(messages, batch, counted, took)


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
        axes.set(xlabel="us of CPU per message", ylabel="stage")

    notes = [
        "Without the consumer and Bytewax: `catchup` measures the whole flow. A message is one of the topic, at every "
        "stage. Commits: to each of the four tables, for ten batches together."
    ]
    report(
        BenchResult(
            "stages", ["stage", "us CPU/message", "us wall/message", "share of CPU"], rows, figures, plot, notes
        )
    )
