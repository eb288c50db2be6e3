"""One audit, from start to end."""

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime

from pyiceberg.catalog import Catalog

from k2flow.audit.bronze import BronzeReader, MessageHasher, compare_with_kafka
from k2flow.audit.context import AuditContext
from k2flow.audit.coverage import compares_rows, unchecked
from k2flow.audit.database import TradeHashes, store_extents
from k2flow.audit.dead_letters import DeadLetterCheck
from k2flow.audit.file_checks import read_checked
from k2flow.audit.gold import GoldKeyCheck, check_gold_rows
from k2flow.audit.ledgers import check_head, check_ledgers, check_totals
from k2flow.audit.offsets import OffsetCheck, OffsetsFound, Retention
from k2flow.audit.report import AuditReport, Severity
from k2flow.audit.schemas import SchemaCheck
from k2flow.audit.trades import TradesCheck
from k2flow.config.settings import Settings
from k2flow.errors import AuditError, CatalogError, CommitError, DataFileError, KafkaError, SettingsError, one_line
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import find_table
from k2flow.inspection.broker import MessagesRead, TopicReader
from k2flow.inspection.files import Progress, ReadPlan, plan
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.pinned import FIRST_DAY, UNIX_EPOCH, PinnedTables, pin
from k2flow.inspection.row_hashes import open_row_hashes
from k2flow.layers import BRONZE, DLQ, GOLD, GOLD_TABLE, Layer
from k2flow.trades.stored_schemas import StoredSchemas

log = logging.getLogger(__name__)
DAY_MS = 86_400_000
OUTAGES = (CatalogError, CommitError, SettingsError)
"""Errors that say nothing about a table: the audit ends with them."""


def audit(
    catalog: Catalog,
    settings: Settings,
    exchanges: Sequence[Exchange],
    since: datetime | None = None,
    progress: Progress = lambda name, more, total: None,
) -> AuditReport:
    """Check all invariants of `exchanges` on one set of snapshots, taken now. Flows may continue meanwhile.

    Memory is bounded, whatever the tables hold; the hashes take about 60 bytes of disk per message. A broker that does
    not answer is a finding, since the ledgers prove most of it. `progress` takes the number of rows read.

    `since` (aware): check only the Bronze rows ingested from then on, and their rows in the other tables. Other rows of
    Silver and Gold, and the ledgers' totals, are not checked.

    A table that cannot be read is a finding; the others are audited.

    Raises AuditError if there are no tables, CommitError if a ledger is unreadable,
    CatalogError or SettingsError. After each of these, nothing was proved.
    """
    began = time.monotonic()
    report = AuditReport(datetime.now(UTC).isoformat(), since.isoformat() if since else None)
    pinned, absent = pin(catalog, _readable(catalog, exchanges, report))
    if not pinned and report.findings:
        raise AuditError("; ".join(finding.text for finding in report.findings))
    if not pinned:
        names = ", ".join(exchange.name for exchange in exchanges)
        raise AuditError(f"{names}: no tables to audit; run `k2flow tables create`, or a flow")
    for exchange in absent:
        report.add("absent", Severity.NOTE, f"there are no tables of {exchange.name}", 1, exchange.name)
    hashes = TradeHashes([each.exchange for each in pinned])
    with open_row_hashes(hashes.schema) as store:
        context = AuditContext(store=store, hashes=hashes, report=report, since=since, progress=progress)
        offsets: dict[TopicPartitions, Mapping[TopicPartition, OffsetsFound]] = {}
        numbered = 0
        for each in pinned:
            partitions = TopicPartitions(each, first_number=numbered)
            numbered += len(partitions)
            try:
                offsets[partitions] = ExchangeAudit(context, settings, partitions).run()
            except OUTAGES:
                raise
            except Exception as error:  # whatever its tables hold, the other exchanges are audited
                log.debug("%s", each.exchange.name, exc_info=True)
                report.add("unreadable", Severity.UNKNOWN, one_line(error), 1, each.exchange.name)
        if offsets:
            try:
                _audit_gold(context, list(offsets))
            except OUTAGES:
                raise
            except Exception as error:
                log.debug("%s", GOLD_TABLE, exc_info=True)
                report.add("unreadable", Severity.UNKNOWN, one_line(error), table=GOLD_TABLE)
    for partitions, found in offsets.items():
        _describe(report, partitions.pinned, found)
    report.seconds = round(time.monotonic() - began, 3)
    return report


