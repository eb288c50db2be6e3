"""Collects the state of the topics and tables for `k2flow status`, the metrics and the report.

It writes nothing, and reads no rows but the reasons of the newest dead letters.
"""

import logging
import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from datetime import UTC, datetime

import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.table import FileScanTask, Table

from k2flow.config.settings import Settings
from k2flow.dedup.cache import read_figures
from k2flow.errors import CatalogError, CommitError, KafkaError, NoBrokerError, one_line
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE, find_table
from k2flow.iceberg.commit import staged_branch
from k2flow.iceberg.deletes import delete_files
from k2flow.iceberg.head import reconcile
from k2flow.iceberg.ledger import Ledger, Writer
from k2flow.iceberg.staging import committed_replacement
from k2flow.inspection.broker import TopicReader
from k2flow.inspection.files import ReadPlan
from k2flow.inspection.files import read as read_columns
from k2flow.layers import BRONZE, CANDLES, CANDLES_TABLE, DLQ, GOLD, GOLD_TABLE, SILVER
from k2flow.maintain.actions import Timing, due_actions, target_bytes
from k2flow.maintain.lease import read_lease
from k2flow.maintain.plans import LiveFile, is_small
from k2flow.status.candles import candles_status
from k2flow.status.flows import (
    TopicState,
    flow_status,
    history,
    hung_transactions,
    layer_status,
    lost_offsets,
    missing_messages,
    open_transactions,
    window_status,
)
from k2flow.status.model import (
    CandlesStatus,
    DeadLetters,
    ExchangeStatus,
    FlowStatus,
    Leader,
    Replacement,
    Status,
    TableStatus,
)
from k2flow.status.tables import dead_letters, files_of, maintenance_done, maintenance_due, rows_since, totals

log = logging.getLogger(__name__)
BROKER_SECONDS = 3.0  # for a broker's first answer
TIMES_SECONDS = 5.0  # for the times of the oldest messages that are in no table yet
FETCH = {"queued.min.messages": "1", "max.partition.fetch.bytes": "65536"}
"""librdkafka's properties for a consumer that needs one message of each partition."""
START_BROKER = "start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS"
HOUR_US, DAY_US = 3_600_000_000, 86_400_000_000
MAX_LETTERS, MAX_LETTER_FILES = 1_000_000, 200
"""Reasons are read of at most this many dead letters, in at most this many files: the newest of the last day."""


@dataclass(frozen=True)
class TableFiles:
    """A table as it is now, and its files of days that maintenance may change, see `recent_files`."""

    table: Table
    files: Sequence[LiveFile]


