"""Whether one exchange's failure affects another: Kraken's freshness beside a quiet and a failing Binance."""

import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from confluent_kafka import Producer
from matplotlib.axes import Axes

from bench.gold_age import GoldWatch
from bench.measure import running
from bench.report import BenchResult, report
from k2flow.exchange import find_exchange
from k2flow.sandbox.kafka.local import LocalKafka, free_port
from k2flow.sandbox.producer import ProduceOptions, produce

GARBAGE_PER_SECOND = 2_000


def isolation(
    seconds: Annotated[int, typer.Option(help="Length of each of the two runs.")] = 40,
    rate: Annotated[int, typer.Option(help="Kraken's messages per second.")] = 500,
) -> None:
    """Measure Kraken's freshness (produced to queryable in Gold) at a 1 s trigger, with Binance quiet and burning.

    Burning: Binance's topic gets only garbage, and its flow is killed with -9 again and again, soon after each start.
    """
    results = {"quiet": measure(seconds, rate, quiet), "burning": measure(seconds, rate, burning)}
    rows, figures = [], {"rate": rate, "seconds": seconds}
    for name, fresh in results.items():
        p50, p95, p99 = (float(p) for p in np.percentile(fresh.ages, [50, 95, 99]))
        seconds_of = [p50, p95, p99, max(fresh.ages)]
        rows.append([name, str(fresh.commits), *(f"{s:.2f}" for s in seconds_of), str(fresh.behind)])
        figures |= {f"{name}_commits": fresh.commits, f"{name}_p99_s": round(p99, 3), f"{name}_behind": fresh.behind}

    def plot(axes: Axes) -> None:
        for name, fresh in results.items():
            axes.ecdf(fresh.ages, label=name)
        axes.set(xlabel="seconds from Kafka to Gold", ylabel="share of commits")
        axes.legend(title="Binance")

    columns = ["Binance", "commits", "p50 s", "p95 s", "p99 s", "max s", "messages left behind"]
    report(BenchResult("isolation", columns, rows, figures, plot))


def measure(
    seconds: int, rate: int, binance: Callable[[dict[str, str], str], AbstractContextManager[None]]
) -> GoldWatch:
    """Measure Kraken's freshness over one run, with its own broker and tables."""
    kraken, other = find_exchange("kraken"), find_exchange("binance")
    with tempfile.TemporaryDirectory() as folder, LocalKafka(Path(folder) / "kafka", free_port()) as kafka:
        kafka.start({e.settings.topic: e.settings.partitions for e in (kraken, other)})
        environment = {
            "K2FLOW_HOME": folder,
            "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap,
            "K2FLOW_KRAKEN_TRIGGER_SECONDS": "1",
            "K2FLOW_BINANCE_TRIGGER_SECONDS": "1",
        }
        config = {"bootstrap.servers": kafka.bootstrap}
        with running("kraken", environment) as flow, binance(environment, kafka.bootstrap):
            flow.wait_until_reading()
            fresh = GoldWatch(kraken, Path(folder), kafka.bootstrap)
            options = ProduceOptions(count=seconds * rate, rate=rate, seed=1)
            sending = (kraken.code, kraken.settings.topic, config, options)
            sender = threading.Thread(
                target=produce, args=sending, daemon=True
            )  # it must not outlive a failed measurement
            sender.start()
            fresh.watch(sender.is_alive)
            sender.join()
    return fresh


@contextmanager
def quiet(environment: dict[str, str], bootstrap: str) -> Iterator[None]:
    """Run Binance's flow on an empty topic."""
    with running("binance", environment):
        yield


@contextmanager
def burning(environment: dict[str, str], bootstrap: str) -> Iterator[None]:
    """Fill Binance's topic with garbage, and kill its flow after each start."""
    stop = threading.Event()
    threads = [
        threading.Thread(target=pour_garbage, args=(bootstrap, stop)),
        threading.Thread(target=crash_loop, args=(environment, stop)),
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def pour_garbage(bootstrap: str, stop: threading.Event) -> None:
    producer = Producer({"bootstrap.servers": bootstrap})
    topic = find_exchange("binance").settings.topic
    random = np.random.default_rng(1)
    while not stop.wait(0.1):
        for _ in range(GARBAGE_PER_SECOND // 10):
            producer.produce(topic, random.bytes(200))
        producer.poll(0)
    producer.flush(10)


def crash_loop(environment: dict[str, str], stop: threading.Event) -> None:
    while not stop.is_set():
        with running("binance", environment):
            stop.wait(4)
        time.sleep(0.5)
