"""Time from Kafka to Gold of every message, with the flows of both exchanges running."""

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import typer
from confluent_kafka import Consumer, TopicPartition
from matplotlib.axes import Axes
from pyiceberg.catalog import Catalog

from bench.measure import FlowProcess, logged_commits, running
from bench.report import BenchResult, report
from k2flow.config.settings import load_settings
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import KEY, Ledger, read
from k2flow.layers import GOLD_TABLE
from k2flow.sandbox.kafka.local import LocalKafka, free_port

SHORT_TRIGGER_SECONDS = 1.0
HISTORY_SECONDS = 2.0
"""How often Gold's snapshots are read: a table keeps only its newest hundred."""
SETTLE_SECONDS = 30.0
ANSWER_SECONDS = 60.0
CONSUME_MESSAGES = 50_000
SHARES = MappingProxyType({"bad": 0.02, "duplicates": 0.03})  # of the messages

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FreshnessStream:
    """One exchange at one trigger and one rate (messages per second), with its own topic."""

    exchange: Exchange
    trigger: float
    rate: int
    topic: str

    @property
    def name(self) -> str:
        return f"{self.exchange.name}, trigger {self.trigger:g} s"

    def environment(self) -> dict[str, str]:
        prefix = f"K2FLOW_{self.exchange.name.upper()}_"
        return {f"{prefix}TOPIC": self.topic, f"{prefix}TRIGGER_SECONDS": f"{self.trigger:g}"}


@dataclass(frozen=True)
class StreamResult:
    """The results of one stream, in seconds.

    `ages`: of each message, from its Kafka timestamp to its commit to Gold; `delays`: of each commit, from its trigger;
    `behind`: messages that never arrived.
    """

    ages: Seconds
    delays: Seconds
    behind: int


def freshness(
    seconds: Annotated[int, typer.Option(help="Length of each run.")] = 120,
    binance_rate: Annotated[int, typer.Option(help="Binance's messages per second.")] = 10_000,
    kraken_rate: Annotated[int, typer.Option(help="Kraken's messages per second.")] = 500,
    trigger: Annotated[
        list[float] | None,
        typer.Option(
            help="Seconds between commits; repeatable, one run each; if not given: the exchanges' defaults, and 1."
        ),
    ] = None,
) -> None:
    """Measure the age of every message, from produced to queryable in Gold, at the default triggers and at 1 s.

    Both flows and two producers run at the same time; 2 % bad messages and 3 % duplicates count too. A message's time
    is its Kafka timestamp: when it was due to be sent, some ms before it was, so ages err on the long side. A
    commit's time is when the flow knows that it has landed.
    """
    exchanges = [(find_exchange("binance"), binance_rate), (find_exchange("kraken"), kraken_rate)]
    results: list[tuple[FreshnessStream, StreamResult]] = []
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        for i, seconds_between in enumerate(trigger or (None, SHORT_TRIGGER_SECONDS)):
            streams = [
                FreshnessStream(e, seconds_between or e.settings.trigger_seconds, rate, f"{e.name}.{i}")
                for e, rate in exchanges
            ]
            kafka.start({stream.topic: stream.exchange.settings.partitions for stream in streams})
            results += zip(streams, measure(streams, seconds, Path(folder) / f"run-{i}", kafka.bootstrap), strict=True)
    _report(seconds, results)


def measure(streams: Sequence[FreshnessStream], seconds: int, home: Path, bootstrap: str) -> list[StreamResult]:
    """Run all streams at the same time for `seconds`, with tables under `home`."""
    environment = {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": bootstrap}
    for stream in streams:
        environment |= stream.environment()
    history = History(open_catalog(load_settings(exchange_names()).model_copy(update={"home": home})), streams)
    topics = [StreamTopic(bootstrap, stream) for stream in streams]
    with ExitStack() as stack:
        flows = [stack.enter_context(running(stream.exchange.name, environment)) for stream in streams]
        for flow in flows:
            flow.wait_until_reading()
        producers = []
        for stream in streams:
            producers.append(stack.enter_context(producing(stream, seconds, environment)))
            stack.callback(producers[-1].kill)  # no effect on one that has ended
        while any(producer.poll() is None for producer in producers):
            time.sleep(HISTORY_SECONDS)
            history.gather()
        failed = [producer.args for producer in producers if producer.returncode]
        if failed:
            raise RuntimeError(f"these producers failed: {failed}")
        deadline = time.monotonic() + SETTLE_SECONDS + max(stream.trigger for stream in streams)
        while time.monotonic() < deadline and not all(
            history.holds(stream, topic.ends()) for stream, topic in zip(streams, topics, strict=True)
        ):
            time.sleep(HISTORY_SECONDS / 4)
            history.gather()
        for flow in flows:
            flow.end()
    return [
        match_commits(stream, topic.times(), history.of(stream), flow)
        for stream, topic, flow in zip(streams, topics, flows, strict=True)
    ]


def producing(
    stream: FreshnessStream, seconds: int, environment: Mapping[str, str], shares: Mapping[str, float] = SHARES
) -> subprocess.Popen[bytes]:
    """Start a producer in a separate process, so that this one does not slow it down."""
    options = {"count": seconds * stream.rate, "rate": stream.rate, "seed": 1, **shares}
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    command = [sys.executable, "-m", "k2flow", "produce", stream.exchange.name, *given]
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command, env={**os.environ, **environment}, stdout=quiet, stderr=quiet)


