"""The last audit as Prometheus metrics, for an audit that is repeated."""

import time
from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from typing_extensions import override

from k2flow.audit.report import Severity, Verdict


class AuditCollector(Collector):
    """The metrics of the last audit; none before the first."""

    def __init__(self) -> None:
        self._last: tuple[Verdict, list[Severity], float] | None = None

    def record(self, verdict: Verdict, findings: list[Severity]) -> None:
        """Record an audit that has just ended: its verdict, and the severity of each finding."""
        self._last = (verdict, findings, time.time())

    @override
    def collect(self) -> Iterator[Metric]:
        if self._last is None:
            return
        verdict, findings, at = self._last
        yield GaugeMetricFamily(
            "k2flow_audit_verdict",
            "The verdict of the last audit: 0 all invariants hold, 1 violated, 2 incomplete.",
            verdict.exit_code,
        )
        found = GaugeMetricFamily("k2flow_audit_findings", "The findings of the last audit.", labels=["severity"])
        for severity in Severity:
            found.add_metric([severity], findings.count(severity))
        yield found
        yield GaugeMetricFamily("k2flow_audit_timestamp_seconds", "When the last audit ended.", at)
