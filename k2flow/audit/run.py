"""One audit, from start to end."""

import logging
import secrets
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime

from pyiceberg.catalog import Catalog

from k2flow.audit.candles import ProvenHours, audit_candles
from k2flow.audit.context import AuditContext
from k2flow.audit.database import TradeHashes
from k2flow.audit.exchange_audit import ExchangeAudit
from k2flow.audit.gold import GoldKeyCheck, check_gold_rows
from k2flow.audit.gold_changes import check_gold_changes
from k2flow.audit.ledgers import check_totals
from k2flow.audit.offsets import OffsetsFound
from k2flow.audit.proof import HOUR_SECONDS, DroppedProofError, NotProvenError, Proof, ProofStore, open_proofs
from k2flow.audit.proving import bronze_holds_all, made_for, next_proof
from k2flow.audit.report import AuditReport, Reading, Severity, Verdict
from k2flow.audit.scope import Scope
from k2flow.audit.sums import check_sample
from k2flow.config.settings import Settings
from k2flow.errors import AuditError, CatalogError, CommitError, DataFileError, SettingsError, one_line
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import find_table
from k2flow.iceberg.dedup_key import key_problem, recorded_key
from k2flow.inspection.files import Progress, ReadPlan
from k2flow.inspection.partitions import TopicPartition, TopicPartitions
from k2flow.inspection.pinned import FIRST_DAY, PinnedTables, pin
from k2flow.inspection.row_hashes import open_row_hashes
from k2flow.layers import BRONZE, CANDLES_TABLE, GOLD, GOLD_TABLE

log = logging.getLogger(__name__)
SAMPLE = 0.01
"""The share of proven files that an incremental audit reads again."""
FOLDER = "audit"
OUTAGES = (CatalogError, CommitError, SettingsError)
"""Errors that say nothing about a table: the audit ends with them."""
NOT_YET = frozenset({"kafka_unreachable", "schema_unknown", "kafka_damaged"})
"""What leaves an audit incomplete, however much it reads."""
Offsets = dict[TopicPartitions, Mapping[TopicPartition, OffsetsFound]]


def audit(
    catalog: Catalog,
    settings: Settings,
    exchanges: Sequence[Exchange],
    since: datetime | None = None,
    progress: Progress = lambda name, more, total: None,
    *,
    full: bool = False,
    sample: float = SAMPLE,
    seed: int | None = None,
) -> AuditReport:
    """Check all invariants of `exchanges` on one set of snapshots, taken now. Flows may continue meanwhile.

    An incremental audit reads the files that are new since the last one, and a random share `sample` of the others:
    k2flow.audit.scope. Where they do not add up, where nothing was proven before, or with `full`, everything is read.
    `seed` chooses the sample; None: a new one.

    Memory is bounded, however many messages the tables hold: the database takes MEMORY_MB and what it frees, and one
    file is read at a time, in small batches. The hashes take about 70 bytes of disk per message that is read. A broker
    that does not answer is a finding, since the ledgers prove most of it. `progress` takes the number of rows read.

    `since` (aware): check only the Bronze rows ingested from then on, and their rows in the other tables. Other rows of
    Silver and Gold, and the ledgers' totals, are not checked. Nothing is kept for later audits.

    The candles are checked last, see `candles`. A table that cannot be read is a finding; the others are audited.

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
    run = _Run(settings, [_by_recorded_key(each, report) for each in pinned], progress)
    if since is not None:
        report.reading = Reading.SINCE
        run.read(report, since=since)
        _audit_candles(catalog, report, progress, first_hour=int(since.timestamp() // HOUR_SECONDS))
    else:
        folder = settings.cache / FOLDER / "+".join(each.exchange.name for each in pinned)
        with open_proofs(folder) as store:
            report = run.incremental(report, store, sample, seed, full)
            _audit_candles(catalog, report, progress, None if isinstance(store, str) else store, sample)
    report.seconds = round(time.monotonic() - began, 3)
    return report


class _Run:
    """Audits one set of pinned tables: the new files first, everything if they do not add up."""

    def __init__(self, settings: Settings, pinned: Sequence[PinnedTables], progress: Progress) -> None:
        self._settings = settings
        self._pinned = pinned
        self._progress = progress

    def incremental(
        self, report: AuditReport, store: ProofStore | str, sample: float, seed: int | None, full: bool
    ) -> AuditReport:
        """Audit what the store's proof does not have, or everything. Keep the proof if all invariants hold."""
        if isinstance(store, str):
            report.why_full = store
            report.add("proof_unavailable", Severity.NOTE, f"{store}: this audit and the next one read everything")
            self.read(report)
            return report
        report.last_full = store.last_full()
        try:
            if full:
                raise NotProvenError("--full")
            proof = store.load(made_for(self._settings, self._pinned))
            found = replace(report, findings=list(report.findings), reading=Reading.INCREMENTAL)
            found.proven_rows = proof.rows
            found.seed = secrets.randbelow(2**32) if seed is None else seed
            self.read(found, store, proof, sample=sample)
            return found
        except OUTAGES:
            raise
        except DroppedProofError as error:
            report.why_full = str(error)
            report.add("proof_dropped", Severity.NOTE, f"{error}: everything is read")
        except Exception as error:  # whatever it is: the full audit names it
            log.debug("incremental audit", exc_info=True)
            report.why_full = str(error) if isinstance(error, NotProvenError) else one_line(error)
        self.read(report, store)
        return report

    def read(
        self,
        report: AuditReport,
        store: ProofStore | None = None,
        proof: Proof | None = None,
        since: datetime | None = None,
        sample: float = 0.0,
    ) -> None:
        """Audit what `proof` does not have; None: everything. Raises NotProvenError if a proof does not add up."""
        hashes = TradeHashes([each.exchange for each in self._pinned])
        with open_row_hashes(hashes.schema) as database:
            context = AuditContext(
                store=database, hashes=hashes, report=report, since=since, progress=self._progress, scope=Scope(proof)
            )
            offsets = self._exchanges(context)
            if offsets:
                self._gold(context, list(offsets), store)
            for partitions, found in offsets.items():
                _describe(report, partitions.pinned, found)
            if proof:
                _check_findings(report)
                self._sample(context, sample)
            if store and report.verdict is Verdict.HOLDS:
                self._keep(context, list(offsets), store)

    def _exchanges(self, context: AuditContext) -> Offsets:
        offsets: Offsets = {}
        numbered = 0
        for each in self._pinned:
            partitions = TopicPartitions(each, first_number=numbered)
            numbered += len(partitions)
            context.scope.limit(partitions)
            try:
                offsets[partitions] = ExchangeAudit(context, self._settings, partitions).run()
            except OUTAGES:
                raise
            except Exception as error:  # whatever its tables hold, the other exchanges are audited
                if context.scope.proof:
                    raise
                log.debug("%s", each.exchange.name, exc_info=True)
                context.report.add("unreadable", Severity.UNKNOWN, one_line(error), 1, each.exchange.name)
        return offsets

    def _gold(self, context: AuditContext, exchanges: Sequence[TopicPartitions], store: ProofStore | None) -> None:
        try:
            _audit_gold(context, exchanges, store)
        except OUTAGES:
            raise
        except Exception as error:
            if context.scope.proof:
                raise
            log.debug("%s", GOLD_TABLE, exc_info=True)
            context.report.add("unreadable", Severity.UNKNOWN, one_line(error), table=GOLD_TABLE)

    def _sample(self, context: AuditContext, share: float) -> None:
        """Read a share of the proven files again. Raises NotProvenError if one has other rows."""
        for scope, tasks in context.scope.sample(share, context.report.seed or 0):
            check_sample(context, scope, ReadPlan(scope.layer, scope.pinned.tables[scope.layer], tasks, 0))
            context.report.sampled_files += len(tasks)
        _check_findings(context.report)

    def _keep(self, context: AuditContext, exchanges: Sequence[TopicPartitions], store: ProofStore) -> None:
        if not bronze_holds_all(exchanges):
            return  # Bronze's rows of messages that other tables hold already are yet to be compared with them
        try:
            proof = next_proof(context, self._settings, exchanges, store)
            store.save(proof)
        except OSError as error:
            store.undo()
            text = f"what was proven cannot be kept ({error}): the next audit reads it again"
            context.report.add("proof_not_kept", Severity.NOTE, text)
            return
        context.report.last_full = datetime.fromtimestamp(proof.full_at, UTC).isoformat()


