"""One audit from beginning to end."""

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from datetime import UTC, date, datetime

import numpy as np
from pyiceberg.catalog import Catalog

from k2flow.audit.bronze import BronzeReader
from k2flow.audit.file_checks import FileChecks
from k2flow.audit.gold import Gold
from k2flow.audit.layers import Layers
from k2flow.audit.ledgers import check_ledgers, check_totals
from k2flow.audit.offsets import Offsets, Retention, midnight_ms
from k2flow.audit.report import Report, Severity
from k2flow.config.settings import Settings
from k2flow.errors import AuditError, KafkaError
from k2flow.exchange import Exchange
from k2flow.inspection.broker import Broker, Reread
from k2flow.inspection.files import Plan, plan
from k2flow.inspection.partitions import Part, Parts
from k2flow.inspection.pinned import LAYERS, PinnedTables, pin
from k2flow.inspection.progress import Progress
from k2flow.inspection.row_hashes import Store, open_store
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.registry import open_schemas

_ALWAYS = (date.min - date(1970, 1, 1)).days


def audit(
    catalog: Catalog,
    settings: Settings,
    exchanges: Sequence[Exchange],
    since: datetime | None = None,
    progress: Progress = lambda name, more, total: None,
) -> Report:
    """Checks the conservation law of `exchanges` on one set of snapshots, taken now; flows may go on meanwhile.

    With `since` (an aware datetime) only the Bronze rows ingested from then on and what came of them: what Silver and
    Gold have beyond that, and what the ledgers count in all, is not looked at.

    Memory is bounded, whatever the tables hold; the hashes take about 60 bytes of disk a message. A broker that is out
    of reach is a finding, since the ledgers prove most of it. Raises AuditError, CatalogError, CommitError (an
    unreadable ledger), RegistryError, SettingsError: then nothing was proved.
    """
    began = time.monotonic()
    report = Report(datetime.now(UTC).isoformat(), since.isoformat() if since else None)
    pinned, absent = pin(catalog, exchanges)
    if not pinned:
        names = ", ".join(exchange.name for exchange in exchanges)
        raise AuditError(f"there are no tables of {names} to audit: run `k2flow tables create`, or a flow")
    for exchange in absent:
        report.add("absent", Severity.NOTE, f"there are no tables of {exchange.name}", 1, exchange.name)
    with open_store() as store:
        run = _Run(store, report, settings, since, progress)
        run.audit(pinned)
    report.seconds = time.monotonic() - began
    return report


