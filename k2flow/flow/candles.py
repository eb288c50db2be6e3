"""The dataflow of the candles, as Bytewax sees it.

    Gold ─► source: one candle update per trigger ─► commit

The source reads Gold's new files and writes candle files; the sink commits them. The sink fences earlier writers when
Bytewax builds it for the first item, so the source emits an empty item first. One process does all: see
docs/adr/0026-candles-are-a-function-of-gold.md.
"""

import logging
import time
from datetime import datetime

import bytewax.operators as op
from bytewax.dataflow import Dataflow
from bytewax.inputs import DynamicSource, StatelessSourcePartition
from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from tenacity import (
    RetryCallState,
    Retrying,
    retry_if_exception,
    sleep_using_event,
    stop_after_delay,
    stop_any,
    stop_when_event_set,
    wait_random_exponential,
)
from typing_extensions import override

from k2flow.candles.updating import NAME, CandleTable, CandleUpdate, position_of
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.errors import CatalogError, CommitError, SettingsError
from k2flow.failpoints import Point, arm, reach
from k2flow.flow.epoch_wait import AT_ONCE
from k2flow.flow.first_error import record_first_error
from k2flow.flow.process import Process, create_tables
from k2flow.flow.runtime import install_runner
from k2flow.flow.sink import check_age
from k2flow.iceberg.catalog import OUTAGES, load_table
from k2flow.iceberg.commit import RETRY_SECONDS, Committer
from k2flow.iceberg.snapshots import head_number
from k2flow.iceberg.tables import candles_definition, gold_definition
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import STAGE, BatchStats, Stage

log = logging.getLogger(__name__)
POLL_SECONDS = 0.2  # between two looks at Gold
MAX_WAIT_SECONDS = 5
Item = tuple[str, CandleUpdate | None]


class CandlesProcess(Process):
    """The process of the candles flow. `fence` sets its members."""

    committer: Committer
    candles: CandleTable
    began_at: int  # Gold's sequence number then

    def __init__(self) -> None:
        super().__init__(NAME)
        self.fenced = False

    @property
    @override
    def source(self) -> str:
        return GOLD_TABLE

    @property
    @override
    def trigger_seconds(self) -> float:
        return self.trigger_override or self.settings.candles_trigger_seconds

    @override
    def open(self, workers: int) -> None:
        """Create the tables. Raises SettingsError for several workers.

        Raises CatalogError, TableDiffersError, LostTableError, CommitError.
        """
        if workers > 1:
            raise SettingsError(f"{workers} workers: one worker computes all candles; start one process without -w")
        arm(self.settings.failpoints)
        install_metadata_cache()
        create_tables(self.catalog, (gold_definition(), candles_definition()), self.settings)
        reach(Point.OPENED)

    def fence(self) -> None:
        """Fence earlier writers. All candles are computed again if another program has changed their table."""
        gold = load_table(self.catalog, GOLD_TABLE)
        self.committer = Committer(self.catalog, CANDLES_TABLE, NAME, GOLD_TABLE, after_rollback="recompute")
        self.committer.fence(str(gold.metadata.table_uuid))
        self.candles = CandleTable(self.catalog, position_of(self.committer.ledger))
        self.began_at = head_number(gold.metadata)
        self.fenced = True

    def update(self) -> CandleUpdate | None:
        """Return the update of the candles to Gold as it is now, see `CandleTable.update`; None if they have it.

        If the catalog or its storage fails, or maintenance has just deleted a file that was replaced, it is tried again
        for RETRY_SECONDS. Raises CatalogError then, and CommitError if Gold is another table.
        """
        retrying = Retrying(
            retry=retry_if_exception(_is_outage),
            wait=wait_random_exponential(multiplier=POLL_SECONDS, max=MAX_WAIT_SECONDS),
            stop=stop_any(stop_after_delay(RETRY_SECONDS), stop_when_event_set(self.stop)),
            sleep=sleep_using_event(self.stop),
            before_sleep=_warn_of_outage,
            reraise=True,
        )
        return retrying(self._update)

    def _update(self) -> CandleUpdate | None:
        gold = load_table(self.catalog, GOLD_TABLE)
        if str(gold.metadata.table_uuid) != self.committer.ledger.topic_id:
            raise CommitError(
                f"{GOLD_TABLE} was replaced by another table: start again; all candles are then computed from it"
            )
        if self.candles.has(gold):
            return None
        tracing.begin_batch()
        with tracing.span("compute", table=CANDLES_TABLE):
            return self.candles.update(gold)


def build_candles() -> Dataflow:
    """Return the dataflow of the candles, for `python -m bytewax.run flows.candles`. Does no I/O until it runs."""
    process = CandlesProcess()
    flow = Dataflow(f"k2flow_{NAME}")
    updates = op.input("gold", flow, GoldSource(process))
    op.output("candles", updates, CandlesSink(process))
    install_runner(process)
    return flow


