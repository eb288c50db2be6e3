"""One process of a flow: its configuration, its open session, and its progress."""

import threading
from functools import cached_property

from pyiceberg.catalog import Catalog

from k2flow.compat.pyarrow import pickle_batches_as_ipc
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.exchange import Exchange, exchange_names
from k2flow.failpoints import Point, arm, reach
from k2flow.flow.session import FlowSession, open_session
from k2flow.iceberg.catalog import open_catalog
from k2flow.iceberg.writer import TableWriters
from k2flow.trades.pipeline import Pipeline
from k2flow.trades.registry import open_schemas


class FlowProcess:
    """Shared by the workers of one process.

    Attributes:
        exchange: The exchange whose flow runs.
        stop: Asks the source to end: it emits the messages read so far, which are then committed.
        reading: Whether a source is open.
        finished_reading: Whether a source has ended.
        trigger_override: The trigger in seconds that Bytewax's command line gave.
    """

    def __init__(self, exchange: Exchange) -> None:
        self.exchange = exchange
        self.stop = threading.Event()
        self.reading = False
        self.finished_reading = False
        self.trigger_override: float | None = None
        self._lock = threading.Lock()
        self._opened: tuple[FlowSession, Pipeline] | None = None

    @cached_property
    def settings(self) -> Settings:
        """The settings, read once. Raises SettingsError."""
        return load_settings(exchange_names())

    @cached_property
    def catalog(self) -> Catalog:
        """The Iceberg catalog, opened once. Raises CatalogError."""
        return open_catalog(self.settings)

    @property
    def trigger_seconds(self) -> float:
        """Seconds between two commits."""
        return self.trigger_override or self.exchange.settings.trigger_seconds

    def open(self, workers: int) -> FlowSession:
        """Open the session, once for all workers of this process. Raises what `open_session` raises."""
        with self._lock:
            if self._opened is None:
                arm(self.settings.failpoints)
                pickle_batches_as_ipc()
                install_metadata_cache()
                session = open_session(self.exchange, self.settings, self.catalog, workers)
                self._opened = session, self._pipeline(session)
                reach(Point.OPENED)
            return self._opened[0]

    @property
    def session(self) -> FlowSession:
        """The open session."""
        return self._open_parts[0]

    @property
    def pipeline(self) -> Pipeline:
        """The steps from messages to data files, over the open session; shared by the workers of this process."""
        return self._open_parts[1]

    @property
    def _open_parts(self) -> tuple[FlowSession, Pipeline]:
        if self._opened is None:
            raise RuntimeError("the session is not open: call `open` first")
        return self._opened

    def _pipeline(self, session: FlowSession) -> Pipeline:
        # With several workers, files may go to another process next, and Bytewax would lose an error on the way.
        writers = TableWriters(session.tables, session.definitions, wait=session.workers > 1)
        return Pipeline(
            self.exchange,
            catalog=self.catalog,
            writers=writers,
            schemas=lambda: open_schemas(self.settings, self.stop),
            committed=session.committed,
            owners=session.workers,
        )
