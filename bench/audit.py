"""Speed and memory of `k2flow audit`, on tables as a flow writes them."""

import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.lake import LakeWriter, message_batches
from bench.measure import run
from bench.report import BenchResult, report
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions

EXCHANGE = "binance"
BATCH = 200_000


def audit(
    messages: Annotated[int, typer.Option(help="Messages; each is one row of Bronze.")] = 10_000_000,
    partitions: Annotated[int, typer.Option(help="Partitions of the topic.")] = 6,
    folder: Annotated[Path | None, typer.Option(help="Folder to keep the tables in, to measure again.")] = None,
) -> None:
    """Audit one exchange in a separate process: wall clock, CPU and peak resident memory.

    The flow's own steps write the tables, without Kafka: 2 % bad messages, 3 % duplicates. The audit asks a real
    broker that no longer has the topic, so the tables alone prove everything.
    """
    with tempfile.TemporaryDirectory() as made:
        home = folder or Path(made)
        with LocalKafka(Path(made) / "kafka", free_port()) as kafka:
            kafka.start({"another": 1})
            began = time.perf_counter()
            if not (home / "catalog.db").exists():
                write_tables(home, messages, partitions)
            written = time.perf_counter() - began
            settings = {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}
            imports = run([sys.executable, "-c", "import k2flow.cli.audit"], {})
            used = run([sys.executable, "-m", "k2flow", "audit", EXCHANGE, "--json"], settings)
    figures = {
        "messages": messages,
        "seconds": round(used.wall, 2),
        "start_up_seconds": round(imports.wall, 2),
        "messages_per_second": round(messages / used.wall),
        "cpu_us_per_message": round(used.cpu / messages * 1e6, 2),
        "peak_bytes": used.peak,
        "tables_written_in_seconds": round(written, 1),
    }
    row = [f"{messages:,}", f"{used.wall:.1f}", f"{used.cpu / messages * 1e6:.2f}", f"{used.peak / 1e6:.0f}"]

    def plot(axes: Axes) -> None:
        axes.barh(["seconds", "MB / 10"], [used.wall, used.peak / 1e7])

    report(BenchResult("audit", ["messages", "seconds", "us CPU/message", "peak MB"], [row], figures, plot))


def write_tables(home: Path, messages: int, partitions: int) -> None:
    """Write tables under `home` as a flow does that reads `messages` messages and commits each BATCH."""
    lake = LakeWriter(home, EXCHANGE)
    options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
    for batch in message_batches(options, BATCH, partitions):
        lake.write(batch)
