"""One process of a flow: its configuration, its progress, and its session, frozen at the start."""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table
from typing_extensions import override

from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.exchange import Exchange, exchange_names
from k2flow.failpoints import Point, arm, reach
from k2flow.flow.epoch_wait import EpochWait
from k2flow.flow.schedule import Turns
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.dedup_key import check_key
from k2flow.iceberg.head import reconcile
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.staging import publish
from k2flow.iceberg.tables import TableDefinition, create, definitions
from k2flow.iceberg.writer import TableWriters
from k2flow.kafka.marks import describe, marks_of, replaced_log, wait_for_other_messages
from k2flow.kafka.properties import consumer_properties
from k2flow.kafka.start_offsets import check_same_topic, ends_in_replaced_log
from k2flow.kafka.topic import Topic, wait_for_topic
from k2flow.layers import GOLD_TABLE
from k2flow.trades.pipeline import Pipeline
from k2flow.trades.registry import open_schemas
from k2flow.trades.stored_schemas import stored_texts

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FlowSession:
    """The tables, ledgers and topic as they were when the flow started; `workers` counts those of all processes."""

    definitions: Mapping[str, TableDefinition]
    tables: Mapping[str, Table]
    ledgers: Mapping[str, Ledger]
    topic: Topic
    workers: int
    log_ends: Mapping[str, Mapping[int, int]] = field(default_factory=dict)
    """Where each table continues in partitions whose log was replaced, if that was accepted."""

    def of_log(self, table: str) -> Callable[[Ledger], Ledger]:
        """Return the function that begins the replaced logs in a ledger of `table` as the session found it."""
        ends, epoch = self.log_ends.get(table, {}), self.ledgers[table].writer_epoch
        return lambda ledger: ledger.of_log(ends) if ledger.writer_epoch == epoch else ledger

    def committed(self, table: str) -> dict[int, int]:
        """Return the next offset of each partition that `table` held when the flow started."""
        return {p: held.next for p, held in self.topic.held(self.ledgers[table]).partitions.items()}


class Process(ABC):
    """One process of any flow, shared by its workers."""

    def __init__(self, name: str, exchanges: Sequence[Exchange] = ()) -> None:
        self.name = name  # of the flow: in commands, logs and metrics
        self.exchanges = exchanges  # whose status its metrics show
        self.stop = threading.Event()  # asks the source to end: it emits what it has read so far, to be committed
        self.reading = False  # whether a source is open
        self.finished_reading = False  # whether a source has ended
        self.trigger_override: float | None = None  # the trigger in seconds that Bytewax's command line gave

    @property
    @abstractmethod
    def source(self) -> str:
        """What it reads, as the log says it."""

    @property
    @abstractmethod
    def trigger_seconds(self) -> float:
        """Seconds between two commits."""

    @abstractmethod
    def open(self, workers: int) -> None:
        """Open what the flow reads and writes, once for all workers of this process; `workers` counts those of all."""

    @cached_property
    def settings(self) -> Settings:
        """The settings, read once. Raises SettingsError."""
        return load_settings(exchange_names())

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog, opened once. Raises CatalogError."""
        return open_catalog(self.settings)


class FlowProcess(Process):
    """One process of an exchange's flow. `open` sets `session` and `pipeline`."""

    session: FlowSession
    pipeline: Pipeline

    def __init__(self, exchange: Exchange) -> None:
        super().__init__(exchange.name, [exchange])
        self.exchange = exchange
        self.turns = Turns()
        self._epoch_waits: dict[int, EpochWait] = {}
        self._lock = threading.Lock()
        self._is_open = False

    @property
    @override
    def source(self) -> str:
        return f"topic {self.exchange.settings.topic}"

    @property
    @override
    def trigger_seconds(self) -> float:
        return self.trigger_override or self.exchange.settings.trigger_seconds

    def epoch_wait(self, worker: int) -> EpochWait:
        """Return that of one worker of this process."""
        return self._epoch_waits.setdefault(worker, EpochWait())

    @override
    def open(self, workers: int) -> None:
        """Open the session. Raises what `open_session` raises."""
        with self._lock:
            if not self._is_open:
                arm(self.settings.failpoints)
                install_metadata_cache()
                self.session = open_session(self.exchange, self.settings, self.catalog, workers)
                self.pipeline = self._pipeline(self.session)
                self._is_open = True
                reach(Point.OPENED)

    def _pipeline(self, session: FlowSession) -> Pipeline:
        # With several workers, files may go to another process next, and Bytewax would lose an error on the way.
        bronze = session.tables[self.exchange.bronze]
        writers = TableWriters(session.tables, session.definitions, wait=session.workers > 1)
        return Pipeline(
            self.exchange,
            catalog=self.catalog,
            writers=writers,
            schemas=lambda: open_schemas(self.settings, self.stop, stored_texts(bronze.properties, self.exchange.name)),
            committed=session.committed,
            owners=session.workers,
            cache=self.settings.cache,
            memory_ids=self.settings.window_memory_ids,
        )


