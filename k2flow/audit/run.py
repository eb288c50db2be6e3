"""One audit, from start to end."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime

from pyiceberg.catalog import Catalog

from k2flow.audit.context import AuditContext
from k2flow.audit.database import TradeHashes
from k2flow.audit.exchange_audit import ExchangeAudit
from k2flow.audit.gold import GoldKeyCheck, GoldRowCheck
from k2flow.audit.ledgers import check_totals
from k2flow.audit.offsets import OffsetsFound
from k2flow.audit.report import AuditReport, Severity
from k2flow.config.settings import Settings
from k2flow.errors import AuditError
from k2flow.exchange import Exchange
from k2flow.inspection.files import Progress, plan
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.pinned import FIRST_DAY, PinnedTables, pin
from k2flow.inspection.row_hashes import open_row_hashes
from k2flow.layers import BRONZE, GOLD


def audit(
    catalog: Catalog,
    settings: Settings,
    exchanges: Sequence[Exchange],
    since: datetime | None = None,
    progress: Progress = lambda name, more, total: None,
) -> AuditReport:
    """Check all invariants of `exchanges` on one set of snapshots, taken now. Flows may continue meanwhile.

    Memory is bounded, whatever the tables hold; the hashes take about 60 bytes of disk per message. A broker that does
    not answer is a finding, since the ledgers prove most of it.

    Raises AuditError if there are no tables or they cannot be read, CommitError if a ledger is unreadable,
    CatalogError, RegistryError or SettingsError. After each of these, nothing was proved.

    Args:
        catalog: The catalog with the tables.
        settings: Where Kafka and the registry are.
        exchanges: The exchanges to audit.
        since: An aware datetime. Only check the Bronze rows ingested from then on, and their rows in the other tables.
            Other rows of Silver and Gold, and the ledgers' totals, are not checked.
        progress: Reports the rows read.
    """
    began = time.monotonic()
    report = AuditReport(datetime.now(UTC).isoformat(), since.isoformat() if since else None)
    pinned, absent = pin(catalog, exchanges)
    if not pinned:
        names = ", ".join(exchange.name for exchange in exchanges)
        raise AuditError(f"{names}: no tables to audit; run `k2flow tables create`, or a flow")
    for exchange in absent:
        report.add("absent", Severity.NOTE, f"there are no tables of {exchange.name}", 1, exchange.name)
    hashes = TradeHashes([each.exchange for each in pinned])
    with open_row_hashes(hashes.schema) as store:
        context = AuditContext(store=store, hashes=hashes, report=report, since=since, progress=progress)
        offsets: dict[TopicPartitions, Mapping[TopicPartition, OffsetsFound]] = {}
        for each in pinned:
            partitions = TopicPartitions(each, first_number=sum(map(len, offsets)))
            offsets[partitions] = ExchangeAudit(context, settings, partitions).run()
        _audit_gold(context, list(offsets))
    for partitions, found in offsets.items():
        _describe(report, partitions.pinned, found)
    report.seconds = round(time.monotonic() - began, 3)
    return report


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
        GoldRowCheck(context, each.pinned).check()


def _describe(report: AuditReport, pinned: PinnedTables, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
    """Add an exchange's tables and partitions to the report."""
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
