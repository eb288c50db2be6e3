"""Runs several flows until they end, with one metrics endpoint for all their processes."""

import signal
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext

from prometheus_client import CollectorRegistry

from k2flow.config.settings import Settings
from k2flow.errors import FlowFailedError, RunError
from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.layers import CANDLES
from k2flow.observability.endpoint import HealthCheck, serve
from k2flow.observability.metrics import SUPERVISED, ProcessCounts
from k2flow.observability.systemd import report_to_systemd
from k2flow.supervisor.flow import SupervisedFlow
from k2flow.supervisor.plan import ProcessPlan


def supervise(plans: Sequence[ProcessPlan], settings: Settings, extra: Mapping[str, str]) -> None:
    """Run the processes of all `plans` until they have ended; `extra` is added to their environment.

    When one process crashes, the others of its flow are ended, and all restart after a pause (SupervisedFlow).
    Nothing is lost: messages that were not committed are read again. SIGTERM and SIGINT go to all processes, which then
    drain and commit; those that have not ended after `stop_seconds` are killed. If this process itself is killed, they
    get a SIGTERM. Once all have ended, errors that a restart cannot fix raise FlowFailedError. Errors that only kept
    flows from their first start raise RunError. Under systemd it is notified how the flows do.
    """
    stopping = threading.Event()
    with tempfile.TemporaryDirectory(prefix="k2flow-counts-") as counts:
        environment = {**extra, SUPERVISED: counts}
        flows = [SupervisedFlow(plan, settings, environment, stopping) for plan in plans]
        health, readiness = _first([flow.failed for flow in flows]), _first([flow.not_ready for flow in flows])
        port = settings.metrics_port
        with (
            report_to_systemd(health, readiness, stopping),
            nullcontext() if port is None else _metrics_served(flows, settings, port, counts, health, readiness),
        ):
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, lambda *_: stopping.set())
            log_failure = len(flows) > 1  # the error of a single flow ends the command, which reports it
            threads = [threading.Thread(target=flow.run, name=flow.plan.flow, args=[log_failure]) for flow in flows]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    if failures := [flow.failure for flow in flows if flow.failure]:
        error = FlowFailedError if any(each.permanent for each in failures) else RunError
        raise error("; ".join(each.reason for each in failures))


@contextmanager
def _metrics_served(
    flows: Sequence[SupervisedFlow],
    settings: Settings,
    port: int,
    counts: str,
    health: HealthCheck,
    readiness: HealthCheck,
) -> Iterator[None]:
    """Serve the processes' metrics, those of the tables and topics, and the health of the flows."""
    from k2flow.gaps.metrics import start_gap_metrics
    from k2flow.status.collector import StatusCollector
    from k2flow.status.metrics import StatusMetrics

    registry = CollectorRegistry()
    registry.register(ProcessCounts(counts))
    names = [flow.plan.flow for flow in flows]
    exchanges = [find_exchange(name) for name in names if name != CANDLES.name]
    collector = StatusCollector(open_catalog(settings), settings, exchanges, candles=CANDLES.name in names)
    status = StatusMetrics(collector.collect)
    registry.register(status)
    serve(settings.metrics_host, port, registry, health, readiness)
    status.start()
    gaps = start_gap_metrics(registry, open_catalog(settings), exchanges)
    try:
        yield
    finally:
        status.stop()
        gaps.stop()


def _first(checks: Sequence[HealthCheck]) -> HealthCheck:
    return lambda: next((problem for check in checks if (problem := check())), None)