class StatusCollector:
    """Collects on each call, one call at a time. Manifests and dead letters that cannot have changed are cached."""

    def __init__(
        self, catalog: Catalog, settings: Settings, exchanges: Sequence[Exchange], candles: bool = False
    ) -> None:
        """Take the exchanges, and whether to collect the status of the candles."""
        self._catalog = catalog
        self._settings = settings
        self._exchanges = exchanges
        self._has_candles = candles
        self._layers = {name: layer for each in exchanges for name, layer in each.layer_by_table.items()}
        if candles:
            self._layers |= {GOLD_TABLE: GOLD, CANDLES_TABLE: CANDLES}
        self._manifests: dict[str, dict[str, list[LiveFile]]] = defaultdict(dict)
        self._reasons: dict[str, dict[str, Counter[str]]] = defaultdict(dict)
        self._no_broker: TopicState | None = None

    def collect(self) -> Status:
        """Return the status now. It includes a broker that does not answer, missing and unreadable tables.

        Raises CatalogError if no table can be read, and SettingsError (librdkafka rejects a property).
        """
        began, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        self._no_broker = None
        errors: dict[str, str] = {}
        found: dict[str, TableFiles | None] = {}
        shown: dict[str, TableStatus | None] = {}
        for name in self._layers:
            found[name] = shown[name] = None
            try:
                found[name] = each = self._find(name, now_ms)
                shown[name] = _table(each, now_ms) if each else None
            except Exception as error:  # one table never hides the others
                if isinstance(error, CatalogError) and len(errors) == len(found) - 1 > 0:
                    raise  # the first two failed: it is no fault of one table
                log.debug("%s", name, exc_info=True)
                errors[name] = one_line(error)
        exchanges = {each.name: self._exchange(each, found, errors, now_ms) for each in self._exchanges}
        candles = self._candles(found, errors, now_ms) if self._has_candles else None
        return Status(now_ms, time.monotonic() - began, exchanges, shown, errors, candles)

    def _find(self, name: str, now_ms: int) -> TableFiles | None:
        table = find_table(self._catalog, name)
        if table is None:
            return None
        today = datetime.fromtimestamp(now_ms / 1000, UTC).date()
        return TableFiles(table, files_of(table, self._layers[name].event_time, today, self._manifests[name]))

    def _exchange(
        self, exchange: Exchange, found: Mapping[str, TableFiles | None], errors: Mapping[str, str], now_ms: int
    ) -> ExchangeStatus:
        tables = {layer.name: each for name, layer in exchange.layer_by_table.items() if (each := found[name])}
        s, problems = exchange.settings, _missing(exchange, tables, errors)
        past: dict[str, list[Ledger]] = {}
        replacement = None
        try:
            past = {layer: history(found.table.metadata, exchange.name, s.topic) for layer, found in tables.items()}
            replacement = _replacement(exchange, tables)
        except CommitError as error:
            problems.append(str(error))
        ledgers = {layer: each[-1] for layer, each in past.items()}
        problems += _moved_heads(exchange, tables, ledgers)
        letters = None
        try:
            letters = self._dead_letters(exchange, tables, ledgers, now_ms)
        except Exception as error:
            log.debug("%s", exchange.dlq, exc_info=True)
            problems.append(f"the dead letters cannot be read: {one_line(error)}")
        kafka = self._ask(exchange, ledgers)
        known = {name: layer.name for name, layer in exchange.layer_by_table.items() if layer.name in ledgers}
        layers = {
            layer: layer_status(layer, name, ledgers, past[layer], kafka, s.trigger_seconds, now_ms)
            for name, layer in known.items()
        }
        by_table = {name: ledgers[layer] for name, layer in known.items()}
        window = read_figures(self._settings.cache, exchange.code)
        lost = lost_offsets(by_table, kafka, s.accept_lost_offsets, exchange.setting("accept_lost_offsets"))
        return ExchangeStatus(
            topic=s.topic,
            topic_id=kafka.topic.id if kafka.topic else None,
            trigger_seconds=s.trigger_seconds,
            kafka_problem=kafka.problem,
            flow=_flow(ledgers),
            replacement=replacement,
            layers={layer.name: layers.get(layer.name) for layer in exchange.layers},
            dead_letters=letters,
            open_transactions=open_transactions(kafka, now_ms),
            window=window_status(*window) if window else None,
            problems=(*problems, *lost, *hung_transactions(s.topic, kafka, s.trigger_seconds, now_ms)),
        )

    def _candles(self, found: Mapping[str, TableFiles | None], errors: Mapping[str, str], now_ms: int) -> CandlesStatus:
        names = (GOLD_TABLE, CANDLES_TABLE)
        problems = [f"{NAMESPACE}.{name}: {errors[name]}" for name in names if name in errors]
        gold, candles = (each.table.metadata if (each := found[name]) else None for name in names)
        past: list[Ledger] = []
        try:
            past = history(candles, CANDLES.name, GOLD_TABLE) if candles else []
        except CommitError as error:
            problems.append(str(error))
        if gold is None and candles is not None and GOLD_TABLE not in errors:
            problems.append(
                f"there is no table {NAMESPACE}.{GOLD_TABLE}: start the flow, or run `k2flow tables create`"
            )
        flow, trigger = _flow({CANDLES.name: past[-1]} if past else {}), self._settings.candles_trigger_seconds
        return candles_status(gold, past, flow, trigger, now_ms, problems)

    def _ask(self, exchange: Exchange, ledgers: Mapping[str, Ledger]) -> TopicState:
        """Ask Kafka for an exchange's topic; wait only once for a broker that does not answer."""
        if self._no_broker:
            return self._no_broker
        config, topic = self._settings.kafka, exchange.settings.topic
        try:
            with closing(TopicReader(config, topic, BROKER_SECONDS, FETCH)) as broker:
                if broker.topic is None:
                    setting = exchange.setting("topic")
                    text = f"topic {topic} does not exist on {config['bootstrap.servers']}: create it, or set {setting}"
                    return TopicState(problem=text)
                # First, so that no message that comes in between seems to be of an open transaction.
                log_ends = broker.log_ends(broker.topic.partitions)
                watermarks = broker.watermarks(broker.topic.partitions)
                kafka = TopicState(topic=broker.topic, watermarks=watermarks, log_ends=log_ends)
                if hidden := kafka.stable_ends_before_open_transactions:
                    kafka = replace(kafka, hidden_times=broker.uncommitted_times(hidden, TIMES_SECONDS))
                return replace(kafka, times=broker.times(missing_messages(ledgers, kafka), TIMES_SECONDS))
        except NoBrokerError as error:
            self._no_broker = TopicState(problem=f"{error}: {START_BROKER}")
            return self._no_broker
        except KafkaError as error:
            return TopicState(problem=str(error))

    def _dead_letters(
        self, exchange: Exchange, tables: Mapping[str, TableFiles], ledgers: Mapping[str, Ledger], now_ms: int
    ) -> DeadLetters | None:
        if not {BRONZE.name, SILVER.name, DLQ.name} <= ledgers.keys():
            return None
        now_us = now_ms * 1000
        letters, messages = (rows_since(tables[layer].files, now_us - HOUR_US) for layer in (DLQ.name, BRONZE.name))
        reasons = self._reasons_of(tables[DLQ.name], exchange.dlq, now_us - DAY_US)
        return dead_letters(ledgers[DLQ.name], ledgers[SILVER.name], letters, messages, reasons)

    def _reasons_of(self, dlq: TableFiles, name: str, since_us: int) -> Counter[str]:
        """Count the reasons of the newest dead letters since `since_us` (us since 1970)."""
        recent = [live for live in dlq.files if live.upper is not None and live.upper >= since_us]
        cached, complete = self._reasons[name], dict[str, Counter[str]]()
        total = Counter[str]()
        for live in sorted(recent, key=lambda live: live.upper or 0, reverse=True)[:MAX_LETTER_FILES]:
            path = live.file.file_path
            counts = cached.get(path) or _reasons(dlq.table, live, since_us, MAX_LETTERS - total.total())
            total += counts
            if counts.total() == live.file.record_count and live.lower is not None and live.lower >= since_us:
                complete[path] = counts
            if total.total() >= MAX_LETTERS:
                break
        self._reasons[name] = complete
        return total