def open_session(exchange: Exchange, settings: Settings, catalog: Catalog, workers: int) -> FlowSession:
    """Create or evolve the tables, read their ledgers, and wait until the broker answers for the topic.

    If a process died while it published a committed replacement of rows, publish the rest of it first.
    Raises SettingsError, CatalogError, TableDiffersError, CommitError, KafkaError. Among them are HeadMovedError
    (a table does not hold what its ledger says) and LogReplacedError (Kafka has other messages than those read).
    """
    own = exchange.settings
    wanted = definitions(exchange)
    create_tables(catalog, wanted.values(), settings)
    publish(catalog, exchange)
    check_key(load_table(catalog, GOLD_TABLE).properties, exchange)
    topic = wait_for_topic(settings.kafka, own.topic, lambda: _was_read(catalog, exchange, wanted))
    tables = {name: load_table(catalog, name) for name in wanted}
    read = {name: ledgers.read(table.properties, exchange.name, topic.name) for name, table in tables.items()}
    found = {
        name: reconcile(name, table.metadata, exchange.name, read[name], own.after_rollback)
        for name, table in tables.items()
    }
    accept, setting = own.accept_lost_offsets, exchange.setting("accept_lost_offsets")
    check_same_topic(topic, found, accept, setting)
    others = wait_for_other_messages(consumer_of(exchange, settings), topic.name, marks_of(topic, found.values()))
    if others and not accept:
        raise replaced_log(topic.name, others, setting)
    ends = ends_in_replaced_log(topic, found, {other.partition for other in others})
    for other in others:
        log.error("%s; continuing, as %s says", describe(topic.name, other), setting)
    begun = {name: ledger.of_log(ends[name]) for name, ledger in found.items()}
    return FlowSession(definitions=wanted, tables=tables, ledgers=begun, topic=topic, workers=workers, log_ends=ends)


def create_tables(catalog: Catalog, wanted: Iterable[TableDefinition], settings: Settings) -> None:
    """Create or evolve the tables of a flow, and log what was done. Raises what `create` raises."""
    for name, done in create(catalog, wanted, settings.accept_lost_tables).items():
        if done:
            log.info("table %s: %s", name, done)


def _was_read(catalog: Catalog, exchange: Exchange, tables: Iterable[str]) -> bool:
    """Whether a table holds offsets of the exchange's topic: so it exists, or did. Raises CatalogError, CommitError."""
    properties = (load_table(catalog, name).properties for name in tables)
    return any(ledgers.read(each, exchange.name, exchange.settings.topic).partitions for each in properties)


def consumer_of(exchange: Exchange, settings: Settings) -> dict[str, str]:
    """Return librdkafka's properties for a consumer of this flow. Raises SettingsError."""
    return consumer_properties(settings.kafka, f"k2flow-{exchange.name}")
