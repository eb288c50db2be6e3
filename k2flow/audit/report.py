"""What an audit found, for machines and for people."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

VERSION = 1
SAMPLES = 10
"""Examples of a finding at the most."""


class Severity(StrEnum):
    """`broken`: the law does not hold; `unknown`: it cannot be told whether it holds; `note`: worth knowing."""

    BROKEN = "broken"
    UNKNOWN = "unknown"
    NOTE = "note"


class Verdict(StrEnum):
    """What the audit says, and by which exit code."""

    HOLDS = "holds"
    BROKEN = "broken"
    UNKNOWN = "unknown"

    @property
    def exit_code(self) -> int:
        return {Verdict.HOLDS: 0, Verdict.BROKEN: 1, Verdict.UNKNOWN: 2}[self]


@dataclass(frozen=True)
class Finding:
    """One thing found: `check` names it (stable), `count` says how many rows, offsets or files, `samples` which."""

    check: str
    severity: Severity
    text: str
    count: int = 1
    exchange: str | None = None
    table: str | None = None
    samples: Sequence[Mapping[str, Any]] = ()

    def to_dict(self) -> dict[str, Any]:
        return {
            "check": self.check,
            "severity": str(self.severity),
            "exchange": self.exchange,
            "table": self.table,
            "count": self.count,
            "text": self.text,
            "samples": [dict(sample) for sample in self.samples],
        }


@dataclass
class Report:
    """The result of an audit. `to_dict` is what `--json` prints; its keys are stable within a `version`:

    - `version`, `verdict` (`holds`, `broken`, `unknown`), `started_at` (ISO 8601), `since` (the same or null),
      `seconds`, `rows` (read, of all tables);
    - `tables`: by name `snapshot_id` (null: none yet), `metadata` (the metadata file that was read), `rows`;
    - `partitions`: a list of `exchange`, `topic`, `topic_id`, `partition`, `current` (false: of a topic that was
      deleted since), `kafka` (`low`, `high` and `lag`, or null), `missing`, `doubled` (Bronze offsets) and, for each of
      `bronze`, `silver`, `dlq`, `gold`, the ledger's `first`, `next`, `rows` (or null);
    - `findings`: a list of `check`, `severity` (`broken`, `unknown`, `note`), `exchange`, `table` (or null), `count`,
      `text`, `samples` (objects whose keys depend on the check: `topic`, `partition`, `offset` or `first` and `next`;
      `message_id`, `hour`; `file`).
    """

    started_at: str
    since: str | None = None
    seconds: float = 0.0
    rows: int = 0
    tables: dict[str, dict[str, Any]] = field(default_factory=dict)
    partitions: list[dict[str, Any]] = field(default_factory=list)
    findings: list[Finding] = field(default_factory=list)

    def add(
        self,
        check: str,
        severity: Severity,
        text: str,
        count: int = 1,
        exchange: str | None = None,
        table: str | None = None,
        samples: Sequence[Mapping[str, Any]] = (),
    ) -> None:
        """Adds a finding, with the first SAMPLES of its samples."""
        self.findings.append(Finding(check, severity, text, count, exchange, table, tuple(samples[:SAMPLES])))

    @property
    def verdict(self) -> Verdict:
        found = {finding.severity for finding in self.findings}
        if Severity.BROKEN in found:
            return Verdict.BROKEN
        return Verdict.UNKNOWN if Severity.UNKNOWN in found else Verdict.HOLDS

    def checks(self, severity: Severity = Severity.BROKEN) -> set[str]:
        """The names of the checks that found something of a severity."""
        return {finding.check for finding in self.findings if finding.severity is severity}

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "verdict": str(self.verdict),
            "started_at": self.started_at,
            "since": self.since,
            "seconds": round(self.seconds, 3),
            "rows": self.rows,
            "tables": self.tables,
            "partitions": self.partitions,
            "findings": [finding.to_dict() for finding in self.findings],
        }

    def show(self, console: Console) -> None:
        """The report as tables."""
        table = Table("topic", "partition", "Kafka", "bronze", "silver", "dlq", "gold", "missing", "doubled")
        for part in self.partitions:
            kafka = part["kafka"]
            layers = [_extent(part[layer]) for layer in ("bronze", "silver", "dlq", "gold")]
            table.add_row(
                escape(part["topic"]) + ("" if part["current"] else " (earlier)"),
                str(part["partition"]),
                f"{kafka['low']} to {kafka['high']}" if kafka else "not asked",
                *layers,
                f"{part['missing']:,}",
                f"{part['doubled']:,}",
            )
        console.print(table, "Of each table: the next offset, and the rows so far.", sep="\n")
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
            Verdict.HOLDS: "the conservation law holds",
            Verdict.BROKEN: "the conservation law is BROKEN",
            Verdict.UNKNOWN: "it cannot be told whether the conservation law holds",
        }
        speed = self.rows / max(self.seconds, 0.001)
        console.print(
            f"{meaning[self.verdict]}: {self.rows:,} rows read in {self.seconds:.1f} s ({speed:,.0f}/s)",
            highlight=False,
        )


def _extent(extent: Mapping[str, int] | None) -> str:
    return "none" if extent is None else f"{extent['next']:,} ({extent['rows']:,})"
