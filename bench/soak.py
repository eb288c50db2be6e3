"""Whether a long run stays stable: memory, open files, threads and commits, quarter by quarter."""

import itertools
import multiprocessing
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from pathlib import Path
from statistics import mean, median
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes

from bench.measure import FlowProcess, LoggedCommit, Sample, logged_commits, running, samples, started_at
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import MessageStream

EXCHANGE = "binance"
PAST_HOURS = 168.0
PAST_WINDOW_HOURS = 1
QUARTERS = 4


class Variant(StrEnum):
    """Which trades: all within one dedup window, or of many hours, so that most ids are forgotten during the run."""

    WITHIN = "within"
    PAST = "past"
    BOTH = "both"


@dataclass(frozen=True)
class Quarter:
    """A quarter of a run: resident MB, maxima of open files and threads, ms per commit (None without commits)."""

    mean_mb: float
    peak_mb: float
    files: int
    threads: int
    commit_ms: float | None
    messages_per_second: float


@dataclass(frozen=True)
class SoakRun:
    """One run of a flow, from its first read to its last commit."""

    began: float
    ended: float
    taken: Sequence[Sample]
    quarters: Sequence[Quarter]


def soak(
    messages: Annotated[int, typer.Option(help="Messages to catch up with.")] = 10_000_000,
    minutes: Annotated[float, typer.Option(help="Minutes of a steady run instead of a catch-up.")] = 0.0,
    rate: Annotated[float, typer.Option(help="Messages per second of the steady run.")] = 0.0,
    variant: Annotated[Variant, typer.Option(help="Trades within one dedup window, past it, or one run of each.")] = (
        Variant.BOTH
    ),
) -> None:
    """Sample one process of Binance's flow every 0.25 s: a catch-up, or a steady run with --minutes and --rate.

    2 % bad messages, 3 % duplicates. `within`: all trades are in one dedup window, so every id is kept, about 20 bytes
    each. `past`: the window is one hour and the trades span a week, so nearly all ids are forgotten during the run.
    """
    if (minutes > 0) != (rate > 0):
        raise typer.BadParameter("a steady run needs both --minutes and --rate")
    count = round(minutes * 60 * rate) if minutes else messages
    variants = (Variant.WITHIN, Variant.PAST) if variant is Variant.BOTH else (variant,)
    runs: dict[Variant, SoakRun] = {}
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        for one in variants:
            kafka.start({one: find_exchange(EXCHANGE).settings.partitions})
            runs[one] = run(one, Path(folder) / one, kafka.bootstrap, count, rate)
    _report(count, minutes, rate, runs)


def run(variant: Variant, home: Path, bootstrap: str, count: int, rate: float) -> SoakRun:
    """Run until the flow has caught up with messages sent before or, at `rate`, until all messages are sent."""
    environment = {
        "K2FLOW_HOME": str(home),
        "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": bootstrap,
        "K2FLOW_BINANCE_TOPIC": variant,
    }
    if variant is Variant.PAST:
        environment["K2FLOW_BINANCE_DEDUP_WINDOW_HOURS"] = str(PAST_WINDOW_HOURS)
    if not rate:
        fill(bootstrap, variant, count)
        with running(EXCHANGE, {**environment, "K2FLOW_UNTIL_CAUGHT_UP": "1"}) as flow:
            taken = samples(flow.process)
            flow.check()
            return quartered(flow, taken)
    with running(EXCHANGE, environment) as flow:
        flow.wait_until_reading()
        with filling(bootstrap, variant, count, rate) as producer:
            taken = samples(flow.process, producer.is_alive)
        flow.end()
        if producer.exitcode:
            raise RuntimeError(f"the producer ended with exit code {producer.exitcode}")
        return quartered(flow, taken)


def fill(bootstrap: str, variant: Variant, count: int, rate: float = 0.0) -> None:
    """Send `count` messages, at `rate` per second or as fast as possible, whatever their timestamps are."""
    options = ProduceOptions(count=count, rate=rate, bad=0.02, duplicates=0.03, seed=1)
    if variant is Variant.PAST:
        week = timedelta(hours=PAST_HOURS)
        options = replace(options, rate=count / week.total_seconds(), start=datetime.now(UTC) - week)
    sender = Sender({"bootstrap.servers": bootstrap}, variant)
    began, sent = time.monotonic(), 0
    for messages in MessageStream(find_exchange(EXCHANGE).code, options, options.start_us()).chunks():
        if rate:
            time.sleep(max(0.0, began + sent / rate - time.monotonic()))
        sender.send(messages)
        sent += len(messages.values)
    sender.finish()


