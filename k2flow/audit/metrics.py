"""What an audit that is repeated tells Prometheus."""

import time
from collections.abc import Iterator

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from k2flow.audit.report import Severity, Verdict


class AuditCollector(Collector):
    """The last audit; nothing until there is one."""

    def __init__(self) -> None:
        self._last: tuple[Verdict, list[Severity], float] | None = None

    def tell(self, verdict: Verdict, findings: list[Severity]) -> None:
        """Of one audit that has just ended: what it says, and how grave each of its findings is."""
        self._last = (verdict, findings, time.time())

    def collect(self) -> Iterator[Metric]:
        if self._last is None:
            return
        verdict, findings, at = self._last
        yield GaugeMetricFamily(
            "k2flow_audit_verdict",
            "What the last audit says: 0 the law holds, 1 broken, 2 not known.",
            verdict.exit_code,
        )
        found = GaugeMetricFamily("k2flow_audit_findings", "What the last audit found.", labels=["severity"])
        for severity in Severity:
            found.add_metric([severity], findings.count(severity))
        yield found
        yield GaugeMetricFamily("k2flow_audit_timestamp_seconds", "When the last audit ended.", at)