class _Run:
    def __init__(
        self, store: Store, report: Report, settings: Settings, since: datetime | None, progress: Progress
    ) -> None:
        self._store = store
        self._report = report
        self._settings = settings
        self._since = since
        self._progress = progress

    def audit(self, pinned: list[PinnedTables]) -> None:
        parts: dict[int, Parts] = {}
        number = 0
        for each in pinned:
            parts[each.number] = own = Parts(each, number)
            number += len(list(own))
            self._audit_layers(each, own)
        self._audit_gold(pinned, parts)
        for each in pinned:
            self._describe(each, parts[each.number])

    def _audit_layers(self, pinned: PinnedTables, parts: Parts) -> None:
        """Everything about Bronze, Silver, the dead letters and their ledgers."""
        bronze = plan(pinned, "bronze", pinned.cutoff_day("bronze"))
        if self._since is not None:
            bronze = plan(pinned, "bronze", max(pinned.cutoff_day("bronze"), _day(self._since)))
        do_not_wait = threading.Event()
        do_not_wait.set()  # for a registry that is out of reach: an audit says so and ends
        decoder = TradeDecoder(pinned.exchange, open_schemas(self._settings, do_not_wait))
        reader = BronzeReader(parts, decoder, self._store, pinned.exchange.settings.topic, self._since)
        checks = FileChecks(bronze)
        reader.read(bronze, checks, self._advance(pinned, bronze))
        checks.report(self._report)
        reader.report(self._report, pinned.exchange.name, pinned.name("bronze"))
        self._check_offsets(pinned, parts, bronze, reader)
        self._number_parts(pinned, parts)
        layers = Layers(self._store, self._report, pinned, parts)
        for layer, read in (("dlq", layers.read_dlq), ("silver", layers.read_silver)):
            own = self._plan(pinned, layer)
            checks = FileChecks(own)
            read(own, checks, self._advance(pinned, own))
            checks.report(self._report)
            if self._since is None:
                check_totals(self._report, pinned, list(parts), layer, own.rows + own.skipped_rows)
        layers.check(self._since is None)
        check_ledgers(self._store, self._report, list(parts), self._since is None)

    def _check_offsets(self, pinned: PinnedTables, parts: Parts, bronze: Plan, reader: BronzeReader) -> None:
        cutoff = pinned.cutoff_day("bronze")
        first_day = bronze.first_day
        evident = bronze.skipped_rows > 0 or (first_day is not None and first_day <= cutoff + 1)
        retention = Retention(not pinned.too_young_to_expire("bronze"), evident, midnight_ms(cutoff))
        today = (pinned.today - date(1970, 1, 1)).days

        def take(part: Part, reread: Reread) -> None:
            values, times = reread.columns()
            offsets = np.array(reread.offset, np.int64)
            reader.store(reader.decode(np.full(len(offsets), part.number), offsets, values, times), today)

        offsets = Offsets(self._store, self._report, retention, self._since is not None, take)
        broker = self._open_broker(pinned)
        if broker is None:
            offsets.check(list(parts), None)
            return
        with closing(broker):
            self._note_recreated(pinned, broker)
            offsets.check(list(parts), broker)

    def _open_broker(self, pinned: PinnedTables) -> Broker | None:
        name, topic = pinned.exchange.name, pinned.exchange.settings.topic
        try:
            return Broker(self._settings.kafka, topic)
        except KafkaError as error:
            text = f"Kafka's own offsets of {topic} could not be looked at: {error}"
            self._report.add("kafka_unreachable", Severity.UNKNOWN, text, 1, name)
            return None

    def _note_recreated(self, pinned: PinnedTables, broker: Broker) -> None:
        name, ledger = pinned.exchange.name, pinned.ledgers["bronze"]
        if broker.topic is None:
            text = f"topic {ledger.topic} does not exist any more: checked by the ledgers alone"
            self._report.add("topic_gone", Severity.NOTE, text, 1, name)
        elif not broker.topic.same_as(ledger.topic_id):
            text = f"topic {ledger.topic} was made again, the flow has not started since: checked by the ledgers alone"
            self._report.add("topic_made_again", Severity.NOTE, text, 1, name)
        for earlier in ledger.earlier:
            ends = ", ".join(f"[{p}] before {extent.next}" for p, extent in sorted(earlier.partitions.items()))
            text = f"an earlier topic {ledger.topic} was deleted, and the loss of what it had beyond {ends} accepted"
            self._report.add("topic_made_again", Severity.NOTE, text, 1, name)

    def _number_parts(self, pinned: PinnedTables, parts: Parts) -> None:
        for part in parts:
            for layer in LAYERS:
                extent = part.extent(layer)
                self._store.run(
                    "INSERT INTO parts VALUES (?, ?, ?, ?, ?)",
                    [part.number, pinned.number, layer, extent.first, extent.next],
                )

    def _plan(self, pinned: PinnedTables, layer: str) -> Plan:
        """What to read of Silver or the dead letters: with `since` the days that the messages can be in."""
        first, last = pinned.cutoff_day(layer), None
        if self._since is not None and layer == "silver":
            days = self._store.one("SELECT min(day), max(day) FROM valid")
            first, last = max(first, days[0] or 0), days[1]
        elif self._since is not None:
            first = max(first, _day(self._since))
        return plan(pinned, layer, first, last)

    def _audit_gold(self, pinned: list[PinnedTables], parts: dict[int, Parts]) -> None:
        gold = Gold(self._store, self._report, pinned)
        first = _ALWAYS
        if self._since is not None:
            window = max(each.exchange.settings.dedup_window_hours for each in pinned)
            (day,) = self._store.one("SELECT min(day) FROM valid")
            first = _day(self._since) if day is None else day - window // 24 - 1
        own = plan(pinned[0], "gold", first)
        checks = FileChecks(own)
        gold.read(own, checks, self._advance(pinned[0], own))
        checks.report(self._report)
        gold.check_ids()
        for each in pinned:
            if self._since is None:
                (rows,) = self._store.one("SELECT count(*) FROM gold WHERE exchange = ?", [each.number])
                check_totals(self._report, each, list(parts[each.number]), "gold", rows)
            gold.check_silver(each, self._since is None)

    def _advance(self, pinned: PinnedTables, own: Plan) -> Callable[[int], None]:
        name, total = pinned.name(own.layer), own.rows
        self._progress(name, 0, total)

        def advance(rows: int) -> None:
            self._report.rows += rows
            self._progress(name, rows, total)

        return advance

    def _describe(self, pinned: PinnedTables, parts: Parts) -> None:
        """What the report says of the tables and of each partition."""
        for layer in LAYERS:
            table = pinned.tables[layer]
            snapshot = table.current_snapshot()
            summary = snapshot.summary.additional_properties if snapshot and snapshot.summary else {}
            self._report.tables[pinned.name(layer)] = {
                "snapshot_id": snapshot.snapshot_id if snapshot else None,
                "metadata": table.metadata_location,
                "rows": int(summary.get("total-records", 0)),
            }
        for part in parts:
            low, high = part.kafka or (0, 0)
            lag = max(0, high - part.extent("bronze").next)
            extents = {
                layer: {"first": e.first, "next": e.next, "rows": e.rows} if (e := part.extents.get(layer)) else None
                for layer in LAYERS
            }
            self._report.partitions.append(
                {
                    "exchange": pinned.exchange.name,
                    "topic": part.topic,
                    "topic_id": part.topic_id,
                    "partition": part.partition,
                    "current": part.current,
                    "kafka": {"low": low, "high": high, "lag": lag} if part.kafka else None,
                    "missing": part.missing,
                    "doubled": part.doubled,
                    **extents,
                }
            )


def _day(moment: datetime) -> int:
    """The day (UTC, since 1970) of a moment."""
    return (moment.astimezone(UTC).date() - date(1970, 1, 1)).days