@contextmanager
def filling(
    bootstrap: str, variant: Variant, count: int, rate: float
) -> Iterator[multiprocessing.context.SpawnProcess]:
    """Run `fill` in a separate process, and kill it at the end if it still runs."""
    process = multiprocessing.get_context("spawn").Process(target=fill, args=(bootstrap, variant, count, rate))
    process.start()
    try:
        yield process
    finally:
        process.kill()
        process.join()


def quartered(flow: FlowProcess, taken: Sequence[Sample]) -> SoakRun:
    """Split the run into parts of equal time."""
    commits = logged_commits(flow.log)
    began, ended = started_at(flow.log), commits[-1].at
    edges = quarter_edges(began, ended)
    quarters = [
        quarter(taken, [c for c in commits if begin < c.at <= end], begin, end)
        for begin, end in itertools.pairwise(edges)
    ]
    return SoakRun(began, ended, taken, quarters)


def quarter_edges(began: float, ended: float) -> list[float]:
    """Return where the quarters of a run begin, and where the last one ends."""
    return [began + (ended - began) * i / QUARTERS for i in range(QUARTERS + 1)]


def quarter(taken: Sequence[Sample], commits: Sequence[LoggedCommit], begin: float, end: float) -> Quarter:
    before = [sample for sample in taken if sample.at <= end]
    within = [sample for sample in before if sample.at > begin] or before[
        -1:
    ]  # a quarter may be shorter than the sampling interval
    read = sum(commit.offsets for commit in commits if commit.table == find_exchange(EXCHANGE).bronze)
    return Quarter(
        mean(sample.resident for sample in within) / 1e6,
        max(sample.resident for sample in within) / 1e6,
        max(sample.files for sample in within),
        max(sample.threads for sample in within),
        median(commit.seconds for commit in commits) * 1000 if commits else None,
        read / (end - begin),
    )


def _report(count: int, minutes: float, rate: float, runs: dict[Variant, SoakRun]) -> None:
    rows: list[list[str]] = []
    figures: dict[str, Any] = {"messages": count, "minutes": minutes, "rate": rate}
    notes = []
    for variant, one in runs.items():
        for i, q in enumerate(one.quarters, 1):
            commit = "-" if q.commit_ms is None else f"{q.commit_ms:.0f}"
            memory = [f"{q.mean_mb:.0f}", f"{q.peak_mb:.0f}"]
            speed = f"{q.messages_per_second:,.0f}"
            rows.append([variant, f"{i} of {QUARTERS}", *memory, str(q.files), str(q.threads), commit, speed])
        ratio = one.quarters[-1].mean_mb / one.quarters[1].mean_mb
        figures[variant] = {
            "seconds": round(one.ended - one.began, 1),
            "last_over_second_quarter": round(ratio, 3),
            "quarters": [
                {
                    "mean_mb": round(q.mean_mb, 1),
                    "peak_mb": round(q.peak_mb, 1),
                    "open_files": q.files,
                    "threads": q.threads,
                    "commit_ms": None if q.commit_ms is None else round(q.commit_ms, 1),
                    "messages_per_second": round(q.messages_per_second),
                }
                for q in one.quarters
            ],
        }
        notes.append(f"{variant}: {one.ended - one.began:,.0f} s, mean of the last quarter / second: {ratio:.3f}.")

    def plot(axes: Axes) -> None:
        for variant, one in runs.items():
            seconds = [sample.at - one.began for sample in one.taken]
            axes.plot(seconds, [sample.resident / 1e6 for sample in one.taken], label=variant)
        axes.set(xlabel="seconds since it began to read", ylabel="resident MB")
        axes.set_ylim(bottom=0)
        axes.legend(title="the dedup window")

    columns = ["trades", "quarter", "mean MB", "peak MB", "open files", "threads", "median commit ms", "messages/s"]
    report(BenchResult("soak", columns, rows, figures, plot, notes))
