"""What the operators of one process share: settings, tables, the ledgers at the start, the topic, the stop flag."""

import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.compat.table_metadata import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.exchange import Exchange, exchange_names
from k2flow.failpoints import Point, arm, reach
from k2flow.iceberg import ledger as ledgers
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.staging import finish
from k2flow.iceberg.tables import TableDefinition, create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.kafka.topic import Topic, check_same_topic, wait_for_topic
from k2flow.trades.messages import pickle_batches_as_ipc

log = logging.getLogger(__name__)


class FlowSession:
    """Opened once in a process, before or when Bytewax builds the source; shared by its workers.

    `stop` asks the source to end: it emits what it has read, which is then committed. `reading` is true once there is a
    source, `read` once one has ended. `workers` counts those of all processes.
    """

    topic: Topic
    tables: dict[str, Table]
    ledgers: dict[str, Ledger]
    workers: int

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.stop = threading.Event()
        self.reading = False
        self.read = False
        self.trigger_override: float | None = None
        self._lock = threading.Lock()
        self._open = False

    @cached_property
    def settings(self) -> Settings:
        return load_settings(exchange_names())

    @cached_property
    def catalog(self) -> Catalog:
        return open_catalog(self.settings)

    @cached_property
    def definitions(self) -> dict[str, TableDefinition]:
        return definitions(self.exchange)

    def write(self, writer: DataFileWriter, rows: pa.RecordBatch) -> Callable[[], list[DataFile]]:
        """Begins to write `rows`; what it returns waits for the files, and raises what went wrong with them.

        The next steps go on meanwhile: Arrow and zstd work without the interpreter's lock.
        """
        writing = [self._pool.submit(writer.write_file, piece) for piece in writer.pieces(rows)]

        def files() -> list[DataFile]:
            return [each.result() for each in writing]

        if self.workers > 1:  # they may go to another process next, and Bytewax would lose what went wrong on the way
            files()
        return files

    @cached_property
    def _pool(self) -> ThreadPoolExecutor:
        return ThreadPoolExecutor(max(2, os.cpu_count() or 1), "files")

    @property
    def trigger_seconds(self) -> float:
        return self.trigger_override or self.exchange.settings.trigger_seconds

    def check(self) -> None:
        """Makes or evolves the tables, reads the ledgers, and waits until the broker answers for the topic.

        A replacement of rows that was decided and whose publisher died is finished first.

        Raises SettingsError, CatalogError, TableDiffersError, CommitError, KafkaError, LostOffsetsError.
        """
        for name, done in create(self.catalog, self.definitions.values()).items():
            if done:
                log.info("table %s: %s", name, done)
        finish(self.catalog, self.exchange)
        s = self.exchange.settings
        self.topic = wait_for_topic(self.settings.kafka, s.topic)
        self.tables = {name: load_table(self.catalog, name) for name in self.definitions}
        self.ledgers = {
            name: ledgers.read(table.properties, self.exchange.name, s.topic) for name, table in self.tables.items()
        }
        setting = f"K2FLOW_{self.exchange.name.upper()}_ACCEPT_LOST_OFFSETS"
        check_same_topic(self.topic, self.ledgers, s.accept_lost_offsets, setting)

    def open(self, workers: int) -> None:
        """`check`, once for all workers of this process."""
        with self._lock:
            if not self._open:
                arm(self.settings.failpoints)
                pickle_batches_as_ipc()
                install_metadata_cache()
                self.check()
                reach(Point.OPENED)
                self.workers = workers
                self._open = True

    def committed(self, table: str) -> dict[int, int]:
        """The next offset of each partition that `table` held when the flow started."""
        ledger = self.ledgers[table]
        known = ledger.partitions.items() if self.topic.same_as(ledger.topic_id) else ()
        return {p: extent.next for p, extent in known}

    def writer(self, table: str) -> DataFileWriter:
        """A writer of data files of `table`."""
        return DataFileWriter(self.tables[table], self.definitions[table])
