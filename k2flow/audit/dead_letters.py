"""Bronze against the dead letters: each bad message is in the table, as it was decoded, and no other one.

Each check proves, for the messages that Bronze still has and offsets that the ledgers of both tables hold:

- `in_neither`: a bad message's offset is in the dead-letter table. A message whose schema is not known is there too, or
  is one of the messages that Silver's ledger counts and no other one gives.
- `dlq_duplicated`, `dlq_unexpected`: no offset is in the table twice, and none that no message has.
- `dlq_changed`: payload, schema id, Kafka timestamp and reason are those that the message gives.
- `dlq_reworded` (a note): rows whose `detail` today's k2flow words differently.
- `dlq_outside_ledger`: no row has a topic, partition or offset that the ledger does not hold.

Not compared: `failed_at`, except for its day, and bad messages ingested on days that retention leaves out.
"""

from collections.abc import Mapping

import numpy as np
import pyarrow as pa

from k2flow.audit.context import AuditContext
from k2flow.audit.database import within
from k2flow.audit.file_checks import read_checked
from k2flow.audit.ledgers import LedgerFilter
from k2flow.audit.offsets import OffsetsFound
from k2flow.audit.proof import NotProvenError
from k2flow.audit.report import SAMPLES, Severity
from k2flow.audit.schemas import UNKNOWN
from k2flow.audit.scope import compared_from, proven_before
from k2flow.audit.sums import add_sums
from k2flow.inspection.files import ReadPlan, prefetch
from k2flow.inspection.partitions import OUTSIDE, TopicPartition, TopicPartitions
from k2flow.inspection.row_hashes import content_hash, hashable
from k2flow.layers import DLQ, SILVER

_SAME = 'd.number = e.number AND d."offset" = e."offset"'


class DeadLetterCheck:
    """The checks above, of one exchange."""

    def __init__(self, context: AuditContext, partitions: TopicPartitions) -> None:
        self._context = context
        self._store = context.store
        self._partitions = partitions
        self._pinned = partitions.pinned

    def read(self, plan: ReadPlan) -> None:
        """Read the dead letters into table `dlq` of the database, and report the rows outside the ledger."""
        ledger = LedgerFilter(self._partitions, DLQ)
        before, due = proven_before(self._partitions, DLQ), compared_from(self._partitions)
        columns = f'number, "offset", reason, {content_hash(DLQ)}, hash(detail)'
        for batch in prefetch(read_checked(self._context, plan)):
            number, offset = ledger.numbers(batch), batch.column("offset").fill_null(OUTSIDE).to_numpy()
            add_sums(self._context, DLQ, batch, number, offset < before[number])
            batch = batch.append_column("number", pa.array(number.astype(np.int32)))
            self._store.insert("dlq", hashable(batch.filter(pa.array(offset >= due[number]))), columns)
        ledger.report(self._context)

    def check(self, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
        """Compare the rows with the messages."""
        x = self._pinned.number
        self._store.run(
            f"CREATE OR REPLACE TEMP VIEW expected_bad AS SELECT v.* FROM bad v {within(DLQ)} "
            f"WHERE e_dlq.exchange = {x} AND v.day > {self._pinned.cutoff_day(DLQ)}"
        )
        ours = f"number IN (SELECT number FROM extents WHERE exchange = {x})"
        lows = ", ".join(f"({p.number}, {found.low}, {found.high})" for p, found in offsets.items()) or "(NULL, 0, 0)"
        no_bad = " AND ".join(f"NOT EXISTS (SELECT 1 FROM {table} d WHERE {_SAME})" for table in ("bad", "unresolved"))
        if self._context.scope.proof and self._store.count(f"FROM dlq e WHERE {ours} AND {no_bad}"):
            raise NotProvenError(f"{self._pinned.name(DLQ)}: rows that no bad message gives")
        self._check(
            "in_neither",
            f"FROM expected_bad e WHERE NOT EXISTS (SELECT 1 FROM dlq d WHERE {_SAME})",
            "bad messages are not dead letters (nor can they be in Silver)",
        )
        self._check(
            "dlq_duplicated",
            f'FROM (SELECT number, "offset" FROM dlq WHERE {ours} GROUP BY ALL HAVING count(*) > 1) e',
            "messages have more than one row",
        )
        self._check(
            "dlq_changed",
            f"FROM expected_bad e JOIN dlq d ON {_SAME} WHERE d.content IS DISTINCT FROM e.content",
            "rows differ from what their message gives: payload, schema id, Kafka timestamp or reason",
        )
        self._check(
            "dlq_reworded",
            f"FROM expected_bad e JOIN dlq d ON {_SAME} WHERE d.detail IS DISTINCT FROM e.detail "
            f"AND e.reason <> '{UNKNOWN}'",  # it says what the registry answered then
            "rows have a detail that today's k2flow words differently",
            Severity.NOTE,
        )
        self._check(
            "dlq_unexpected",
            f"FROM dlq e JOIN (VALUES {lows}) low(number, first, next) ON low.number = e.number "
            'WHERE e."offset" >= low.first AND e."offset" < low.next '
            f"AND {no_bad} AND NOT EXISTS (SELECT 1 FROM valid d WHERE {_SAME})",
            "rows have an offset that no message has",
        )
        for partition in offsets:
            self._check_unresolved(partition)

    def _check_unresolved(self, partition: TopicPartition) -> None:
        """Compare the messages without a known schema and without a dead letter with those that Silver has room for."""
        decoded = self._store.count(f"FROM valid v {within(SILVER)} WHERE v.number = {partition.number}")
        rows = (
            f"FROM unresolved v {within(DLQ)} {within(SILVER)} WHERE v.number = {partition.number} "
            f"AND v.day > {self._pinned.cutoff_day(DLQ)} "
            'AND NOT EXISTS (SELECT 1 FROM dlq d WHERE d.number = v.number AND d."offset" = v."offset")'
        )
        count = self._store.count(rows) - max(0, partition.extent(SILVER).rows - decoded)
        if count > 0:
            samples = self._store.run(f'SELECT v.number, v."offset" {rows} ORDER BY ALL LIMIT {SAMPLES}')
            text = f"{partition}: {count:,} messages whose schema is not known are neither in Silver nor dead letters"
            self._context.broken("in_neither", text, count, self._pinned, DLQ, self._partitions.samples(samples))

    def _check(self, check: str, rows: str, text: str, severity: Severity = Severity.BROKEN) -> None:
        if count := self._store.count(rows):
            sql = f'SELECT e.number, e."offset" {rows} ORDER BY ALL LIMIT {SAMPLES}'
            samples = self._partitions.samples(self._store.run(sql))
            self._context.add(check, severity, f"{count:,} {text}", count, self._pinned, DLQ, samples)
