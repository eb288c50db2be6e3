"""What all checks of one audit share: the database, the report, the scope, and a search for rows to name."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import pyarrow as pa

from k2flow.audit.database import TradeHashes
from k2flow.audit.proof import NotProvenError
from k2flow.audit.report import AuditReport, Samples, Severity
from k2flow.audit.scope import Scope
from k2flow.inspection.files import Advance, Progress, ReadPlan, plan, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import RowHashStore, hashable
from k2flow.layers import Layer

MAX_ROWS = 10_000
DAY_SECONDS = 86_400


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
    scope: Scope

    @property
    def first_day(self) -> int | None:
        """The day (UTC, since 1970) of `since`."""
        return None if self.since is None else int(self.since.timestamp() // DAY_SECONDS)

    @property
    def whole(self) -> bool:
        """Whether everything that the scope leaves is read."""
        return self.since is None

    def advance(self, plan: ReadPlan) -> Advance:
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

    def trades_with(
        self, pinned: PinnedTables, layer: Layer, hash_sql: str, hashes: Sequence[int]
    ) -> list[dict[str, Any]]:
        """Return key, exchange and time of the rows, at most MAX_ROWS, whose `hash_sql` is one of `hashes`.

        Reads the whole table: only to name rows after a check found something. An incremental audit names none: raises
        NotProvenError.
        """
        if self.scope.proof:
            raise NotProvenError(f"{pinned.name(layer)}: rows of new files are wrong")
        if not hashes:
            return []
        candidates = dict.fromkeys((*pinned.exchange.dedup_key, "exchange", layer.event_time))
        names = [name for name in candidates if name in layer.columns]
        columns, wanted = ", ".join(f'"{name}"' for name in names), ", ".join(map(str, hashes))
        sql = f"SELECT {columns} FROM batch WHERE {hash_sql} IN ({wanted}) LIMIT {MAX_ROWS}"
        found: list[dict[str, Any]] = []
        for batch in _whole_table(pinned, layer):
            for row in self.store.select(batch, sql):
                values = (value.isoformat() if isinstance(value, datetime) else value for value in row)
                found.append(dict(zip(names, values, strict=True)))
            if len(found) >= MAX_ROWS:
                break
        return found

    def present(self, pinned: PinnedTables, layer: Layer, hash_sql: str, hashes: Sequence[int]) -> set[int]:
        """Return those of `hashes` that are the `hash_sql` of any row. Reads the whole table."""
        if not hashes:
            return set()
        sql = f"SELECT DISTINCT {hash_sql} FROM batch WHERE {hash_sql} IN ({', '.join(map(str, hashes))})"
        return {found for batch in _whole_table(pinned, layer) for (found,) in self.store.select(batch, sql)}


def _whole_table(pinned: PinnedTables, layer: Layer) -> Iterator[pa.RecordBatch]:
    return map(hashable, read(plan(pinned, layer), layer.columns, None, lambda _: None))
