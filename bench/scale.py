"""Gain and cost of each further process of a flow: a catch-up by one, two and three of them."""

import importlib.util
import shutil
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Any

import typer
from matplotlib.axes import Axes

from bench.drain import measured
from bench.measure import Usage, run
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions, produce
from torture.catalogs import Postgres, postgres_programs

PYTHON = sys.executable
EXCHANGE = "binance"
PROCESSES = [1, 2, 3]


def scale(
    messages: Annotated[int, typer.Option(help="Messages in the topic.")] = 4_000_000,
    processes: Annotated[list[int], typer.Option(help="Processes of the flow; repeatable.")] = PROCESSES,
    runs: Annotated[int, typer.Option(help="Runs of each, alternating.")] = 3,
) -> None:
    """Catch up by several processes, `k2flow run --processes N`, with a private PostgreSQL, and drain the topic.

    2 % bad messages, 3 % duplicates. A run with nothing to do is measured after each, and subtracted: its time is
    start-up and imports. CPU is that of all processes together, without Kafka and PostgreSQL.
    """
    programs = postgres_programs()
    if programs is None:
        typer.echo(f"several processes need PostgreSQL for the catalog: {missing()}", err=True)
        raise typer.Exit(1)
    drains: list[Usage] = []
    flows: dict[int, list[Usage]] = {n: [] for n in processes}
    with filled_topic(messages, programs) as at:
        for _ in range(runs):
            drains.append(measured(at.bootstrap, at.topic))
            for n in processes:
                caught_up = run(flow(n), at.settings)
                flows[n].append(caught_up.minus(run(flow(n), at.settings)))
                at.drop_tables()
    _report(messages, drains, flows)


@dataclass(frozen=True)
class FilledTopic:
    """A topic full of trades and a catalog, for several runs."""

    bootstrap: str
    topic: str
    settings: Mapping[str, str]
    catalog: Postgres
    warehouse: Path

    def drop_tables(self) -> None:
        """Drop all tables and their files, so that the next flow starts from nothing."""
        drop_tables(self.catalog, self.warehouse)


@contextmanager
def filled_topic(messages: int, programs: Path) -> Iterator[FilledTopic]:
    """Produce `messages` trades of EXCHANGE into a private Kafka, and read them once to warm the page cache."""
    exchange = find_exchange(EXCHANGE)
    topic = exchange.settings.topic
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        kafka.start({topic: exchange.settings.partitions})
        options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
        produce(exchange.code, topic, {"bootstrap.servers": kafka.bootstrap}, options)
        measured(kafka.bootstrap, topic)
        warehouse = Path(folder) / "warehouse"
        with postgres(warehouse, programs) as catalog:
            settings = {
                "K2FLOW_HOME": folder,
                "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
                **catalog.environment(),
            }
            yield FilledTopic(kafka.bootstrap, topic, settings, catalog, warehouse)


def flow(processes: int) -> list[str]:
    """Return the command of a catch-up by `processes` processes."""
    return [PYTHON, "-m", "k2flow", "run", EXCHANGE, "--processes", str(processes), "--until-caught-up"]


def missing() -> str:
    """Return which part of PostgreSQL this machine lacks, and how to install it."""
    if importlib.util.find_spec("psycopg2") is None:
        return "its Python driver is missing, which `scripts/setup postgres` installs"
    return "pg_ctl is neither in /usr/lib/postgresql/*/bin nor on PATH: install the server (Debian: postgresql)"


@contextmanager
def postgres(warehouse: Path, programs: Path) -> Iterator[Postgres]:
    """Run a catalog in a private PostgreSQL, and remove it at the end."""
    catalog = Postgres({"warehouse": f"file://{warehouse}"}, programs)
    try:
        yield catalog
    finally:
        catalog.stop()


def drop_tables(catalog: Postgres, warehouse: Path) -> None:
    """Drop all tables and their files, so that the next flow starts from nothing."""
    opened = catalog.open()
    for table in opened.list_tables(NAMESPACE):
        opened.drop_table(table)
    shutil.rmtree(warehouse)


def _report(messages: int, drains: Sequence[Usage], flows: Mapping[int, Sequence[Usage]]) -> None:
    drained = figures_of(messages, drains)
    flowed = {n: figures_of(messages, used) for n, used in flows.items()}
    rows = [_row("drain", drained, 1.0)]
    rows += [_row(f"{n}", of, of["messages_per_second"] / drained["messages_per_second"]) for n, of in flowed.items()]
    figures: dict[str, Any] = {"messages": messages, "drain": drained, "processes": flowed}

    def plot(axes: Axes) -> None:
        names = ["drain", *(f"{n} process{'es' * (n > 1)}" for n in flowed)]
        axes.bar(names, [of["messages_per_second"] for of in (drained, *flowed.values())])
        axes.set_ylabel("messages per second")

    columns = ["processes", "messages/s", "us CPU/message", "peak MB of the largest", "rate / drain's rate"]
    report(BenchResult("scale", columns, rows, figures, plot))


def figures_of(messages: int, used: Sequence[Usage]) -> dict[str, float]:
    """Return the medians of all runs, and the maximum of memory."""
    return {
        "messages_per_second": round(median(messages / each.wall for each in used)),
        "cpu_us_per_message": round(median(each.cpu / messages * 1e6 for each in used), 2),
        "peak_bytes": max(each.peak for each in used),
    }


def _row(name: str, of: Mapping[str, float], ratio: float) -> list[str]:
    speed, cpu = f"{of['messages_per_second']:,}", f"{of['cpu_us_per_message']:.2f}"
    return [name, speed, cpu, f"{of['peak_bytes'] / 1e6:.0f}", f"{ratio:.3f}"]
