"""The session of a flow: its tables, their ledgers and its topic, frozen at the start."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass

from pyiceberg.catalog import Catalog
from pyiceberg.table import Table

from k2flow.config.settings import Settings
from k2flow.exchange import Exchange
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.staging import publish
from k2flow.iceberg.tables import TableDefinition, create, definitions
from k2flow.kafka.start_offsets import check_same_topic
from k2flow.kafka.topic import Topic, wait_for_topic

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class FlowSession:
    """The tables, ledgers and topic as they were when the flow started; `workers` counts those of all processes."""

    definitions: Mapping[str, TableDefinition]
    tables: Mapping[str, Table]
    ledgers: Mapping[str, Ledger]
    topic: Topic
    workers: int

    def committed(self, table: str) -> dict[int, int]:
        """Return the next offset of each partition that `table` held when the flow started."""
        ledger = self.ledgers[table]
        known = ledger.partitions.items() if self.topic.same_as(ledger.topic_id) else ()
        return {p: extent.next for p, extent in known}


def open_session(exchange: Exchange, settings: Settings, catalog: Catalog, workers: int) -> FlowSession:
    """Create or evolve the tables, read their ledgers, and wait until the broker answers for the topic.

    If a process died while it published a committed replacement of rows, publish the rest of it first.

    Raises:
        SettingsError, CatalogError, TableDiffersError, CommitError, KafkaError: The flow cannot start.
    """
    wanted = definitions(exchange)
    for name, done in create(catalog, wanted.values()).items():
        if done:
            log.info("table %s: %s", name, done)
    publish(catalog, exchange)
    topic = wait_for_topic(settings.kafka, exchange.settings.topic)
    tables = {name: load_table(catalog, name) for name in wanted}
    found = {name: ledgers.read(table.properties, exchange.name, topic.name) for name, table in tables.items()}
    check_same_topic(topic, found, exchange.settings.accept_lost_offsets, exchange.setting("accept_lost_offsets"))
    return FlowSession(definitions=wanted, tables=tables, ledgers=found, topic=topic, workers=workers)
