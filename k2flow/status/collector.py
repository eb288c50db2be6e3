"""Looks at Kafka and at the tables, for who tells how the flows do.

It writes nothing, and reads no rows but the reasons of the newest dead letters.
"""

import socket
import time
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace

import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.table import FileScanTask, Table

from k2flow.config.settings import PREFIX, Settings
from k2flow.errors import CommitError, KafkaError, NoBrokerError, TableDiffersError
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, find_table
from k2flow.iceberg.ledger import Ledger, Writer
from k2flow.iceberg.rewrite import staged_branch
from k2flow.iceberg.staging import decided
from k2flow.inspection.broker import Broker
from k2flow.inspection.files import Plan
from k2flow.inspection.files import read as read_columns
from k2flow.inspection.pinned import LAYERS, table_name
from k2flow.maintain.entries import LiveFile, live_files
from k2flow.maintain.lease import lease
from k2flow.maintain.plans import is_small
from k2flow.maintain.run import Timing, due, target_bytes
from k2flow.status.flows import flow_status, history, layer_status, lost_offsets, missing_messages
from k2flow.status.report import DeadLetters, Flow, Kafka, Replacing, Status
from k2flow.status.report import Exchange as ExchangeStatus
from k2flow.status.report import Table as TableStatus
from k2flow.status.tables import dead_letters, last_maintained, rows_since, summed, totals

BROKER_SECONDS = 3.0
"""How long a broker has to answer."""
TIMES_SECONDS = 5.0
"""How long it has to give the oldest messages that are in no table yet."""
FETCH = {"queued.min.messages": "1", "max.partition.fetch.bytes": "65536"}
"""librdkafka's properties for who wants one message of each partition."""
START_ONE = "start one with `k2flow kafka start`, or set K2FLOW_KAFKA_BOOTSTRAP_SERVERS"
HOUR_SECONDS, DAY_SECONDS = 3_600, 86_400
LETTERS, LETTER_FILES = 1_000_000, 200
"""The reasons of so many dead letters are read at the most, out of so many files, the newest of the last day."""
PLACED_BY = {"bronze": "ingestion_timestamp", "silver": "timestamp", "dlq": "failed_at", "gold": "timestamp"}
"""The columns by whose bounds files are placed in time: where there is one, when a row was written."""


@dataclass(frozen=True)
class Found:
    """A table as it is now, and its live files."""

    table: Table
    files: Sequence[LiveFile]


class StatusCollector:
    """Looks as often as it is asked to, one look at a time; what cannot have changed since, it remembers."""

    def __init__(self, catalog: Catalog, settings: Settings, exchanges: Sequence[Exchange]) -> None:
        self._catalog = catalog
        self._settings = settings
        self._exchanges = exchanges
        self._layers = {table_name(each, layer): layer for each in exchanges for layer in LAYERS}
        self._manifests: dict[str, dict[str, list[LiveFile]]] = defaultdict(dict)
        self._reasons: dict[str, dict[str, Counter[str]]] = defaultdict(dict)

    def collect(self) -> Status:
        """All there is to see now. A broker that does not answer, missing tables and unreadable ledgers are part of it.

        Raises CatalogError, TableDiffersError, AuditError (a file of dead letters that cannot be read), SettingsError
        (a property that librdkafka does not know).
        """
        began, now_ms = time.monotonic(), time.time_ns() // 1_000_000
        found = {name: self._find(name) for name in self._layers}
        exchanges: list[ExchangeStatus] = []
        for exchange in self._exchanges:
            down = next((each.kafka for each in exchanges if not each.kafka.answers), None)  # others need not wait too
            tables = {layer: each for layer in LAYERS if (each := found[table_name(exchange, layer)])}
            exchanges.append(self._exchange(exchange, tables, down, now_ms))
        shown = {name: _table(each, now_ms) if each else None for name, each in found.items()}
        return Status(now_ms, time.monotonic() - began, tuple(exchanges), shown)

    def _find(self, name: str) -> Found | None:
        table = find_table(self._catalog, name)
        if table is None:
            return None
        with catalog_errors():
            try:
                return Found(table, live_files(table, PLACED_BY[self._layers[name]], self._manifests[name]))
            except ValueError as error:  # PyIceberg's word for a column that is not there
                raise TableDiffersError(
                    f"{NAMESPACE}.{name} is not as k2flow makes it ({error}): `k2flow tables create` says how"
                ) from error

    def _exchange(
        self, exchange: Exchange, tables: Mapping[str, Found], down: Kafka | None, now_ms: int
    ) -> ExchangeStatus:
        """`tables` by layer; `down` is what is known of Kafka already."""
        s, troubles = exchange.settings, _missing(exchange, tables)
        past: dict[str, list[Ledger]] = {}
        replacing = None
        try:
            past = {layer: history(found.table.metadata, exchange.name, s.topic) for layer, found in tables.items()}
            replacing = _replacing(exchange, tables)
        except CommitError as error:
            troubles.append(str(error))
        ledgers = {layer: each[-1] for layer, each in past.items()}
        kafka = down or self._ask(exchange, ledgers)
        layers = {
            layer: layer_status(
                layer, table_name(exchange, layer), ledgers, past[layer], kafka, s.trigger_seconds, now_ms
            )
            for layer in ledgers
        }
        return ExchangeStatus(
            exchange.name,
            s.topic,
            s.trigger_seconds,
            kafka,
            _flow(ledgers),
            replacing,
            {layer: layers.get(layer) for layer in LAYERS},
            self._dead_letters(exchange, tables, ledgers, now_ms),
            (*troubles, *_lost(exchange, ledgers, kafka)),
        )

    def _ask(self, exchange: Exchange, ledgers: Mapping[str, Ledger]) -> Kafka:
        """What Kafka says of an exchange's topic. Raises SettingsError."""
        config, topic = self._settings.kafka, exchange.settings.topic
        try:
            with closing(Broker(config, topic, BROKER_SECONDS, FETCH)) as broker:
                if broker.topic is None:
                    setting = f"{PREFIX}{exchange.name.upper()}_TOPIC"
                    text = f"topic {topic} does not exist on {config['bootstrap.servers']}: create it, or set {setting}"
                    return Kafka(trouble=text)
                marks = {partition: broker.watermarks(partition) for partition in broker.topic.partitions}
                kafka = Kafka(broker.topic, marks)
                return replace(kafka, times=broker.times(missing_messages(ledgers, kafka), TIMES_SECONDS))
        except NoBrokerError as error:
            return Kafka(trouble=f"{error}: {START_ONE}", answers=False)
        except KafkaError as error:
            return Kafka(trouble=str(error))

    def _dead_letters(
        self, exchange: Exchange, tables: Mapping[str, Found], ledgers: Mapping[str, Ledger], now_ms: int
    ) -> DeadLetters | None:
        if not {"bronze", "silver", "dlq"} <= ledgers.keys():
            return None
        hour_us = (now_ms - HOUR_SECONDS * 1000) * 1000
        letters, messages = (rows_since(tables[layer].files, hour_us) for layer in ("dlq", "bronze"))
        reasons = self._reasons_of(tables["dlq"], exchange.dlq, (now_ms - DAY_SECONDS * 1000) * 1000)
        return dead_letters(ledgers["dlq"], ledgers["silver"], letters, messages, reasons)

    def _reasons_of(self, dlq: Found, name: str, since_us: int) -> Counter[str]:
        """The reasons of the newest dead letters since then (us since 1970), by how many there are."""
        recent = [live for live in dlq.files if live.upper is not None and live.upper >= since_us]
        before, whole = self._reasons[name], dict[str, Counter[str]]()
        total = Counter[str]()
        for live in sorted(recent, key=lambda live: live.upper or 0, reverse=True)[:LETTER_FILES]:
            path = live.file.file_path
            counts = before.get(path) or _reasons(dlq.table, live, since_us, LETTERS - total.total())
            total += counts
            if counts.total() == live.file.record_count and live.lower is not None and live.lower >= since_us:
                whole[path] = counts
            if total.total() >= LETTERS:
                break
        self._reasons[name] = whole
        return total


