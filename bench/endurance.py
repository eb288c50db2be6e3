"""A long run of one flow, killed on the way: memory, the first commit after each kill, and what the audit says."""

import json
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Annotated

import typer
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient
from matplotlib.axes import Axes
from pyiceberg.catalog import Catalog, load_catalog

from bench.measure import FlowProcess, Sample, Usage, logged_commits, run, samples
from bench.report import BenchResult, report
from bench.soak import QUARTERS, quarter, quarter_edges
from k2flow.exchange import find_exchange
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import CATALOG, default_properties, find_table
from k2flow.layers import GOLD_TABLE
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import Manifest, ProduceOptions, produce

EXCHANGE = find_exchange("binance")
POLL_SECONDS = 0.5
LOST_SECONDS = 600.0
"""Without a commit for so long, the flow is stuck."""


def endurance(
    messages: Annotated[int, typer.Option(help="Messages of the whole run.")] = 100_000_000,
    parts: Annotated[int, typer.Option(help="Kafka holds the messages of one part at a time.")] = 10,
    kills: Annotated[int, typer.Option(help="Kills of the flow, each in another part.")] = 3,
    seed: Annotated[int, typer.Option(help="Of the trades, and of the moments of the kills.")] = 1,
    trigger: Annotated[float, typer.Option(help="Seconds between two commits.")] = 10.0,
) -> None:
    """Produce part after part beside a flow that runs all the time, and audit each one before Kafka forgets it.

    All trades are within one deduplication window. 2 % bad messages, 3 % duplicates. The flow is killed with -9 while
    it works on some of the parts, and started again.
    """
    if not 0 <= kills <= parts:
        raise typer.BadParameter("there is at most one kill in each part")
    chance = random.Random(seed)
    killed = {part: chance.uniform(0.2, 0.8) for part in chance.sample(range(parts), kills)}
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        kafka.start({EXCHANGE.settings.topic: EXCHANGE.settings.partitions})
        settings = {
            "K2FLOW_HOME": f"{folder}/home",
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
            EXCHANGE.setting("trigger_seconds"): str(trigger),
        }
        with ThreadPoolExecutor(2) as pool:
            flow = LongRun(settings, pool)
            audits = []
            try:
                for part in range(parts):
                    options = ProduceOptions(count=messages // parts, bad=0.02, duplicates=0.03, seed=seed + part)
                    sent = pool.submit(
                        produce, EXCHANGE.code, EXCHANGE.settings.topic, {"bootstrap.servers": kafka.bootstrap}, options
                    )
                    if part in killed:
                        flow.kill_after(round((part + killed[part]) * messages / parts), sent)
                    flow.catch_up(sent)
                    audits.append(run([sys.executable, "-m", "k2flow", "audit", EXCHANGE.name, "--json"], settings))
                    forget(kafka.bootstrap, sent.result())
                flow.end()
            finally:
                flow.kill()
    _report(messages, flow, audits)


class LongRun:
    """A flow that is sampled while it runs, and started again after a kill."""

    def __init__(self, settings: Mapping[str, str], pool: ThreadPoolExecutor) -> None:
        self.taken: list[Sample] = []
        self.first_commits: list[float] = []  # seconds from each start after a kill
        self._settings = settings
        self._pool = pool
        self._catalog: Catalog | None = None
        self._start()

    def kill_after(self, messages: int, sent: Future[Manifest]) -> None:
        """Kill the flow once it has committed this number of messages, and start it again.

        Note when it commits the next ones of those that are being sent, unless it had committed all of them.
        """
        self._wait(messages)
        self._flow.kill()
        self.taken += self._sampled.result()
        began = time.time()
        self._start()
        while not (commits := [each for each in logged_commits(self._flow.log) if each.offsets]):
            self._check()
            if sent.done() and self._committed() >= total(sent.result()):
                return
            time.sleep(POLL_SECONDS)
        self.first_commits.append(commits[0].at - began)

    def catch_up(self, sent: Future[Manifest]) -> None:
        """Wait until all messages that are being sent are in Gold."""
        self._wait(total(sent.result()))

    def end(self) -> None:
        """Let the flow commit what it has read, and end."""
        self._flow.end()
        self.taken += self._sampled.result()

    def kill(self) -> None:
        """Kill the flow if it still runs."""
        self._flow.kill()

    def _start(self) -> None:
        self._flow = FlowProcess(EXCHANGE.name, self._settings)
        self._sampled = self._pool.submit(samples, self._flow.process)

    def _wait(self, messages: int) -> None:
        """Wait until Gold holds the rows of this number of messages."""
        last, since = -1, time.monotonic()
        while (held := self._committed()) < messages:
            self._check()
            if held > last:
                last, since = held, time.monotonic()
            if time.monotonic() - since > LOST_SECONDS:
                raise RuntimeError(f"no commit for {LOST_SECONDS:.0f} s, at {held} of {messages} messages")
            time.sleep(POLL_SECONDS)

    def _check(self) -> None:
        if self._flow.process.poll() is not None:
            self._flow.check()
            raise RuntimeError("the flow has ended")

    def _committed(self) -> int:
        """Return the number of offsets in Gold's ledger."""
        if self._catalog is None:
            self._catalog = load_catalog(CATALOG, **default_properties(Path(self._settings["K2FLOW_HOME"])))
        table = find_table(self._catalog, GOLD_TABLE)
        if table is None:
            return 0
        held = ledgers.read(table.properties, EXCHANGE.name, EXCHANGE.settings.topic)
        return sum(each.next for each in held.partitions.values())


def total(sent: Manifest) -> int:
    """Return the number of messages in the topic after a part was sent."""
    return sum(each.next for each in sent.partitions.values())


def forget(bootstrap: str, sent: Manifest) -> None:
    """Delete the messages of a part from Kafka."""
    ends = [TopicPartition(sent.topic, p, each.next) for p, each in sent.partitions.items()]
    admin = AdminClient({"bootstrap.servers": bootstrap})  # kept: without a client its futures never end
    for deleted in admin.delete_records(ends).values():
        deleted.result()


def verdict_of(audit: Usage) -> dict[str, str]:
    """Return the JSON of an audit. The log may stand around it."""
    found: dict[str, str] = json.JSONDecoder().raw_decode(audit.output[audit.output.index("{") :])[0]
    return found


def _report(messages: int, flow: LongRun, audits: Sequence[Usage]) -> None:
    found = [verdict_of(each) for each in audits]
    edges = quarter_edges(flow.taken[0].at, flow.taken[-1].at)
    quarters = [quarter(flow.taken, [], begin, end) for begin, end in pairwise(edges)]
    rows = [[f"{i} of {QUARTERS}", f"{q.mean_mb:.0f}", f"{q.peak_mb:.0f}"] for i, q in enumerate(quarters, 1)]
    first = ", ".join(f"{seconds:.1f}" for seconds in flow.first_commits) or "-"
    last, said = audits[-1], found[-1]
    notes = [
        f"{messages:,} messages. Seconds from each start after a kill to the first commit of messages: {first}.",
        f"{len(audits)} audits. The last one: {said['verdict']}, {said['reading']}, {last.wall:.0f} s, "
        f"{last.cpu:.0f} s of CPU, {last.peak / 1e6:.0f} MB.",
    ]
    figures: dict[str, object] = {
        "messages": messages,
        "first_commit_seconds": [round(each, 2) for each in flow.first_commits],
        "audits": [
            {
                "verdict": of["verdict"],
                "reading": of["reading"],
                "seconds": round(used.wall, 1),
                "cpu_seconds": round(used.cpu, 1),
                "peak_bytes": used.peak,
            }
            for of, used in zip(found, audits, strict=True)
        ],
        "quarters": rows,
    }

    def plot(axes: Axes) -> None:
        began = flow.taken[0].at
        axes.plot([each.at - began for each in flow.taken], [each.resident / 1e6 for each in flow.taken])
        axes.set(xlabel="seconds", ylabel="resident MB")
        axes.set_ylim(bottom=0)

    report(BenchResult("endurance", ["quarter of the time", "mean MB", "peak MB"], rows, figures, plot, notes))
