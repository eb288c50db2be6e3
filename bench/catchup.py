"""Speed of catch-up: a topic into all four layers, compared with draining the topic and doing nothing."""

import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.drain import measured
from bench.measure import Usage, run
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions, produce

PYTHON = sys.executable
EXCHANGE = "binance"


def catchup(
    messages: Annotated[int, typer.Option(help="Messages in the topic.")] = 1_000_000,
    runs: Annotated[int, typer.Option(help="Counted runs of each, alternating.")] = 3,
    partitions: Annotated[int, typer.Option(help="Partitions of the topic.")] = 6,
) -> None:
    """Catch up by one process into Bronze, Silver, DLQ and Gold, compared with a plain drain of the same topic.

    A run with nothing to do is measured too, and subtracted: its time is start-up and imports.
    """
    exchange = find_exchange(EXCHANGE)
    topic = exchange.settings.topic
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        kafka.start({topic: partitions})
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        produce(exchange.code, topic, {"bootstrap.servers": kafka.bootstrap}, options)
        flow = [PYTHON, "-m", "bytewax.run", f"flows.{EXCHANGE}"]
        drains, flows = [], []
        for i in range(runs + 1):  # the first of each warms the page cache and is not counted
            settings = {
                "K2FLOW_HOME": f"{folder}/run-{i}",
                "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
                "K2FLOW_UNTIL_CAUGHT_UP": "1",
            }
            drained = measured(kafka.bootstrap, topic)
            caught_up = run(flow, settings)
            nothing = run(flow, settings)
            if i:
                drains.append(drained)
                flows.append(caught_up.minus(nothing))
    _report(messages, drains, flows)


def _report(messages: int, drains: list[Usage], flows: list[Usage]) -> None:
    ratios = [drained.wall / flow.wall for drained, flow in zip(drains, flows, strict=True)]
    rows = [
        [
            str(i),
            f"{messages / drained.wall:,.0f}",
            f"{drained.cpu / messages * 1e6:.2f}",
            f"{messages / flow.wall:,.0f}",
            f"{flow.cpu / messages * 1e6:.2f}",
            f"{flow.peak / 1e6:.0f}",
            f"{ratio:.3f}",
        ]
        for i, (drained, flow, ratio) in enumerate(zip(drains, flows, ratios, strict=True), 1)
    ]
    figures = {
        "messages": messages,
        "drain_messages_per_second": round(median(messages / d.wall for d in drains)),
        "drain_cpu_us_per_message": round(median(d.cpu / messages * 1e6 for d in drains), 2),
        "flow_messages_per_second": round(median(messages / f.wall for f in flows)),
        "flow_cpu_us_per_message": round(median(f.cpu / messages * 1e6 for f in flows), 2),
        "flow_peak_bytes": max(f.peak for f in flows),
        "rate_ratio": round(median(ratios), 3),
    }

    def plot(axes: Axes) -> None:
        axes.bar(["drain", "flow"], [figures["drain_messages_per_second"], figures["flow_messages_per_second"]])
        axes.set_ylabel("messages per second")

    columns = ["run", "drain msg/s", "drain us CPU/msg", "flow msg/s", "flow us CPU/msg", "flow peak MB", "rate ratio"]
    report(BenchResult("catchup", columns, rows, figures, plot))
