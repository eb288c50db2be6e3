"""The audit of one exchange's tables, except for Gold."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from k2flow.audit.bronze import BronzeReader, MessageHasher, compare_with_kafka
from k2flow.audit.context import AuditContext
from k2flow.audit.coverage import compares_rows, unchecked
from k2flow.audit.database import store_extents
from k2flow.audit.dead_letters import DeadLetterCheck
from k2flow.audit.file_checks import read_checked
from k2flow.audit.ledgers import check_head, check_ledgers, check_totals
from k2flow.audit.offsets import OffsetCheck, OffsetsFound, Retention
from k2flow.audit.report import Severity
from k2flow.audit.schemas import SchemaCheck
from k2flow.audit.sums import add_sums, check_proven_rows
from k2flow.audit.trades import TradesCheck
from k2flow.config.settings import Settings
from k2flow.errors import KafkaError
from k2flow.inspection.broker import MessagesRead, TopicReader
from k2flow.inspection.files import ReadPlan
from k2flow.inspection.partitions import OUTSIDE, TopicPartition, TopicPartitions
from k2flow.inspection.pinned import DAY_MS, UNIX_EPOCH
from k2flow.layers import BRONZE, DLQ, Layer
from k2flow.trades.stored_schemas import StoredSchemas


class ExchangeAudit:
    """Audits the tables of one exchange, except for Gold."""

    def __init__(self, context: AuditContext, settings: Settings, partitions: TopicPartitions) -> None:
        """Open the schemas. Raises SettingsError."""
        self._context = context
        self._settings = settings
        self._partitions = partitions
        self._pinned = partitions.pinned
        exchange, bronze = self._pinned.exchange, self._pinned.tables[BRONZE]
        schemas = StoredSchemas(settings, bronze.properties, exchange.name)
        self._schemas = SchemaCheck(context, exchange, schemas)
        self._hasher = MessageHasher(context, exchange, self._schemas)

    def run(self) -> dict[TopicPartition, OffsetsFound]:
        """Run all checks. Return the offsets found in each partition."""
        letters = DeadLetterCheck(self._context, self._partitions)
        letters.read(self._planned(DLQ))
        self._schemas.find_refused()
        offsets = self._audit_bronze()
        if self._context.scope.proof:
            check_proven_rows(self._context, self._pinned, DLQ)
            check_proven_rows(self._context, self._pinned, BRONZE)
        store_extents(self._context.store, self._partitions)
        layers = [layer for layer in self._pinned.exchange.layers if compares_rows(layer)]
        copies = [TradesCheck(self._context, self._partitions, layer) for layer in layers]
        for layer, check in zip(layers, copies, strict=True):
            check.read(self._planned(layer))
        for check in copies:
            check.check(offsets)
        letters.check(offsets)
        check_ledgers(self._context, offsets)
        check_head(self._context, self._pinned)
        self._schemas.report(self._partitions)
        self._audit_files_only()
        return offsets

    def _audit_bronze(self) -> dict[TopicPartition, OffsetsFound]:
        cutoff = self._pinned.cutoff_day(BRONZE)
        first = cutoff if self._context.first_day is None else max(cutoff, self._context.first_day)
        files = self._context.scope.plan(self._pinned, BRONZE, first)
        BronzeReader(self._context, self._partitions, self._hasher).read(files)
        retention = Retention(
            possible=not (self._context.scope.proof or self._pinned.created_after_cutoff(BRONZE)),
            evident=files.skipped_rows > 0 or (files.first_day is not None and files.first_day <= cutoff + 1),
            cutoff_ms=max(cutoff, 0) * DAY_MS,
        )
        with self._topic_reader() as reader:
            offsets = OffsetCheck(self._context, retention, reader, self._take).check(self._partitions)
            kafka = {partition: found.kafka for partition, found in offsets.items() if found.kafka}
            if reader and kafka:
                compare_with_kafka(self._context, self._partitions, reader, kafka)
        return offsets

    def _take(self, partition: TopicPartition, found: MessagesRead) -> None:
        decoded = self._hasher.decode(found.batch(partition.number))
        self._hasher.store(decoded, (self._pinned.today - UNIX_EPOCH).days)

    @contextmanager
    def _topic_reader(self) -> Iterator[TopicReader | None]:
        """Open the topic; None, and a finding, if no broker answers or the topic may not be read."""
        topic = self._pinned.exchange.settings.topic
        try:
            reader = TopicReader(self._settings.kafka, topic)
        except KafkaError as error:
            text = f"audit incomplete: Kafka's offsets of {topic} are unknown: {error}"
            self._context.add("kafka_unreachable", Severity.UNKNOWN, text, 1, self._pinned)
            yield None
            return
        try:
            self._note_topics(reader)
            yield reader
        finally:
            reader.close()

    def _note_topics(self, reader: TopicReader) -> None:
        ledger = self._pinned.ledgers[BRONZE]
        if reader.topic is None:
            self._note("topic_deleted", f"topic {ledger.topic} no longer exists: checked by the ledgers alone")
        elif not reader.topic.same_as(ledger.topic_id):
            text = (
                f"topic {ledger.topic} was created again; the flow has not started since: checked by the ledgers alone"
            )
            self._note("topic_recreated", text)
        for earlier in ledger.former_topics:
            ends = ", ".join(f"[{p}] before {extent.next}" for p, extent in sorted(earlier.partitions.items()))
            if earlier.topic_id == ledger.topic_id:
                text = (
                    f"the log of {ledger.topic} was replaced; the loss of messages at these ends was accepted: {ends}"
                )
                self._note("log_replaced", text)
                continue
            text = f"an earlier topic {ledger.topic} was deleted; the loss of its messages after {ends} was accepted"
            self._note("topic_recreated", text)

    def _note(self, check: str, text: str) -> None:
        self._context.add(check, Severity.NOTE, text, 1, self._pinned)

    def _planned(self, layer: Layer) -> ReadPlan:
        """Plan what to read of a layer: with `since`, the days that the messages can be in. Check its total."""
        first, last = self._pinned.cutoff_day(layer), None
        if self._context.first_day is not None and compares_rows(layer):
            oldest, last = self._context.store.one("SELECT min(day), max(day) FROM valid")
            first = max(first, oldest or 0)
        elif self._context.first_day is not None:
            first = max(first, self._context.first_day)
        files = self._context.scope.plan(self._pinned, layer, first, last)
        if self._context.whole:
            check_totals(self._context, self._partitions, layer, files.rows + files.skipped_rows)
        return files

    def _audit_files_only(self) -> None:
        """Check the files of layers whose rows no check compares, and say so."""
        for layer in self._pinned.exchange.layers:
            if columns := unchecked(layer):
                files = self._context.scope.plan(self._pinned, layer, self._pinned.cutoff_day(layer))
                for batch in read_checked(self._context, files):
                    nowhere = np.full(batch.num_rows, OUTSIDE)
                    add_sums(self._context, layer, batch, nowhere, np.zeros(batch.num_rows, np.bool_))
                text = f"the audit checks the files of this layer, but not the values of {', '.join(columns)}"
                self._context.add("rows_not_checked", Severity.NOTE, text, files.rows, self._pinned, layer)