class History:
    """The ledgers of `streams` in Gold's snapshots, by sequence number."""

    def __init__(self, catalog: Catalog, streams: Sequence[FreshnessStream]) -> None:
        self._catalog = catalog
        self._found: dict[str, dict[int, Ledger]] = {stream.topic: {} for stream in streams}
        self._exchanges = {stream.exchange.name: stream.topic for stream in streams}

    def gather(self) -> None:
        """Add the ledgers of the snapshots that Gold has now."""
        for snapshot in load_table(self._catalog, GOLD_TABLE).metadata.snapshots:
            for exchange, topic in self._exchanges.items():
                if snapshot.summary is not None and KEY + exchange in snapshot.summary:
                    ledger = read(snapshot.summary, exchange, topic)
                    self._found[topic][ledger.sequence] = ledger

    def of(self, stream: FreshnessStream) -> dict[int, Ledger]:
        return self._found[stream.topic]

    def holds(self, stream: FreshnessStream, ends: Mapping[int, int]) -> bool:
        """Return whether the newest ledger reaches `ends`, the next offset of each partition."""
        ledgers = self.of(stream)
        newest = ledgers[max(ledgers)].partitions if ledgers else {}
        return all(end == 0 or (p in newest and newest[p].next == end) for p, end in ends.items())


class StreamTopic:
    """The topic of a stream, empty at the start of the run."""

    def __init__(self, bootstrap: str, stream: FreshnessStream) -> None:
        config = {"bootstrap.servers": bootstrap, "group.id": "freshness", "enable.auto.commit": "false"}
        self._consumer = Consumer(config)
        self._partitions = [TopicPartition(stream.topic, p, 0) for p in range(stream.exchange.settings.partitions)]

    def ends(self) -> dict[int, int]:
        """Return the next offset of each partition."""
        bounds = [self._consumer.get_watermark_offsets(p, timeout=ANSWER_SECONDS) for p in self._partitions]
        return {p.partition: end for p, (_, end) in zip(self._partitions, bounds, strict=True)}

    def times(self) -> dict[int, Seconds]:
        """Return the Kafka timestamp of each message, in seconds since 1970, by partition and offset. Call it once."""
        times = {partition: np.zeros(end) for partition, end in self.ends().items()}
        self._consumer.assign(self._partitions)
        left = sum(map(len, times.values()))
        while left:
            for message in self._consumer.consume(CONSUME_MESSAGES, timeout=1):
                if message.error() is None:
                    times[message.partition()][message.offset()] = message.timestamp()[1] / 1000
                    left -= 1
        self._consumer.close()
        return times


def match_commits(
    stream: FreshnessStream, times: Mapping[int, Seconds], ledgers: Mapping[int, Ledger], flow: FlowProcess
) -> StreamResult:
    """Match each message of the stream with its commit: the first one whose ledger ends after its offset."""
    landed = {commit.sequence: commit.at for commit in logged_commits(flow.log) if commit.table == GOLD_TABLE}
    sequences = sorted(landed.keys() & ledgers.keys())
    at = np.array([landed[sequence] for sequence in sequences])
    commit, produced = [], []
    for partition, sent in times.items():
        ends = [ledgers[sequence].next_offset(partition) or 0 for sequence in sequences]
        commit.append(np.searchsorted(ends, np.arange(len(sent)), side="right"))
        produced.append(sent)
    of, sent = np.concatenate(commit), np.concatenate(produced)
    came = of < len(sequences)
    of, sent = of[came], sent[came]
    delays = [at[i] - due(sent[of == i], stream.trigger) for i in np.unique(of)]
    return StreamResult(at[of] - sent, np.array(delays), int(np.sum(~came)))


def due(sent: Seconds, trigger: float) -> float:
    """Return the trigger that emitted a batch of messages: the first one after most of them were sent.

    The very first message does not decide: some are sent just before a trigger and fetched just after it.
    """
    return float(np.floor(np.quantile(sent, 0.25) / trigger) + 1) * trigger


def _report(seconds: int, results: Sequence[tuple[FreshnessStream, StreamResult]]) -> None:
    rows: list[list[str]] = []
    figures: dict[str, Any] = {"seconds": seconds, "streams": []}
    for stream, found in results:
        ages, delays = np.percentile(found.ages, [50, 95, 99]), np.percentile(found.delays, [50, 99])
        given = [stream.exchange.name, f"{stream.trigger:g}", f"{stream.rate:,}"]
        counts = [f"{len(found.ages):,}", f"{len(found.delays):,}"]
        rows.append([*given, *counts, *(f"{s:.2f}" for s in (*ages, *delays)), str(found.behind)])
        figures["streams"].append(
            {
                "exchange": stream.exchange.name,
                "trigger_seconds": stream.trigger,
                "messages_per_second": stream.rate,
                "messages": len(found.ages),
                "commits": len(found.delays),
                **{f"age_p{p}_s": round(float(s), 3) for p, s in zip((50, 95, 99), ages, strict=True)},
                **{f"trigger_to_commit_p{p}_s": round(float(s), 3) for p, s in zip((50, 99), delays, strict=True)},
                "behind": found.behind,
            }
        )

    def plot(axes: Axes) -> None:
        shares = np.linspace(0, 1, 501)
        for stream, found in results:
            axes.plot(np.quantile(found.ages, shares), shares, label=stream.name)
        axes.set(xlabel="seconds from produced to queryable in Gold", ylabel="share of messages")
        axes.legend()

    ages_of, delays_of = [f"p{p} s" for p in (50, 95, 99)], [f"trigger to commit p{p} s" for p in (50, 99)]
    columns = ["exchange", "trigger s", "msg/s", "messages", "commits", *ages_of, *delays_of, "left behind"]
    report(BenchResult("freshness", columns, rows, figures, plot))