def _check_findings(report: AuditReport) -> None:
    """Raise NotProvenError if there is a finding that reading everything may show better."""
    for finding in report.findings:
        if finding.severity is Severity.BROKEN or (
            finding.severity is Severity.UNKNOWN and finding.check not in NOT_YET
        ):
            raise NotProvenError(f"{finding.check}: {finding.text}")


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


def _by_recorded_key(pinned: PinnedTables, report: AuditReport) -> PinnedTables:
    """Return the tables with the key of Gold's rows, and report (`gold_key`) if the exchange declares another."""
    gold, exchange = pinned.tables[GOLD].properties, pinned.exchange
    recorded = recorded_key(gold, exchange.name)
    if recorded and (problem := key_problem(gold, exchange)):
        report.add("gold_key", Severity.BROKEN, problem, 1, exchange.name, GOLD_TABLE)
        with suppress(SettingsError):  # another program has written the property
            return replace(pinned, exchange=replace(exchange, dedup_key=recorded))
    return pinned


def _audit_gold(context: AuditContext, exchanges: Sequence[TopicPartitions], store: ProofStore | None) -> None:
    pinned, first = [each.pinned for each in exchanges], FIRST_DAY
    if context.first_day is not None:
        window = max(each.exchange.settings.dedup_window_hours for each in pinned)
        (day,) = context.store.one("SELECT min(day) FROM valid")
        first = context.first_day if day is None else day - window // 24 - 1
    keys = GoldKeyCheck(context, pinned)
    keys.read(context.scope.plan(pinned[0], GOLD, first))
    keys.check()
    if context.scope.proof and store:
        check_gold_changes(context, context.scope.proof, store, keys, pinned)
        return
    for each in exchanges:
        if context.whole:
            rows = context.store.count(f"FROM gold WHERE exchange = {each.pinned.number}")
            check_totals(context, each, GOLD, rows)
        check_gold_rows(context, each.pinned)


def _audit_candles(
    catalog: Catalog,
    report: AuditReport,
    progress: Progress,
    store: ProofStore | None = None,
    sample: float = 0.0,
    first_hour: int | None = None,
) -> None:
    """Check the candles: an incremental audit those of hours that changed. They have a proof of their own."""
    known = store.load_candles() if store and report.reading is Reading.INCREMENTAL else {}
    try:
        right = audit_candles(catalog, report, progress, ProvenHours(known, sample, report.seed), first_hour)
    except OUTAGES:
        raise
    except Exception as error:
        log.debug("%s", CANDLES_TABLE, exc_info=True)
        report.add("unreadable", Severity.UNKNOWN, one_line(error), table=CANDLES_TABLE)
        return
    try:
        if store:
            store.save_candles(right)
    except OSError as error:
        text = f"what was proven of the candles cannot be kept ({error}): the next audit reads it again"
        report.add("proof_not_kept", Severity.NOTE, text, table=CANDLES_TABLE)


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
