"""Where the time of a flow goes: what each stage takes for a message, with no Kafka and no Bytewax around it."""

import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.lake import STAGES, Lake, slices
from bench.measure import Stopwatch
from bench.report import Report, report
from k2flow.flow.runtime import keep_freed_memory
from k2flow.sandbox.producer import ProduceOptions

TOTAL = "total"


def stages(
    messages: Annotated[int, typer.Option(help="Messages in all, the first batch of which warms.")] = 1_100_000,
    batch: Annotated[int, typer.Option(help="Messages in one batch, about: a multiple of 20,000.")] = 100_000,
) -> None:
    """CPU and wall clock a message of each stage of the flow, one after the other in one process.

    2 % bad messages, 3 % duplicates, 6 partitions; a commit into each of the four tables after every ten batches.
    """
    counted = 0
    took = {stage: Stopwatch() for stage in STAGES}
    with tempfile.TemporaryDirectory() as home:
        keep_freed_memory()
        lake = Lake(Path(home))
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        together = lake.exchange.settings.commit_batches
        warming, *batches = slices(options, batch)
        lake.write(warming)
        for i, one in enumerate(batches, 1):
            lake.write(replace(one, commit=i % together == 0 or i == len(batches)), took.__getitem__)
            counted += one.rows.num_rows
    if not counted:
        raise typer.BadParameter("needs two batches at least: the first one is not counted")
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
        axes.set(xlabel="us of CPU a message", ylabel="stage")

    notes = [
        "The consumer is left out, and so is Bytewax: `catchup` measures the whole. A message is one of the topic, "
        "whatever its stage. Commits: into each of the four tables, for ten batches together."
    ]
    report(Report("stages", ["stage", "us CPU/message", "us wall/message", "share of CPU"], rows, figures, plot, notes))
