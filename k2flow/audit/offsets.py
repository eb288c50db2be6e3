"""Which Kafka offsets Bronze lacks or has twice, and what became of those that it lacks.

What each check proves:

- `bronze_doubled`: no offset that was read is in two rows.
- `bronze_missing`: no committed message within the ledger's extent is without a row. Offsets may be without one, for
  transactions leave markers and aborted messages, and compaction removes messages. So each gap is read again from
  Kafka, committed messages only: a message in it is lost. What Kafka no longer has is proved by the ledger, which
  counts the messages that Bronze took: if as many rows are there, the gaps never had any. It proves nothing of
  messages beyond the ledger's extent: they are not read yet (`lag`).
- `bronze_unknown` (it cannot be told): fewer rows are there than the ledger counts, Kafka no longer has the gaps,
  and retention may have removed the rows, or they may be lost. Rows before the first one that is kept count as removed
  by retention where the table's oldest day is the first that it keeps, and Kafka shows none that are younger.
- `ledger_rows` (Bronze): the ledger counts as many messages as the table has rows.
- `ledger_beyond_kafka`: no table's ledger claims offsets that Kafka has not given out yet.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime

from k2flow.audit.report import SAMPLES, Report, Severity
from k2flow.inspection.broker import Broker, Reread
from k2flow.inspection.partitions import Part
from k2flow.inspection.pinned import LAYERS
from k2flow.inspection.row_hashes import Store

_SPANS = """
CREATE OR REPLACE TEMP TABLE spans AS SELECT part, first, next, max(next) OVER (
    PARTITION BY part ORDER BY first, next ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reach FROM runs
"""


@dataclass(frozen=True)
class Retention:
    """What may have removed Bronze's oldest rows: `possible` at all, `evident` from the oldest day that is there."""

    possible: bool
    evident: bool
    cutoff_ms: int


class Offsets:
    """The checks above, of one exchange. `take` is given the messages that Bronze lacks, for the later checks."""

    def __init__(
        self, store: Store, report: Report, retention: Retention, since: bool, take: Callable[[Part, Reread], None]
    ) -> None:
        self._store = store
        self._report = report
        self._retention = retention
        self._since = since
        self._take = take

    def check(self, parts: list[Part], broker: Broker | None) -> None:
        self._store.run(_SPANS)
        for part in parts:
            self._ask_kafka(part, broker)
            self._measure(part)
            self._check_gaps(part, broker)
            self._read_ahead(part, broker)
        if any(part.doubled for part in parts):  # said once: what comes next is to see each message once
            for table in ("valid", "bad"):
                self._store.run(
                    f'CREATE OR REPLACE TABLE {table} AS SELECT DISTINCT ON (part, "offset") * FROM {table}'
                )

    def _ask_kafka(self, part: Part, broker: Broker | None) -> None:
        if broker is None or broker.topic is None or not part.current or part.partition not in broker.topic.partitions:
            return
        if not broker.topic.same_as(part.topic_id):
            return
        low, high = part.kafka = broker.watermarks(part.partition)
        for layer in LAYERS:
            end = part.extent(layer).next
            if end > high:
                text = f"{part}: the ledger ends before {end}, but Kafka has given out no offset from {high} on"
                self._broken("ledger_beyond_kafka", part, text, end - high, layer, [part.between(high, end)])
        log_starts = part.extent("bronze").next
        if log_starts and low > log_starts:
            text = f"{part}: Kafka no longer has offsets {log_starts} to {low - 1}, which were never committed"
            self._report.add(
                "never_read", Severity.NOTE, text, low - log_starts, part.pinned.exchange.name, None,
                [part.between(log_starts, low)],
            )  # fmt: skip

    def _measure(self, part: Part) -> None:
        """Sets what the runs say, and reports doubled offsets."""
        rows, low, high = self._store.one(
            "SELECT coalesce(sum(next - first), 0), min(first), max(next) FROM runs WHERE part = ?", [part.number]
        )
        doubled = self._store.run(
            "SELECT first, least(next, reach) FROM spans WHERE part = ? AND first < reach ORDER BY 1", [part.number]
        )
        part.doubled = sum(end - first for first, end in doubled)
        part.rows = int(rows) - part.doubled
        extent = part.extent("bronze")
        part.low, part.high = (low, high) if rows else (extent.next, extent.next)
        if doubled:
            text = f"{part}: {part.doubled:,} rows have an offset that another row has"
            self._broken("bronze_doubled", part, text, part.doubled, "bronze", [part.between(*d) for d in doubled])

    def _check_gaps(self, part: Part, broker: Broker | None) -> None:
        extent = part.extent("bronze")
        found = self._store.arrays(
            "SELECT reach, first FROM spans WHERE part = ? AND first > reach ORDER BY 1", [part.number]
        )
        gaps = list(zip(found["reach"].tolist(), found["first"].tolist(), strict=True))
        if part.high < extent.next:
            gaps.append((part.high, extent.next))
        before = (extent.first, part.low)
        if self._since:
            part.covered = False
        elif before[0] < before[1]:
            gaps = [*self._younger(part, broker, before), *gaps]
        reread = Reread(unread=list(gaps)) if gaps else Reread()
        if broker and part.kafka and gaps:
            reread = broker.read(part.partition, gaps, *part.kafka)
        if reread.offset:
            part.missing = len(reread.offset)
            self._take(part, reread)
            text = f"{part}: Kafka has {part.missing:,} committed messages that have no row"
            samples = [part.at(offset) for offset in reread.offset[:SAMPLES]]
            self._broken("bronze_missing", part, text, part.missing, "bronze", samples)
        if not self._since:
            self._account(part, reread, before)
        elif reread.unread:
            self._cannot_tell(part, reread, sum(end - first for first, end in reread.unread))

    def _younger(self, part: Part, broker: Broker | None, before: tuple[int, int]) -> list[tuple[int, int]]:
        """Of the offsets before the first row those that retention cannot have removed, as far as can be told."""
        if not self._retention.possible:
            return [before]
        if broker and part.kafka:
            first = broker.first_since(part.partition, self._retention.cutoff_ms)
            if first is not None and first < before[1]:
                return [(max(first, before[0]), before[1])]
        return []

    def _account(self, part: Part, reread: Reread, before: tuple[int, int]) -> None:
        """Compares the rows with the ledger's count, once the gaps have been looked at."""
        counted = part.extent("bronze").rows
        absent = counted - part.rows - part.missing
        unread = sum(end - first for first, end in reread.unread)
        empty = before[0] < before[1]
        part.covered = absent <= 0
        if absent < 0:
            text = f"{part}: the ledger counts {counted:,} messages, the table has {part.rows:,} (each offset once)"
            self._broken("ledger_rows", part, text, -absent, "bronze", [])
        elif absent and self._retention.possible and empty:
            if unread and not self._retention.evident:
                self._cannot_tell(part, reread, absent)
            elif not self._retention.evident and part.kafka is None:
                self._cannot_tell(part, Reread(unread=[before]), absent)
            elif unread:
                self._cannot_tell(part, reread, min(unread, absent))
            else:
                text = f"{part}: {absent:,} rows before offset {part.low} have been removed by retention"
                self._report.add(
                    "expired", Severity.NOTE, text, absent, part.pinned.exchange.name, part.pinned.name("bronze")
                )
        elif absent and unread:
            part.missing += absent
            text = f"{part}: the ledger counts {counted:,} messages, {absent:,} of which have no row"
            samples = [part.between(*gap) for gap in reread.unread[:SAMPLES]]
            self._broken("bronze_missing", part, text, absent, "bronze", samples)
        elif absent:
            text = f"{part}: the ledger counts {counted:,} messages, the table has {part.rows:,}, and Kafka no more"
            self._broken("ledger_rows", part, text, absent, "bronze", [])

    def _read_ahead(self, part: Part, broker: Broker | None) -> None:
        """Reads from Kafka the offsets that another table holds and Bronze does not yet."""
        end = part.extent("bronze").next or part.low
        starts = [e.first for e in part.extents.values()]
        begin = end or min(starts)
        furthest = max(e.next for e in part.extents.values())
        if furthest <= begin:
            return
        reread = Reread(unread=[(begin, furthest)])
        if broker and part.kafka:
            reread = broker.read(part.partition, reread.unread, *part.kafka)
        if reread.offset:
            self._take(part, reread)
        if reread.unread:
            part.covered = False
            if part.current:
                text = f"{part}: other tables hold offsets {begin} to {furthest - 1}, Bronze and Kafka do not"
                self._report.add(
                    "ahead_of_bronze", Severity.UNKNOWN, text, furthest - begin, part.pinned.exchange.name, None,
                    [part.between(begin, furthest)],
                )  # fmt: skip

    def _cannot_tell(self, part: Part, reread: Reread, count: int) -> None:
        text = f"{part}: it cannot be told whether up to {count:,} messages had a row: Kafka no longer has them"
        if part.kafka is None:
            text = f"{part}: it cannot be told whether up to {count:,} messages had a row without asking Kafka"
        samples = [part.between(*gap) for gap in reread.unread[:SAMPLES]]
        exchange, table = part.pinned.exchange.name, part.pinned.name("bronze")
        self._report.add("bronze_unknown", Severity.UNKNOWN, text, count, exchange, table, samples)

    def _broken(
        self, check: str, part: Part, text: str, count: int, layer: str, samples: list[dict[str, object]]
    ) -> None:
        exchange, table = part.pinned.exchange.name, part.pinned.name(layer)
        self._report.add(check, Severity.BROKEN, text, count, exchange, table, samples)


def midnight_ms(day: int) -> int:
    """The first millisecond of a day since 1970; 0 for days before."""
    return max(0, int(datetime.fromtimestamp(max(day, 0) * 86_400, UTC).timestamp() * 1000))
