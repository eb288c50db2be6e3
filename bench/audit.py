"""Time and memory of `k2flow audit`, of everything and of what is new, on tables as a flow writes them."""

import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.lake import LakeWriter, message_batches
from bench.measure import Usage, run
from bench.report import BenchResult, report
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions
from k2flow.trades.messages import MessageBatch

EXCHANGE = "binance"
BATCH = 200_000
TIMES = 3  # that each short audit is measured; the median counts


def audit(
    messages: Annotated[int, typer.Option(help="Messages that the first audit proves.")] = 10_000_000,
    new: Annotated[int, typer.Option(help="Messages that come afterwards.")] = 500_000,
    partitions: Annotated[int, typer.Option(help="Partitions of the topic.")] = 6,
) -> None:
    """Audit one exchange in a separate process: wall clock, CPU and peak resident memory.

    The flow's own steps write the tables, without Kafka: 2 % bad messages, 3 % duplicates. Three audits are measured:
    of tables with the new messages alone, of tables with the old messages alone, and of those after the new ones came.
    The last one is incremental. The audit asks a real broker that no longer has the topic, so the tables alone prove
    everything.
    """
    with tempfile.TemporaryDirectory() as made, LocalKafka(Path(made) / "kafka", free_port()) as kafka:
        kafka.start({"another": 1})
        bench = _Bench(Path(made), kafka.bootstrap)
        small, large = Path(made) / "small", Path(made) / "large"
        _write(LakeWriter(small, EXCHANGE), _stream(new, partitions))
        lake, stream = LakeWriter(large, EXCHANGE), _stream(messages + new, partitions)
        began = time.perf_counter()
        _write(lake, stream, messages)
        written = time.perf_counter() - began
        proving = bench.audit(large, [])
        _write(lake, stream)
        alone, incremental = bench.compare(small, large)
    audits = {"all_new": alone, "all_old": proving, "incremental": incremental}
    figures: dict[str, object] = {"messages": messages, "new": new, "tables_written_in_seconds": round(written, 1)}
    for name, used in audits.items():
        figures[name] = {"seconds": round(used.wall, 2), "cpu_seconds": round(used.cpu, 2), "peak_bytes": used.peak}
    figures["times_alone"] = round(incremental.wall / alone.wall, 2)
    titles = [f"{new:,} alone", f"{messages:,} alone", f"{new:,} after {messages:,}: incremental"]
    rows = [
        [title, f"{used.wall:.1f}", f"{used.cpu:.1f}", f"{used.peak / 1e6:.0f}"]
        for title, used in zip(titles, audits.values(), strict=True)
    ]

    def plot(axes: Axes) -> None:
        axes.barh(titles, [used.wall for used in audits.values()])
        axes.set_xlabel("seconds")

    report(BenchResult("audit", ["messages", "seconds", "CPU seconds", "peak MB"], rows, figures, plot))


class _Bench:
    def __init__(self, folder: Path, bootstrap: str) -> None:
        self._folder = folder
        self._bootstrap = bootstrap

    def audit(self, home: Path, options: list[str]) -> Usage:
        """Audit the tables under `home`, whose verdict is checked."""
        settings = {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": self._bootstrap}
        return run([sys.executable, "-m", "k2flow", "audit", EXCHANGE, "--json", *options], settings)

    def compare(self, small: Path, large: Path) -> tuple[Usage, Usage]:
        """Return the median of full audits of `small`, and of incremental ones of `large`, measured in turn."""
        proofs, kept = large / "cache" / "audit", self._folder / "kept"
        shutil.copytree(proofs, kept)
        alone, incremental = [], []
        for _ in range(TIMES):
            alone.append(self.audit(small, ["--full"]))
            shutil.rmtree(proofs)
            shutil.copytree(kept, proofs)
            incremental.append(self.audit(large, []))
            if '"reading": "incremental"' not in incremental[-1].output:
                raise RuntimeError("the audit read everything")
        return _median(alone), _median(incremental)


def _median(used: list[Usage]) -> Usage:
    return sorted(used, key=lambda each: each.wall)[len(used) // 2]


def _stream(messages: int, partitions: int) -> Iterator[MessageBatch]:
    return message_batches(ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1), BATCH, partitions)


def _write(lake: LakeWriter, batches: Iterator[MessageBatch], messages: int | None = None) -> None:
    """Write all batches, or the next ones, until they have this many messages."""
    written = 0
    for batch in batches:
        lake.write(batch)
        written += batch.rows.num_rows
        if messages is not None and written >= messages:
            return
