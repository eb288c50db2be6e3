"""The holes of the newest 24 hours of Gold as Prometheus metrics."""

import logging
import threading
from collections.abc import Callable, Iterable, Sequence

from prometheus_client import CollectorRegistry
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pyiceberg.catalog import Catalog
from typing_extensions import override

from k2flow.errors import one_line
from k2flow.exchange import Exchange
from k2flow.gaps.recent import Found, RecentGaps

log = logging.getLogger(__name__)
EVERY_SECONDS = 60.0
UPDATE_SECONDS = 6.0  # of work in one turn: at most a tenth of a core
LABELS = ["exchange", "symbol"]


class GapMetrics(Collector):
    """Looks for holes every EVERY_SECONDS in a thread of its own, and exports the last ones found to each scrape.

    After a start the metrics are missing until the newest hours are read, and after an error until one is over.
    """

    def __init__(self, update: Callable[[float], Found | None]) -> None:
        """`update` takes the seconds that it may work, and returns None if it has not read everything yet."""
        self._update = update
        self._last: Found = {}
        self._stopped = threading.Event()

    def start(self) -> None:
        """Start to look, until `stop` or the end of the process."""
        threading.Thread(target=self._run, name="gaps", daemon=True).start()

    def stop(self) -> None:
        """Stop to look. A look under way logs no warning any more."""
        self._stopped.set()

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

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                found = self._update(UPDATE_SECONDS)
                self._last = self._last if found is None else found
            except Exception as error:  # without this thread, the last holes would be exported forever
                self._last = {}
                log.debug("holes in trade ids", exc_info=True)
                if not self._stopped.is_set():
                    log.warning("holes in trade ids could not be found: %s", one_line(error))
            self._stopped.wait(EVERY_SECONDS)


def start_gap_metrics(registry: CollectorRegistry, catalog: Catalog, exchanges: Sequence[Exchange]) -> GapMetrics:
    """Register the holes of those exchanges that have dense trade ids, and start to look for them if there are any."""
    dense = [exchange for exchange in exchanges if exchange.dense_trade_ids]
    metrics = GapMetrics(RecentGaps(catalog, dense).update)
    registry.register(metrics)
    if dense:
        metrics.start()
    return metrics
