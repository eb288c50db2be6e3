"""The status as Prometheus metrics: they show that a flow stands still, even if the flow itself cannot report it."""

import logging
import threading
import time
from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from k2flow.errors import K2flowError
from k2flow.status.model import Status

log = logging.getLogger(__name__)

EVERY_SECONDS = 5.0
LAYER = ["exchange", "layer"]


class StatusMetrics(Collector):
    """Collects the status every EVERY_SECONDS in a thread of its own, and exports the newest one to each scrape.

    No scrape waits for a broker or the catalog. If one of them does not answer, the lags it would give are left out,
    and `k2flow_status_age_seconds` grows. `<exchange>_<layer>_lag` is `k2flow_lag_seconds` under the names that
    dashboards of the former system use.
    """

    def __init__(self, collect_status: Callable[[], Status]) -> None:
        self._collect_status = collect_status
        self._last: Status | None = None
        self._began = time.time()
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start to collect, until `stop` or the end of the process."""
        threading.Thread(target=self._run, name="status", daemon=True).start()

    def stop(self) -> None:
        """Stop to collect. A collection under way logs no warning any more."""
        self._stopped.set()

    @override
    def collect(self) -> Iterable[Metric]:
        status = self._last
        age = time.time() - (status.at / 1000 if status else self._began)
        yield GaugeMetricFamily(
            "k2flow_status_age_seconds", "Time since the status of Kafka and the tables was collected.", age
        )
        if status is not None:
            yield from _layers(status)
            yield from _dead_letters(status)
            yield from _tables(status)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._last = self._collect_status()
            except K2flowError as error:
                if not self._stopped.is_set():
                    log.warning("the status could not be collected: %s", error)
            self._stopped.wait(EVERY_SECONDS)


def _layers(status: Status) -> Iterable[Metric]:
    messages = GaugeMetricFamily("k2flow_lag_messages", "Messages that a layer does not hold yet.", labels=LAYER)
    seconds = GaugeMetricFamily("k2flow_lag_seconds", "Age of the oldest of those messages.", labels=LAYER)
    for exchange in status.exchanges:
        for name, layer in exchange.layers.items():
            if layer is None:
                continue
            if layer.lag is not None:
                messages.add_metric([exchange.name, name], layer.lag)
            if layer.seconds is not None:
                seconds.add_metric([exchange.name, name], layer.seconds)
                yield GaugeMetricFamily(f"{exchange.name}_{name}_lag", "As k2flow_lag_seconds.", layer.seconds)
    yield messages
    yield seconds


def _dead_letters(status: Status) -> Iterable[Metric]:
    share = GaugeMetricFamily(
        "k2flow_dead_letter_share", "Share of the last hour's messages that are dead letters.", labels=["exchange"]
    )
    for exchange in status.exchanges:
        if exchange.dead_letters is not None and exchange.dead_letters.hour_share is not None:
            share.add_metric([exchange.name], exchange.dead_letters.hour_share)
    yield share


def _tables(status: Status) -> Iterable[Metric]:
    families = {
        "rows": GaugeMetricFamily("k2flow_table_rows", "Rows of a table.", labels=["table"]),
        "files": GaugeMetricFamily("k2flow_table_files", "Data files of a table.", labels=["table"]),
        "bytes": GaugeMetricFamily("k2flow_table_bytes", "Bytes of a table's data files.", labels=["table"]),
        "small_files": GaugeMetricFamily(
            "k2flow_table_small_files", "Data files of less than half the target size.", labels=["table"]
        ),
        "snapshots": GaugeMetricFamily("k2flow_table_snapshots", "Snapshots that are kept.", labels=["table"]),
    }
    for name, table in status.tables.items():
        if table is None:
            continue
        for key in ("rows", "files", "bytes"):
            families[key].add_metric([name], getattr(table.totals, key))
        for key in ("small_files", "snapshots"):
            families[key].add_metric([name], getattr(table, key))
    yield from families.values()
