"""The Kafka offsets that Bronze lacks or has twice, and the reason for those that it lacks.

Each check proves:

- `bronze_duplicated`: no offset that was read is in two rows.
- `bronze_missing`: no committed message within the ledger's extent lacks a row. Offsets may lack one: transactions
  leave markers and aborted messages, and compaction removes messages. So each gap is read again from Kafka, committed
  messages only: a message in it is lost. For offsets that Kafka no longer has, the ledger is the proof: it counts the
  messages that Bronze took. If as many rows exist, the gaps never had any. It proves nothing about messages after the
  ledger's extent: they are not read yet (`lag`).
- `bronze_unknown` (audit incomplete): fewer rows exist than the ledger counts, Kafka no longer has the gaps, and
  retention may have removed the rows, or they may be lost. Rows before the first one that is kept count as removed by
  retention if the table's oldest day is the first that it keeps, and Kafka has no younger ones among them.
- `ledger_rows` (Bronze): the ledger counts as many messages as the table has rows.
- `kafka_damaged` (audit incomplete): Kafka's log has a batch that cannot be read, so it proves nothing there.
- `ledger_beyond_kafka`: no table's ledger claims offsets that Kafka has not assigned yet.
- `kafka_log_replaced`: Kafka still has the last messages read, of each partition and table, at their offsets. So it has
  all messages before them too. It proves nothing if retention or compaction has removed them.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from k2flow.audit.context import AuditContext
from k2flow.audit.report import SAMPLES, Samples, Severity
from k2flow.inspection.broker import MessagesRead, TopicReader
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.pinned import PinnedTables
from k2flow.kafka.marks import describe, marks_of, other_messages
from k2flow.kafka.topic import Topic
from k2flow.layers import BRONZE, Layer

Gaps = list[tuple[int, int]]

_SPANS = """
CREATE OR REPLACE TEMP TABLE spans AS SELECT number, first, next, max(next) OVER (
    PARTITION BY number ORDER BY first, next ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS reach FROM runs
"""


@dataclass(frozen=True, kw_only=True)
class Retention:
    """What may have removed Bronze's oldest rows: `possible` at all, `evident` from the oldest day that exists."""

    possible: bool
    evident: bool
    cutoff_ms: int


@dataclass(kw_only=True)
class OffsetsFound:
    """The offsets of one partition that the audit found in Bronze.

    `rows` in Bronze within its extent (each offset once), `low` to `high` the offsets of the decoded rows, `covered`
    whether every message of all layers' extents was decoded, `kafka` Kafka's first offset and end.
    """

    partition: TopicPartition
    rows: int = 0
    missing: int = 0
    duplicated: int = 0
    low: int = 0
    high: int = 0
    covered: bool = True
    kafka: tuple[int, int] | None = None


def report_damage(context: AuditContext, partition: TopicPartition, read: MessagesRead) -> None:
    """Report `kafka_damaged` (audit incomplete) if Kafka's log was found damaged: it cannot prove anything."""
    if read.damage:
        text = f"{partition}: audit incomplete: Kafka's log is damaged: {read.damage}; have Kafka restore the partition"
        context.add("kafka_damaged", Severity.UNKNOWN, text, 1, partition.pinned, BRONZE)


class OffsetCheck:
    """The checks above, of one exchange. `take` gets the messages that Bronze lacks, for the later checks."""

    def __init__(
        self,
        context: AuditContext,
        retention: Retention,
        reader: TopicReader | None,
        take: Callable[[TopicPartition, MessagesRead], None],
    ) -> None:
        self._context = context
        self._store = context.store
        self._retention = retention
        self._reader = reader
        self._take = take

    def check(self, partitions: TopicPartitions) -> dict[TopicPartition, OffsetsFound]:
        """Return the offsets found in each partition."""
        self._store.run(_SPANS)
        if self._reader and self._reader.topic:
            self._compare_marks(partitions.pinned, self._reader, self._reader.topic)
        watermarks = self._watermarks(partitions)
        result = {partition: self._check_partition(partition, watermarks.get(partition)) for partition in partitions}
        if any(found.duplicated for found in result.values()):  # reported once: later checks see each message once
            for table in ("valid", "bad", "unresolved"):
                self._store.run(
                    f'CREATE OR REPLACE TABLE {table} AS SELECT DISTINCT ON (number, "offset") * FROM {table}'
                )
        return result

    def _compare_marks(self, pinned: PinnedTables, reader: TopicReader, topic: Topic) -> None:
        marks = marks_of(topic, pinned.ledgers.values())
        for other in other_messages(marks, reader.marks(marks.keys())):
            sample = {"topic": topic.name, "partition": other.partition, "offset": other.read.offset}
            text = describe(topic.name, other)
            self._context.broken("kafka_log_replaced", text, 1, pinned, None, [sample])

    def _check_partition(self, partition: TopicPartition, kafka: tuple[int, int] | None) -> OffsetsFound:
        found = OffsetsFound(partition=partition, kafka=kafka)
        if found.kafka:
            self._compare_with_kafka(partition, found.kafka)
        self._measure(found)
        self._check_gaps(found)
        self._read_ahead(found)
        return found

    def _watermarks(self, partitions: TopicPartitions) -> dict[TopicPartition, tuple[int, int]]:
        """Return Kafka's watermarks of those partitions that it still has."""
        topic = self._reader.topic if self._reader else None
        if self._reader is None or topic is None:
            return {}
        known = [
            each
            for each in partitions
            if each.current and topic.same_as(each.topic_id) and each.partition in topic.partitions
        ]
        found = self._reader.watermarks([each.partition for each in known])
        return {each: found[each.partition] for each in known}

    def _compare_with_kafka(self, partition: TopicPartition, kafka: tuple[int, int]) -> None:
        low, high = kafka
        for layer, extent in partition.extents.items():
            if (end := extent.next) > high:
                text = f"{partition}: the ledger ends before {end}, but Kafka has assigned no offset from {high} on"
                self._broken("ledger_beyond_kafka", partition, text, end - high, layer, [partition.between(high, end)])
        committed = partition.extent(BRONZE).next
        if committed and low > committed:
            text = f"{partition}: Kafka no longer has offsets {committed} to {low - 1}, which were never committed"
            samples = [partition.between(committed, low)]
            self._context.add("never_read", Severity.NOTE, text, low - committed, partition.pinned, samples=samples)

    def _measure(self, found: OffsetsFound) -> None:
        partition = found.partition
        of = [partition.number]
        rows, low, high = self._store.one(
            "SELECT coalesce(sum(next - first), 0), min(first), max(next) FROM runs WHERE number = ?", of
        )
        duplicated = self._store.run(
            "SELECT first, least(next, reach) FROM spans WHERE number = ? AND first < reach ORDER BY 1", of
        )
        found.duplicated = sum(end - first for first, end in duplicated)
        found.rows = int(rows) - found.duplicated
        end = partition.extent(BRONZE).next
        found.low, found.high = (low, high) if rows else (end, end)
        if duplicated:
            text = f"{partition}: {found.duplicated:,} rows have an offset that another row has"
            samples = [partition.between(*each) for each in duplicated]
            self._broken("bronze_duplicated", partition, text, found.duplicated, BRONZE, samples)

    def _check_gaps(self, found: OffsetsFound) -> None:
        partition = found.partition
        extent = partition.extent(BRONZE)
        between = self._store.arrays(
            "SELECT reach, first FROM spans WHERE number = ? AND first > reach ORDER BY 1", [partition.number]
        )
        gaps = list(zip(between["reach"].tolist(), between["first"].tolist(), strict=True))
        if found.high < extent.next:
            gaps.append((found.high, extent.next))
        before = (extent.first, found.low)
        if not self._context.whole:
            found.covered = False
        elif before[0] < before[1]:
            gaps = [*self._not_expired(found, before), *gaps]
        lost = partition.lost_of(BRONZE)
        reread = self._read(found, [piece for gap in gaps for piece in without(gap, lost)])
        if reread.offset:
            found.missing = len(reread.offset)
            self._take(partition, reread)
            text = f"{partition}: Kafka has {found.missing:,} committed messages that have no row"
            samples = [partition.at(offset) for offset in reread.offset[:SAMPLES]]
            self._broken("bronze_missing", partition, text, found.missing, BRONZE, samples)
        if self._context.whole:
            self._compare_with_ledger(found, reread.unread, before)
        elif reread.unread:
            self._unknown(found, reread.unread, sum(end - first for first, end in reread.unread))
        self._take_lost(found, list(lost))

    def _take_lost(self, found: OffsetsFound, lost: Gaps) -> None:
        """Read the messages of lost rows again: the other tables hold them."""
        reread = self._read(found, lost)
        if reread.offset:
            self._take(found.partition, reread)
        found.covered &= not reread.unread

    def _read(self, found: OffsetsFound, gaps: Gaps) -> MessagesRead:
        if self._reader and found.kafka and gaps:
            read = self._reader.read(found.partition.partition, gaps, *found.kafka)
            report_damage(self._context, found.partition, read)
            return read
        return MessagesRead(unread=list(gaps))

    def _not_expired(self, found: OffsetsFound, before: tuple[int, int]) -> Gaps:
        """Return the offsets before the first row that retention cannot have removed, as far as Kafka knows."""
        if not self._retention.possible:
            return [before]
        if self._reader and found.kafka:
            first = self._reader.first_since(found.partition.partition, self._retention.cutoff_ms)
            if first is not None and first < before[1]:
                return [(max(first, before[0]), before[1])]
        return []

    def _compare_with_ledger(self, found: OffsetsFound, unread: Gaps, before: tuple[int, int]) -> None:
        partition = found.partition
        counted = partition.extent(BRONZE).rows
        absent = counted - found.rows - found.missing
        found.covered = absent <= 0
        if absent < 0:
            text = (
                f"{partition}: the ledger counts {counted:,} messages, the table has {found.rows:,} (each offset once)"
            )
            self._broken("ledger_rows", partition, text, -absent, BRONZE)
        elif absent and self._retention.possible and before[0] < before[1]:
            self._report_expired(found, unread, before, absent)
        elif absent and unread:
            found.missing += absent
            text = f"{partition}: the ledger counts {counted:,} messages; {absent:,} of them have no row"
            samples = [partition.between(*gap) for gap in unread[:SAMPLES]]
            self._broken("bronze_missing", partition, text, absent, BRONZE, samples)
        elif absent:
            text = (
                f"{partition}: the ledger counts {counted:,} messages; the table has {found.rows:,}, and Kafka no more"
            )
            self._broken("ledger_rows", partition, text, absent, BRONZE)

    def _report_expired(self, found: OffsetsFound, unread: Gaps, before: tuple[int, int], absent: int) -> None:
        partition = found.partition
        if unread:
            size = sum(end - first for first, end in unread)
            self._unknown(found, unread, min(size, absent) if self._retention.evident else absent)
        elif not self._retention.evident and found.kafka is None:
            self._unknown(found, [before], absent)
        else:
            text = f"{partition}: retention has removed {absent:,} rows before offset {found.low}"
            self._context.add("expired", Severity.NOTE, text, absent, partition.pinned, BRONZE)

    def _read_ahead(self, found: OffsetsFound) -> None:
        """Read from Kafka the offsets that another table holds and Bronze does not yet."""
        partition = found.partition
        begin = partition.extent(BRONZE).next or found.low or min(e.first for e in partition.extents.values())
        furthest = max(extent.next for extent in partition.extents.values())
        if furthest <= begin:
            return
        reread = self._read(found, [(begin, furthest)])
        if reread.offset:
            self._take(partition, reread)
        if reread.unread:
            found.covered = False
            if partition.current:
                text = f"{partition}: other tables hold offsets {begin} to {furthest - 1}, Bronze and Kafka do not"
                samples = [partition.between(begin, furthest)]
                count = furthest - begin
                self._context.add("ahead_of_bronze", Severity.UNKNOWN, text, count, partition.pinned, samples=samples)

    def _unknown(self, found: OffsetsFound, unread: Gaps, count: int) -> None:
        partition = found.partition
        why = "Kafka could not be asked" if found.kafka is None else "Kafka no longer has them"
        text = f"{partition}: audit incomplete: up to {count:,} messages may lack a row, and {why}"
        samples = [partition.between(*gap) for gap in unread[:SAMPLES]]
        self._context.add("bronze_unknown", Severity.UNKNOWN, text, count, partition.pinned, BRONZE, samples)

    def _broken(
        self, check: str, partition: TopicPartition, text: str, count: int, layer: Layer, samples: Samples = ()
    ) -> None:
        self._context.broken(check, text, count, partition.pinned, layer, samples)


def without(gap: tuple[int, int], lost: Iterable[tuple[int, int]]) -> Gaps:
    """Return the parts of a range that are in none of `lost` (ascending, apart)."""
    parts, at = [], gap[0]
    for first, end in lost:
        if at < min(first, gap[1]):
            parts.append((at, min(first, gap[1])))
        at = max(at, end)
    return [*parts, (at, gap[1])] if at < gap[1] else parts