def _reasons(table: Table, live: LiveFile, since_us: int, most: int) -> Counter[str]:
    """The reasons in a file of dead letters, of those that failed since then, and of `most` at the most."""
    counts = Counter[str]()
    plan = Plan("dlq", table, [FileScanTask(live.file)], 0)
    for rows in read_columns(plan, ["reason", "failed_at"], None, lambda _: None):
        recent = rows.filter(pc.greater_equal(pc.cast(rows.column("failed_at"), "int64"), since_us))
        for each in pc.value_counts(recent.column("reason").slice(0, most - counts.total())).to_pylist():
            counts[each["values"]] += each["counts"]
        if counts.total() >= most:
            break
    return counts


def _missing(exchange: Exchange, tables: Mapping[str, Found]) -> list[str]:
    """What is said of tables that are not there."""
    how = f"start the flow, or run `k2flow tables create {exchange.name}`"
    if not tables.keys() - {"gold"}:
        return [f"there are no tables yet: {how}"]
    missing = [f"{NAMESPACE}.{table_name(exchange, layer)}" for layer in LAYERS if layer not in tables]
    return [f"there is no table {' and no table '.join(missing)}: {how}"] if missing else []


def _replacing(exchange: Exchange, tables: Mapping[str, Found]) -> Replacing | None:
    """Whether rows of the exchange are being replaced. Raises CommitError."""
    decision = decided(tables["bronze"].table.properties, exchange) if "bronze" in tables else None
    if decision:
        return Replacing(decision[0], decided=True)
    branches = [staged_branch(tables[layer].table) for layer in ("silver", "dlq") if layer in tables]
    return next((Replacing(branch, decided=False) for branch in branches if branch), None)


def _flow(ledgers: Mapping[str, Ledger]) -> Flow:
    here = socket.gethostname()
    writers = {ledger.writer for ledger in ledgers.values() if ledger.writer}
    running = {writer: writer.running_here() if writer.host == here else None for writer in writers}
    return flow_status(ledgers.values(), running)


def _lost(exchange: Exchange, ledgers: Mapping[str, Ledger], kafka: Kafka) -> list[str]:
    setting = f"{PREFIX}{exchange.name.upper()}_ACCEPT_LOST_OFFSETS"
    named = {table_name(exchange, layer): ledger for layer, ledger in ledgers.items()}
    return lost_offsets(named, kafka, exchange.settings.accept_lost_offsets, setting)


def _table(found: Found, now_ms: int) -> TableStatus:
    table, name = found.table, found.table.name()[-1]
    leader, until = lease(name, table.properties)
    gone = leader is not None and leader.host == socket.gethostname() and not _runs(leader)
    if until * 1000 <= now_ms or gone:
        leader = None
    target = target_bytes(table)
    return TableStatus(
        name,
        totals(table.current_snapshot()),
        sum(is_small(live, target) for live in found.files),
        len(table.metadata.snapshots),
        summed(due(table, found.files, Timing(clock=lambda: now_ms / 1000))),
        last_maintained(table.metadata),
        leader,
        int(until * 1000) if leader else None,
    )


def _runs(writer: Writer) -> bool:
    return writer == Writer.this() or writer.running_here()
