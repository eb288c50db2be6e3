"""Bronze against Silver, and against every other layer that takes all trades: the rows are the decoded trades.

Each check proves, for the messages that Bronze still has and offsets that the ledgers of both tables hold:

- `in_neither` (Silver), `<layer>_missing` (other layers): a valid message's row exists, with the same values in all
  compared columns, as often as such messages came. For Silver, a message that is a dead letter instead is `misplaced`.
- `in_both`: a valid message in Silver has no dead-letter row. `misplaced`: nor has one that is not in Silver.
- `silver_unexpected`, `silver_duplicated` (or another layer's name): no row exists that no message gives, and none more
  often than messages give it. If Bronze no longer has all messages, or some are unresolved, the table may have rows of
  those. Then the ledger only bounds their number, and `silver_repeated` notes rows that such a message may have given
  once more.

Not compared: which of two messages with equal values a row came from, and trades of days that retention leaves out.
"""

from collections.abc import Mapping

from k2flow.audit.context import AuditContext
from k2flow.audit.database import within
from k2flow.audit.file_checks import read_checked
from k2flow.audit.offsets import OffsetsFound
from k2flow.audit.proof import NotProvenError, RowSum
from k2flow.audit.report import SAMPLES, Samples, Severity
from k2flow.audit.sums import SUMS
from k2flow.inspection.files import ReadPlan, prefetch
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.row_hashes import content_hash, hashable, id_hash
from k2flow.layers import DLQ, SILVER, Layer

MISSING = "row IN (SELECT row FROM differing WHERE e > s)"
IS_DEAD_LETTER = 'EXISTS (SELECT 1 FROM dlq d WHERE d.number = e.number AND d."offset" = e."offset")'


class TradesCheck:
    """The checks above, of one layer of one exchange."""

    def __init__(self, context: AuditContext, partitions: TopicPartitions, layer: Layer) -> None:
        self._context = context
        self._store = context.store
        self._partitions = partitions
        self._pinned = partitions.pinned
        self._layer = layer

    def read(self, plan: ReadPlan) -> None:
        """Read the layer's rows into table `trades` of the database."""
        exchange = self._pinned.exchange
        key = id_hash(exchange) if set(exchange.dedup_key) <= set(self._layer.columns) else "NULL::UBIGINT"
        hashes = self._context.hashes.expressions(self._layer)
        columns = f"file, '{self._layer.name}', {self._pinned.number}, {key}, {hashes}"
        for batch in prefetch(map(hashable, read_checked(self._context, plan))):
            self._store.insert("trades", batch, columns)

    def check(self, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
        """Compare the rows with the decoded trades."""
        x, layer = self._pinned.number, self._layer
        row = self._context.hashes.column(layer)
        found = f"(SELECT {row} AS row FROM trades WHERE layer = '{layer.name}' AND exchange = {x})"
        self._store.run(
            f'CREATE OR REPLACE TEMP VIEW expected AS SELECT v.number, v."offset", v.{row} AS row '
            f"FROM valid v {within(layer)} WHERE e_{layer.name}.exchange = {x} "
            f"AND v.day >= {self._pinned.cutoff_day(layer)}"
        )
        sums, removed = f"SELECT {SUMS.format(row='row')} FROM", self._context.scope.removed(self._pinned.name(layer))
        expected = RowSum.of(*self._store.one(f"{sums} expected"))
        if expected.plus(removed) == RowSum.of(*self._store.one(f"{sums} {found}")):
            self._report_both("false")
            return
        if self._context.scope.proof:
            raise NotProvenError(f"{self._pinned.name(layer)}: the new rows are not those of the new messages")
        self._store.run(
            "CREATE OR REPLACE TEMP TABLE differing AS SELECT row, sum(e) AS e, sum(s) AS s FROM ("
            f"SELECT row, 1 AS e, 0 AS s FROM expected UNION ALL SELECT row, 0, 1 FROM {found}) "
            "GROUP BY row HAVING sum(e) <> sum(s)"
        )
        self._report_both(MISSING)
        (missing,) = self._store.one("SELECT coalesce(sum(e - s), 0) FROM differing WHERE e > s")
        if missing:
            self._report_missing(int(missing))
        if self._context.whole:
            self._report_surplus(offsets)

    def _report_both(self, missing: str) -> None:
        """Report the valid messages that have a dead-letter row: in both tables, or in the wrong one."""
        if self._layer is not SILVER:
            return
        for check, condition, text in (
            ("in_both", f"NOT ({missing})", "are both in Silver and dead letters"),
            ("misplaced", missing, "are dead letters and not in Silver, though they are valid"),
        ):
            rows = f'FROM expected e JOIN dlq d USING (number, "offset") WHERE {condition}'
            if count := self._store.count(rows):
                samples = self._samples(f'SELECT number, "offset" {rows}')
                self._broken(check, f"{count:,} messages {text}", count, DLQ, samples)

    def _report_missing(self, missing: int) -> None:
        if self._layer is SILVER:
            missing -= self._store.count(f"FROM expected e WHERE {MISSING} AND {IS_DEAD_LETTER}")
            rows = f"FROM expected e WHERE {MISSING} AND NOT {IS_DEAD_LETTER}"
            check, text = "in_neither", "valid messages are neither in Silver, as they were decoded, nor dead letters"
        else:
            rows = f"FROM expected e WHERE {MISSING}"
            check, text = f"{self._layer.name}_missing", "valid messages have no row, as they were decoded"
        if missing > 0:
            samples = self._samples(f'SELECT e.number, e."offset" {rows}')
            self._broken(check, f"{missing:,} {text}", missing, self._layer, samples)

    def _report_surplus(self, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
        allowed = 0
        unresolved = self._store.count(f"FROM unresolved v {within(self._layer)}")
        if unresolved or not all(found.covered for found in offsets.values()):
            allowed = sum(partition.extent(self._layer).rows - self._decoded(partition) for partition in offsets)
        for kind, condition, text in (
            ("unexpected", "e = 0", "are given by no message"),
            ("duplicated", "e > 0", "exist more often than messages give them"),
        ):
            rows = f"FROM differing WHERE s > e AND {condition}"
            count, distinct = self._store.one(f"SELECT coalesce(sum(s - e), 0)::BIGINT, count(*) {rows}")
            surplus = count - allowed
            if surplus > 0:
                hashes = self._store.column(f"SELECT row {rows} LIMIT {SAMPLES}")
                samples = []
                if not allowed or distinct <= SAMPLES:
                    samples = self._context.trades_with(self._pinned, self._layer, content_hash(self._layer), hashes)
                check = f"{self._layer.name}_{kind}"
                self._broken(check, f"{surplus:,} rows {text}", surplus, self._layer, samples)
            elif count and kind == "duplicated":
                text = (
                    f"{count:,} rows exist more often than Bronze's messages give them; expired or unresolved ones may"
                )
                check = f"{self._layer.name}_repeated"
                self._context.add(check, Severity.NOTE, text, count, self._pinned, self._layer)
            allowed = max(0, allowed - count)

    def _decoded(self, partition: TopicPartition) -> int:
        """Return how many of the messages that the layer's ledger counts were decoded."""
        return self._store.count(f"FROM valid v {within(self._layer)} WHERE v.number = {partition.number}")

    def _samples(self, messages: str) -> list[dict[str, object]]:
        return self._partitions.samples(self._store.run(f"{messages} ORDER BY ALL LIMIT {SAMPLES}"))

    def _broken(self, check: str, text: str, count: int, layer: Layer, samples: Samples) -> None:
        self._context.broken(check, text, count, self._pinned, layer, samples)