def _readable(catalog: Catalog, exchanges: Sequence[Exchange], report: AuditReport) -> list[Exchange]:
    """Return the exchanges whose tables can all be loaded, and report the others."""
    readable = []
    for exchange in exchanges:
        try:
            for name in exchange.tables:
                find_table(catalog, name)
            readable.append(exchange)
        except DataFileError as error:
            report.add("unreadable", Severity.UNKNOWN, str(error), 1, exchange.name)
    return readable


def _audit_gold(context: AuditContext, exchanges: Sequence[TopicPartitions]) -> None:
    pinned, first = [each.pinned for each in exchanges], FIRST_DAY
    if context.first_day is not None:
        window = max(each.exchange.settings.dedup_window_hours for each in pinned)
        (day,) = context.store.one("SELECT min(day) FROM valid")
        first = context.first_day if day is None else day - window // 24 - 1
    keys = GoldKeyCheck(context, pinned)
    keys.read(plan(pinned[0], GOLD, first))
    keys.check()
    for each in exchanges:
        if context.whole:
            rows = context.store.count(f"FROM gold WHERE exchange = {each.pinned.number}")
            check_totals(context, each, GOLD, rows)
        check_gold_rows(context, each.pinned)


def _describe(report: AuditReport, pinned: PinnedTables, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
    layers = pinned.exchange.layers
    report.layers = list(dict.fromkeys((*report.layers, *(layer.name for layer in layers))))
    for layer in layers:
        snapshot = pinned.tables[layer].current_snapshot()
        summary = snapshot.summary.additional_properties if snapshot and snapshot.summary else {}
        report.tables[pinned.name(layer)] = {
            "snapshot_id": snapshot.snapshot_id if snapshot else None,
            "metadata": pinned.tables[layer].metadata_location,
            "rows": int(summary.get("total-records", 0)),
        }
    for partition, found in offsets.items():
        report.partitions.append(
            {
                "exchange": pinned.exchange.name,
                "topic": partition.topic,
                "topic_id": partition.topic_id,
                "partition": partition.partition,
                "current": partition.current,
                "kafka": _kafka(partition, found),
                "missing": found.missing,
                "duplicated": found.duplicated,
                **{layer.name: asdict(e) if (e := partition.extents.get(layer)) else None for layer in layers},
            }
        )


def _kafka(partition: TopicPartition, found: OffsetsFound) -> dict[str, int] | None:
    if found.kafka is None:
        return None
    low, high = found.kafka
    return {"low": low, "high": high, "lag": max(0, high - partition.extent(BRONZE).next)}


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
        files = plan(self._pinned, BRONZE, first)
        BronzeReader(self._context, self._partitions, self._hasher).read(files)
        retention = Retention(
            possible=not self._pinned.created_after_cutoff(BRONZE),
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
        files = plan(self._pinned, layer, first, last)
        if self._context.whole:
            check_totals(self._context, self._partitions, layer, files.rows + files.skipped_rows)
        return files

    def _audit_files_only(self) -> None:
        """Check the files of layers whose rows no check compares, and say so."""
        for layer in self._pinned.exchange.layers:
            if columns := unchecked(layer):
                files = plan(self._pinned, layer, self._pinned.cutoff_day(layer))
                for _ in read_checked(self._context, files):
                    pass
                text = f"the audit checks the files of this layer, but not the values of {', '.join(columns)}"
                self._context.add("rows_not_checked", Severity.NOTE, text, files.rows, self._pinned, layer)
