"""Time of each stage of a flow per message, without Kafka and Bytewax."""

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated
from unittest.mock import patch

import typer
from matplotlib.axes import Axes

from bench.lake import LakeWriter, message_batches
from bench.measure import Stopwatch
from bench.report import BenchResult, report
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.observability import tracing
from k2flow.observability.metrics import layer_of
from k2flow.sandbox.producer import ProduceOptions

TOTAL, REST = "total", "rest"


def stages(
    messages: Annotated[int, typer.Option(help="Messages in all; the first batch is the warm-up.")] = 1_100_000,
    batch: Annotated[int, typer.Option(help="Messages per batch, approximately: a multiple of 20,000.")] = 100_000,
) -> None:
    """Measure CPU and wall clock per message of each stage of the flow, one after the other in one process.

    The stages are the flow's own spans, as traces show them. 2 % bad messages, 3 % duplicates, 6 partitions; a commit
    to each of the four tables after every ten batches.
    """
    counted = 0
    whole = Stopwatch()
    with tempfile.TemporaryDirectory() as home:
        keep_freed_memory()
        lake = LakeWriter(Path(home))
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        together = lake.exchange.settings.commit_batches
        warming, *batches = message_batches(options, batch)
        lake.write(warming)
        with timed_spans() as took:
            for i, one in enumerate(batches, 1):
                with whole:
                    lake.write(replace(one, ends_checkpoint=i % together == 0 or i == len(batches)))
                counted += one.rows.num_rows
    if not counted:
        raise typer.BadParameter("needs at least two batches: the first one is not counted")
    took[REST] = Stopwatch()
    took[REST].cpu = whole.cpu - sum(watch.cpu for watch in took.values())
    took[REST].wall = whole.wall - sum(watch.wall for watch in took.values())
    _report(messages, batch, counted, took)


@contextmanager
def timed_spans() -> Iterator[dict[str, Stopwatch]]:
    """Time the flow's spans, by name and layer; commits to all layers count as one stage."""
    watches: dict[str, Stopwatch] = {}

    def span(name: str, table: str = "", **_: tracing.Value) -> Stopwatch:
        stage = f"{name} {layer_of(table)}" if table and name != "commit" else name
        return watches.setdefault(stage, Stopwatch())

    with patch.object(tracing, "span", span):
        yield watches


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
        bars = axes.barh(list(took), [cpu[stage] for stage in took])
        axes.bar_label(bars, fmt="%.2f", padding=2)
        axes.margins(x=0.12)
        axes.invert_yaxis()
        axes.set(xlabel="us of CPU per message", ylabel="stage")

    notes = [
        "Without the consumer and Bytewax: `catchup` measures the whole flow. A message is one of the topic, at every "
        "stage. Commits: to each of the four tables, for ten batches together. Rest: Gold's rows, late rows, metrics."
    ]
    columns = ["stage", "us CPU/message", "us wall/message", "share of CPU"]
    report(BenchResult("stages", columns, rows, figures, plot, notes))
