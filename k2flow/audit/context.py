"""What all checks of one audit share."""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from k2flow.audit.hashes import TradeHashes
from k2flow.audit.report import AuditReport, Samples, Severity
from k2flow.inspection.files import ReadPlan
from k2flow.inspection.pinned import UNIX_EPOCH, PinnedTables
from k2flow.inspection.progress import Progress
from k2flow.inspection.row_hashes import RowHashStore
from k2flow.layers import Layer


@dataclass(frozen=True, kw_only=True)
class AuditContext:
    """The database of hashes, the report, and the scope of one audit.

    `since`: only messages that Bronze ingested from then on, and their rows, are read; None: everything.
    """

    store: RowHashStore
    hashes: TradeHashes
    report: AuditReport
    since: datetime | None
    progress: Progress

    @property
    def first_day(self) -> int | None:
        """The day (UTC, since 1970) of `since`."""
        return None if self.since is None else (self.since.astimezone(UTC).date() - UNIX_EPOCH).days

    @property
    def whole(self) -> bool:
        """Whether everything is read."""
        return self.since is None

    def advance(self, plan: ReadPlan) -> Callable[[int], None]:
        """Return the function that counts the rows read of a plan."""
        name = plan.table.name()[-1]
        self.progress(name, 0, plan.rows)

        def count(rows: int) -> None:
            self.report.rows += rows
            self.progress(name, rows, plan.rows)

        return count

    def add(
        self,
        check: str,
        severity: Severity,
        text: str,
        count: int,
        pinned: PinnedTables,
        layer: Layer | None = None,
        samples: Samples = (),
    ) -> None:
        """Report a finding in the table of a layer, or in no table."""
        table = pinned.name(layer) if layer else None
        self.report.add(check, severity, text, count, pinned.exchange.name, table, samples)

    def broken(
        self, check: str, text: str, count: int, pinned: PinnedTables, layer: Layer | None, samples: Samples = ()
    ) -> None:
        """Report a violated invariant."""
        self.add(check, Severity.BROKEN, text, count, pinned, layer, samples)
