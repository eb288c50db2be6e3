"""The findings of an audit, for machines and for people, and the metrics of the last one."""

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from prometheus_client.metrics_core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import TypeAdapter
from rich.console import Console
from rich.table import Table
from typing_extensions import override

VERSION = 1
SAMPLES = 10  # the most samples of a finding, except for candles
Samples = Sequence[Mapping[str, Any]]


class Severity(StrEnum):
    """`broken`: an invariant is violated; `unknown`: the audit is incomplete; `note`: worth knowing."""

    BROKEN = "broken"
    UNKNOWN = "unknown"
    NOTE = "note"


class Verdict(StrEnum):
    """The result of an audit, with its exit code."""

    HOLDS = "holds"
    BROKEN = "broken"
    UNKNOWN = "unknown"

    @property
    def exit_code(self) -> int:
        """0: all invariants hold; 1: one is violated; 2: the audit is incomplete."""
        return {Verdict.HOLDS: 0, Verdict.BROKEN: 1, Verdict.UNKNOWN: 2}[self]


class Reading(StrEnum):
    """`full`: everything; `incremental`: what is new since the last audit, and a sample; `since`: what is newer."""

    FULL = "full"
    INCREMENTAL = "incremental"
    SINCE = "since"


@dataclass(frozen=True)
class Finding:
    """One finding: `check` names it (stable), `count` is the number of rows, offsets or files, `samples` are some."""

    check: str
    severity: Severity
    text: str
    count: int = 1
    exchange: str | None = None
    table: str | None = None
    samples: Samples = ()


@dataclass
class AuditReport:
    """The result of an audit. `to_dict` is what `--json` prints; its keys are stable within a `version`.

    - `version`, `verdict` (`holds`, `broken`, `unknown`), `started_at` (ISO 8601), `since` (the same or null),
      `seconds`, `rows` (read, of all tables);
    - `layers`: their names, in the order of the data;
    - `tables`: by name `snapshot_id` (null: none yet), `metadata` (the metadata file that was read), `rows`;
    - `partitions`: a list of `exchange`, `topic`, `topic_id`, `partition`, `current` (false: of a topic that was
      deleted since), `kafka` (`low`, `high` and `lag`, or null), `missing`, `duplicated` (Bronze offsets) and, for each
      of `layers`, the ledger's `first`, `next`, `rows` (or null);
    - `findings`: a list of `check`, `severity` (`broken`, `unknown`, `note`), `exchange`, `table` (or null), `count`,
      `text`, `samples` (objects whose keys depend on the check: `topic`, `partition`, `offset` or `first` and `next`;
      the columns of the deduplication key, `exchange`, `timestamp`; `exchange`, `symbol`, `open_time`, `differs` of a
      candle; `file`);
    - `reading` (`full`, `incremental`, `since`), `why_full` (why it is not incremental, or null), `proven_rows`
      (proven by earlier audits), `sampled_files` (of those rows, read again), `seed` (of the sample, or null),
      `last_full` (when the last full audit without a violation ended, or null).
    """

    started_at: str
    since: str | None = None
    seconds: float = 0.0
    rows: int = 0
    layers: list[str] = field(default_factory=list)
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    partitions: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)
    reading: Reading = Reading.FULL
    why_full: str | None = None
    proven_rows: int = 0
    sampled_files: int = 0
    seed: int | None = None
    last_full: str | None = None

    def add(
        self,
        check: str,
        severity: Severity,
        text: str,
        count: int = 1,
        exchange: str | None = None,
        table: str | None = None,
        samples: Samples = (),
        most: int = SAMPLES,
    ) -> None:
        """Add a finding, with `most` of its samples, the first ones."""
        self.findings.append(Finding(check, severity, text, count, exchange, table, tuple(samples[:most])))

    @property
    def verdict(self) -> Verdict:
        """The worst finding's."""
        found = {finding.severity for finding in self.findings}
        if Severity.BROKEN in found:
            return Verdict.BROKEN
        return Verdict.UNKNOWN if Severity.UNKNOWN in found else Verdict.HOLDS

    def checks(self, severity: Severity = Severity.BROKEN) -> set[str]:
        """Return the names of the checks that found something of a severity."""
        return {finding.check for finding in self.findings if finding.severity is severity}

    def to_dict(self) -> dict[str, Any]:
        """Return the report as JSON values."""
        return {"version": VERSION, "verdict": str(self.verdict), **_JSON.dump_python(self, mode="json")}

    def show(self, console: Console) -> None:
        """Print the report as tables."""
        console.print(self._partitions(), "Of each table: the next offset, and the rows so far.", sep="\n")
        for finding in sorted(self.findings, key=lambda finding: list(Severity).index(finding.severity)):
            where = finding.table or finding.exchange
            console.print(
                f"{finding.severity}: {finding.check}{f' in {where}' if where else ''}: {finding.text}",
                markup=False,
                highlight=False,
            )
            for sample in finding.samples:
                text = ", ".join(f"{key} {value}" for key, value in sample.items())
                console.print(f"    {text}", markup=False, highlight=False)
        meaning = {
            Verdict.HOLDS: "all invariants hold",
            Verdict.BROKEN: "invariants are VIOLATED",
            Verdict.UNKNOWN: "audit incomplete",
        }
        speed = self.rows / max(self.seconds, 0.001)
        console.print(
            f"{meaning[self.verdict]}: {self.rows:,} rows read in {self.seconds:.1f} s ({speed:,.0f}/s)",
            highlight=False,
        )
        console.print(self.describe_reading(), markup=False, highlight=False)

    def describe_reading(self) -> str:
        """Return in one line what was read, and why."""
        if self.reading is Reading.SINCE:
            return f"only messages since {self.since}"
        if self.reading is Reading.FULL:
            return f"full audit: {self.why_full}"
        last = self.last_full or "unknown"
        return (
            f"incremental audit: {self.proven_rows:,} rows were proven before, {self.sampled_files:,} of their files "
            f"were read again (--seed {self.seed}); last full audit: {last}"
        )

    def _partitions(self) -> Table:
        table = Table("topic", "partition", "Kafka", *self.layers, "missing", "duplicated")
        for column in table.columns:
            column.overflow = "fold"  # a long topic is not cut
        for partition in self.partitions:
            kafka = partition["kafka"]
            table.add_row(
                partition["topic"] + ("" if partition["current"] else " (earlier)"),
                str(partition["partition"]),
                f"{kafka['low']} to {kafka['high']}" if kafka else "not asked",
                *(_extent(partition.get(layer)) for layer in self.layers),
                f"{partition['missing']:,}",
                f"{partition['duplicated']:,}",
            )
        return table


_JSON = TypeAdapter(AuditReport)


def _extent(extent: Mapping[str, int] | None) -> str:
    return "none" if extent is None else f"{extent['next']:,} ({extent['rows']:,})"


class AuditCollector(Collector):
    """The last audit as Prometheus metrics, for an audit that is repeated; none before the first."""

    def __init__(self) -> None:
        self._last: tuple[Verdict, list[Severity], float] | None = None
        self._full_at: float | None = None

    def record(self, verdict: Verdict, findings: list[Severity], last_full: str | None = None) -> None:
        """Record an audit that has just ended: its verdict, the severity of each finding, and the last full audit."""
        self._last = (verdict, findings, time.time())
        if last_full:
            self._full_at = datetime.fromisoformat(last_full).timestamp()

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
        if self._full_at is not None:
            yield GaugeMetricFamily(
                "k2flow_audit_full_timestamp_seconds",
                "When the last audit that read everything, and found all invariants to hold, ended.",
                self._full_at,
            )