def _reasons(table: Table, live: LiveFile, since_us: int, limit: int) -> Counter[str]:
    """Count the reasons of at most `limit` dead letters in a file that failed since `since_us`."""
    counts = Counter[str]()
    plan = ReadPlan(DLQ, table, [FileScanTask(live.file)], 0)
    for rows in read_columns(plan, ["reason", "failed_at"], None, lambda _: None):
        recent = rows.filter(pc.greater_equal(pc.cast(rows.column("failed_at"), "int64"), since_us))
        for each in pc.value_counts(recent.column("reason").slice(0, limit - counts.total())).to_pylist():
            counts[each["values"]] += each["counts"]
        if counts.total() >= limit:
            break
    return counts


def _missing(exchange: Exchange, tables: Mapping[str, TableFiles], errors: Mapping[str, str]) -> list[str]:
    how = f"start the flow, or run `k2flow tables create {exchange.name}`"
    unread = [f"{NAMESPACE}.{name}: {text}" for name, text in errors.items() if name in exchange.layer_by_table]
    if not unread and not tables.keys() - {GOLD.name}:
        return [f"there are no tables yet: {how}"]
    absent = [name for name, layer in exchange.layer_by_table.items() if layer.name not in tables]
    missing = [f"{NAMESPACE}.{name}" for name in absent if name not in errors]
    return unread + ([f"there is no table {' and no table '.join(missing)}: {how}"] if missing else [])


def _moved_heads(exchange: Exchange, tables: Mapping[str, TableFiles], ledgers: Mapping[str, Ledger]) -> list[str]:
    """Return the errors with which the flow would refuse a table whose head was moved."""
    problems = []
    for layer, ledger in ledgers.items():
        table = tables[layer].table
        try:
            reconcile(table.name()[-1], table.metadata, exchange.name, ledger)
        except CommitError as error:
            problems.append(str(error))
    return problems


def _replacement(exchange: Exchange, tables: Mapping[str, TableFiles]) -> Replacement | None:
    """Return the replacement of rows under way, if there is one. Raises CommitError."""
    committed = committed_replacement(tables[BRONZE.name].table.properties, exchange) if BRONZE.name in tables else None
    if committed:
        return Replacement(committed.what, committed=True)
    branches = [staged_branch(tables[layer].table) for layer in (SILVER.name, DLQ.name) if layer in tables]
    return next((Replacement(branch, committed=False) for branch in branches if branch), None)


def _flow(ledgers: Mapping[str, Ledger]) -> FlowStatus:
    here = socket.gethostname()
    writers = {ledger.writer for ledger in ledgers.values() if ledger.writer}
    running = {writer: writer.running_here() if writer.host == here else None for writer in writers}
    return flow_status(ledgers.values(), running)


def _table(found: TableFiles, now_ms: int) -> TableStatus:
    table, target = found.table, target_bytes(found.table)
    return TableStatus(
        **vars(totals(table.current_snapshot(), delete_files(table, table.current_snapshot()))),
        small_files=sum(is_small(live, target) for live in found.files),
        snapshots=len(table.metadata.snapshots),
        due=maintenance_due(due_actions(table, found.files, Timing(clock=lambda: now_ms / 1000))),
        maintained=maintenance_done(table.metadata),
        leader=_leader(table, now_ms),
    )


def _leader(table: Table, now_ms: int) -> Leader | None:
    """Return the holder of a table's lease. A process of this host that no longer runs holds none."""
    holder, until = read_lease(table.name()[-1], table.properties)
    if holder is None or until * 1000 <= now_ms:
        return None
    runs = holder == Writer.this() or holder.running_here() or holder.host != socket.gethostname()
    return Leader(**vars(holder), until=int(until * 1000)) if runs else None
