"""Commits what the workers wrote: one committer per table, at the end of an epoch.

Once per epoch Bytewax calls `snapshot` of each table that received an item, on the worker that owns the table, after
every worker's items of that epoch have arrived. It does so without a recovery store too. If no source ends a checkpoint
in an epoch, its files wait for the next epoch in which one does. Delivery guarantee: exactly once, see
k2flow.iceberg.commit.
"""

import logging
import time
from collections.abc import Callable, Sequence

from bytewax.outputs import FixedPartitionedSink, StatefulSinkPartition
from pyiceberg.manifest import DataFile
from typing_extensions import override

from k2flow.errors import CommitError
from k2flow.failpoints import Point, reach
from k2flow.flow.first_error import record_first_error
from k2flow.flow.process import FlowProcess
from k2flow.iceberg.commit import HUNG_SECONDS, Committer
from k2flow.iceberg.committable import Committable
from k2flow.iceberg.dedup_key import key_properties
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.staging import abort_replacements
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import BatchStats
from k2flow.timeouts import SENT, DeadlinePassedError, run_with_timeout

log = logging.getLogger(__name__)
MAX_FILE_SECONDS = 1800.0
"""From the first file to the commit: half of what `k2flow maintain --orphan-older-than` leaves alone by default."""


class TableSink(FixedPartitionedSink[Committable, None]):
    """Routes committables to their tables: its partitions are the tables of one exchange."""

    def __init__(self, process: FlowProcess) -> None:
        self._process = process
        self._names = sorted(process.exchange.tables)

    @override
    def list_parts(self) -> list[str]:
        return self._names

    @override
    def part_fn(self, item_key: str) -> int:
        return self._names.index(item_key)

    @override
    @record_first_error
    def build_part(self, step_id: str, for_part: str, resume_state: None) -> "TableSinkPartition":
        return TableSinkPartition(self._process, for_part)


class TableSinkPartition(StatefulSinkPartition[Committable, None]):
    """Commits into one table. Raises CommitError, AlreadyRunningError, CatalogError."""

    def __init__(self, process: FlowProcess, name: str) -> None:
        exchange = process.exchange
        settings = exchange.settings
        self._exchange = exchange.name
        self._name = name
        self._committer = Committer(
            process.catalog,
            name,
            exchange.name,
            settings.topic,
            settings.accept_lost_offsets,
            settings.after_rollback,
            process.session.of_log(name),
            key_properties(exchange, name),
        )
        self._committer.fence(process.session.topic.id, process.session.ledgers[name])
        if name == exchange.bronze:
            abort_replacements(process.catalog, exchange, self._committer.ledger.writer_epoch)
        self._writing: list[Callable[[], Sequence[DataFile]]] = []  # in this epoch
        # Since the last commit:
        self._began: float | None = None  # the time of the first item, monotonic
        self._files: list[DataFile] = []
        self._ranges: list[OffsetRange] = []
        self._stats: list[BatchStats] = []
        self._properties: dict[str, str] = {}
        self._ends_checkpoint = False

    @override
    @record_first_error
    def write_batch(self, values: list[Committable]) -> None:
        self._began = self._began or time.monotonic()
        for committable in values:
            self._writing.append(committable.files)
            self._ranges += committable.ranges
            self._stats.append(committable.stats)
            self._properties |= committable.properties
            self._ends_checkpoint |= committable.ends_checkpoint

    @override
    @record_first_error
    def snapshot(self) -> None:
        self._files += self._finished_files()
        if not self._ends_checkpoint:
            return
        files, ranges, stats = self._files, self._ranges, self._stats
        self._files, self._ranges, self._stats, self._ends_checkpoint = [], [], [], False
        began_at, self._began = self._began, None
        if not ranges:
            if files:
                raise CommitError(f"{self._name}: {len(files)} files came without their offsets: start again")
            return
        if began_at is not None:
            check_age(self._name, began_at, "set BATCH_ROWS and COMMIT_BATCHES of the exchange lower, and start again")
        began = time.monotonic()
        reach(Point.EPOCH_COMPLETE)
        try:
            with tracing.span("commit", table=self._name, files=len(files)):
                self._committer.commit(files, ranges, self._properties)
        except CommitError:
            metrics.COMMIT_FAILURES.labels(self._exchange, metrics.layer_of(self._name)).inc()
            raise
        seconds = time.monotonic() - began
        metrics.count_commit(self._exchange, self._name, files, stats, seconds)
        reach(Point.COMMIT_DONE)
        rows, offsets = sum(file.record_count for file in files), sum(r.next - r.first for r in ranges)
        text = "%s: %d rows in %d files from %d offsets, commit %d in %.0f ms"
        log.info(text, self._name, rows, len(files), offsets, self._committer.ledger.sequence, seconds * 1000)

    def _finished_files(self) -> list[DataFile]:
        waiting, self._writing = self._writing, []
        try:
            with tracing.span("await files", table=self._name):
                return run_with_timeout(HUNG_SECONDS, lambda: [file for files in waiting for file in files()], SENT)
        except DeadlinePassedError as error:
            raise CommitError(
                f"{self._name}: the storage has not accepted a file for {HUNG_SECONDS} s; nothing is lost: start "
                "again when it answers"
            ) from error

    @override
    def close(self) -> None:
        """Commit nothing: Bytewax also calls this while a crash unwinds."""


def check_age(table: str, began: float, remedy: str) -> None:
    """Refuse files so old that maintenance may be about to delete them as orphans. `began` is a monotonic time.

    Raises CommitError, which says the remedy.
    """
    seconds = time.monotonic() - began
    if seconds > MAX_FILE_SECONDS:
        raise CommitError(
            f"{table}: writing the files of one commit took {seconds:.0f} s, and maintenance may delete such old ones; "
            f"nothing is lost: {remedy}"
        )
