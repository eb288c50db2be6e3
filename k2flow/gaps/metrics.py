"""The holes of the newest 24 hours of Gold as Prometheus metrics."""

from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from pyiceberg.catalog import Catalog
from typing_extensions import override

from k2flow.exchange import Exchange
from k2flow.gaps.recent import Found, RecentGaps
from k2flow.observability.background import BackgroundCollector

EVERY_SECONDS = 60.0
UPDATE_SECONDS = 6.0  # of work in one turn: at most a tenth of a core
LABELS = ["exchange", "symbol"]


class GapMetrics(BackgroundCollector):
    """Looks for holes every EVERY_SECONDS, and exports the last ones found to each scrape.

    After a start the metrics are missing until the newest hours are read, and after an error until one is over.
    """

    def __init__(self, find: Callable[[float], Found | None]) -> None:
        """`find` takes the seconds that it may work, and returns None if it has not read everything yet."""
        super().__init__("gaps", "holes in trade ids could not be found", EVERY_SECONDS)
        self._find = find
        self._last: Found = {}

    @override
    def update(self) -> None:
        try:
            found = self._find(UPDATE_SECONDS)
        except Exception:
            self._last = {}
            raise
        self._last = self._last if found is None else found

    @override
    def collect(self) -> Iterable[Metric]:
        missing = GaugeMetricFamily(
            "k2flow_missing_trades", "Trade ids that Gold lacks in its newest 24 hours.", labels=LABELS
        )
        gaps = GaugeMetricFamily("k2flow_trade_gaps", "Holes that these ids are in.", labels=LABELS)
        for labels, its in self._last.items():
            missing.add_metric(labels, its.missing)
            gaps.add_metric(labels, its.holes)
        yield missing
        yield gaps


def start_gap_metrics(registry: CollectorRegistry, catalog: Catalog, exchanges: Sequence[Exchange]) -> GapMetrics:
    """Register the holes of those exchanges that have dense trade ids, and start to look for them if there are any."""
    dense = [exchange for exchange in exchanges if exchange.dense_trade_ids]
    metrics = GapMetrics(RecentGaps(catalog, dense).update)
    registry.register(metrics)
    if dense:
        metrics.start()
    return metrics