class GoldSource(DynamicSource[Item]):
    """Emits a candle update per trigger in which Gold has changed."""

    def __init__(self, process: CandlesProcess) -> None:
        self._process = process

    @override
    @record_first_error
    def build(self, step_id: str, worker_index: int, worker_count: int) -> "GoldSourcePartition":
        self._process.open(worker_count)
        self._process.reading = True
        STAGE.labels(NAME).set(Stage.READING)
        return GoldSourcePartition(self._process)


class GoldSourcePartition(StatelessSourcePartition[Item]):
    """Looks at Gold every POLL_SECONDS. Raises CatalogError, CommitError, DataFileError."""

    def __init__(self, process: CandlesProcess) -> None:
        self._process = process
        self._until_caught_up = process.settings.until_caught_up
        self._begun = self._caught_up = False
        self._next_look = self._next_update = time.monotonic()

    @override
    @record_first_error
    def next_batch(self) -> list[Item]:
        process = self._process
        tracing.end_batch()
        if not self._begun:
            self._begun = True
            return [(CANDLES_TABLE, None)]
        if not process.fenced:
            return []
        if not self._caught_up:
            process.stop.wait(max(self._next_look, self._next_update) - time.monotonic())
        if process.stop.is_set() or self._caught_up:
            reach(Point.SHUTDOWN)
            process.finished_reading = True
            raise StopIteration
        began = time.monotonic()
        self._next_look = began + POLL_SECONDS
        update = process.update()
        if update is None:
            self._caught_up = self._until_caught_up
            return []
        self._caught_up = self._until_caught_up and update.source.sequence_number >= process.began_at
        # A look earlier than a trigger later: else updates would fall behind Gold's commits, which have triggers too.
        self._next_update = began + (0 if self._until_caught_up else process.trigger_seconds - POLL_SECONDS)
        reach(Point.SOURCE_EMITTED)
        return [(CANDLES_TABLE, update)]

    @override
    def next_awake(self) -> datetime:
        """Return that Bytewax calls `next_batch` once the epoch is over: it does the waiting."""
        return AT_ONCE


class CandlesSink(FixedPartitionedSink[CandleUpdate | None, None]):
    """The one partition that commits candle updates."""

    def __init__(self, process: CandlesProcess) -> None:
        self._process = process

    @override
    def list_parts(self) -> list[str]:
        return [CANDLES_TABLE]

    @override
    def part_fn(self, item_key: str) -> int:
        return 0

    @override
    @record_first_error
    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "CandlesSinkPartition":
        return CandlesSinkPartition(self._process)


class CandlesSinkPartition(StatefulSinkPartition[CandleUpdate | None, None]):
    """Commits an update at the end of its epoch. Raises CommitError, AlreadyRunningError, CatalogError."""

    def __init__(self, process: CandlesProcess) -> None:
        process.fence()
        self._process = process
        self._update: CandleUpdate | None = None

    @override
    def write_batch(self, values: list[CandleUpdate | None]) -> None:
        self._update = values[-1]

    @override
    @record_first_error
    def snapshot(self) -> None:
        update, self._update = self._update, None
        if update is None:
            return
        check_age(CANDLES_TABLE, update.began, "start again, on a machine with less to do")
        began = time.monotonic()
        reach(Point.EPOCH_COMPLETE)
        try:
            with tracing.span("commit", table=CANDLES_TABLE, files=len(update.files)):
                self._process.committer.overwrite(update.files, update.removed, update.held, update.properties)
        except CommitError:
            metrics.COMMIT_FAILURES.labels(NAME, metrics.layer_of(CANDLES_TABLE)).inc()
            raise
        self._process.candles.on_committed(update)
        seconds = time.monotonic() - began
        oldest_us = None if update.gold_committed_ms is None else update.gold_committed_ms * 1000
        metrics.count_commit(NAME, CANDLES_TABLE, update.files, [BatchStats(oldest_us)], seconds)
        reach(Point.COMMIT_DONE)
        rows, sequence = sum(file.record_count for file in update.files), self._process.committer.ledger.sequence
        text = "%s: %d rows in %d files, of %s at sequence number %d, commit %d in %.0f ms"
        number = update.source.sequence_number
        log.info(text, CANDLES_TABLE, rows, len(update.files), GOLD_TABLE, number, sequence, seconds * 1000)

    @override
    def close(self) -> None:
        """Commit nothing: Bytewax also calls this while a crash unwinds."""


def _is_outage(error: BaseException) -> bool:
    return isinstance(error, CatalogError) and isinstance(error.__cause__, OUTAGES)


def _warn_of_outage(state: RetryCallState) -> None:
    error = state.outcome.exception() if state.outcome else None
    if state.attempt_number % 10 == 1:
        log.warning("%s: %s; trying again for %d s at most", GOLD_TABLE, error, RETRY_SECONDS)
