"""The status as Prometheus metrics: they show that a flow stands still, even if the flow itself cannot report it."""

import time
from collections.abc import Callable, Iterable

from prometheus_client.core import GaugeMetricFamily, Metric
from typing_extensions import override

from k2flow.layers import CANDLES
from k2flow.observability.background import BackgroundCollector
from k2flow.status.model import FlowState, Status

EVERY_SECONDS = 5.0
LAYER = ["exchange", "layer"]


class StatusMetrics(BackgroundCollector):
    """Collects the status every EVERY_SECONDS, and exports the newest one to each scrape.

    No scrape waits for a broker or the catalog. If one of them does not answer, the lags it would give are left out,
    and `k2flow_status_age_seconds` grows. `<exchange>_<layer>_lag` is `k2flow_lag_seconds` under the names that
    dashboards of the former system use.
    """

    def __init__(self, collect_status: Callable[[], Status]) -> None:
        super().__init__("status", "the status could not be collected", EVERY_SECONDS)
        self._collect_status = collect_status
        self._last: Status | None = None
        self._began = time.time()

    @override
    def update(self) -> None:
        self._last = self._collect_status()

    @override
    def collect(self) -> Iterable[Metric]:
        status = self._last
        age = time.time() - (status.at / 1000 if status else self._began)
        yield GaugeMetricFamily("k2flow_status_age_seconds", "Time since the status was collected.", age)
        if status is not None:
            yield from _layers(status)
            yield from _open_transactions(status)
            yield from _dead_letters(status)
            yield from _tables(status)


def _layers(status: Status) -> Iterable[Metric]:
    messages = GaugeMetricFamily("k2flow_lag_messages", "Messages that a layer does not hold yet.", labels=LAYER)
    seconds = GaugeMetricFamily("k2flow_lag_seconds", "Age of the oldest of those messages, or commits.", labels=LAYER)
    for exchange, its in status.exchanges.items():
        for name, layer in its.layers.items():
            if layer and layer.lag is not None:
                messages.add_metric([exchange, name], layer.lag)
            if layer and layer.lag_seconds is not None:
                seconds.add_metric([exchange, name], layer.lag_seconds)
                yield GaugeMetricFamily(f"{exchange}_{name}_lag", "As k2flow_lag_seconds.", layer.lag_seconds)
    commits = GaugeMetricFamily("k2flow_lag_commits", "Commits of Gold that the candles lack.", labels=LAYER)
    candles = status.candles
    if candles and candles.flow.state is not FlowState.NEVER:  # only a flow that has started can be late
        if candles.lag is not None:
            commits.add_metric([CANDLES.name, CANDLES.name], candles.lag)
        if candles.lag_seconds is not None:
            seconds.add_metric([CANDLES.name, CANDLES.name], candles.lag_seconds)
    yield messages
    yield commits
    yield seconds


def _open_transactions(status: Status) -> Iterable[Metric]:
    messages = GaugeMetricFamily(
        "k2flow_hidden_messages", "Messages that open transactions hide from all readers.", labels=["exchange"]
    )
    seconds = GaugeMetricFamily("k2flow_hidden_seconds", "Age of the oldest of those messages.", labels=["exchange"])
    for name, exchange in status.exchanges.items():
        if exchange.kafka_problem is None:
            found = exchange.open_transactions
            messages.add_metric([name], sum(each.log_end - each.stable_end for each in found))
            seconds.add_metric([name], max((each.seconds or 0.0 for each in found), default=0.0))
    yield messages
    yield seconds


def _dead_letters(status: Status) -> Iterable[Metric]:
    share = GaugeMetricFamily(
        "k2flow_dead_letter_share", "Share of the last hour's messages that are dead letters.", labels=["exchange"]
    )
    for name, exchange in status.exchanges.items():
        if exchange.dead_letters and exchange.dead_letters.hour_share is not None:
            share.add_metric([name], exchange.dead_letters.hour_share)
    yield share


TABLE_GAUGES = {
    "rows": "Rows of a table.",
    "files": "Data files of a table.",
    "bytes": "Bytes of a table's data files.",
    "small_files": "Data files of less than half the target size.",
    "snapshots": "Snapshots that are kept.",
}
"""Fields of TableStatus that are metrics, with their help."""


def _tables(status: Status) -> Iterable[Metric]:
    for field, text in TABLE_GAUGES.items():
        gauge = GaugeMetricFamily(f"k2flow_table_{field}", text, labels=["table"])
        for name, table in status.tables.items():
            if table:
                gauge.add_metric([name], getattr(table, field))
        yield gauge
