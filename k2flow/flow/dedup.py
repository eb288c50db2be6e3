"""Gold: valid trades of all exchanges, each message_id of an exchange once.

The set of ids is not kept anywhere but in Gold itself: a flow that starts reads it back, an hour at a time, when a
batch first needs it. An id belongs to one worker, so that each worker's set is exact alone.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date, timedelta

import numpy as np
import pyarrow as pa
from bytewax.operators import StatefulBatchLogic
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import parser
from pyiceberg.expressions.visitors import _InclusiveMetricsEvaluator
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import ManifestContent, ManifestFile
from pyiceberg.table import FileScanTask, Table

from k2flow.dedup.index import SeenIds
from k2flow.dedup.keys import Bools, Ints, owner
from k2flow.exchange import GOLD
from k2flow.failpoints import Point, reach
from k2flow.flow.first_error import record_first_error
from k2flow.flow.routing import worker_key
from k2flow.flow.session import FlowSession
from k2flow.flow.sink import Committable
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.manifests import without_statistics
from k2flow.iceberg.tables import GOLD_FIELDS, arrow_schema
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import BatchStats
from k2flow.trades.messages import MessageBatch

log = logging.getLogger(__name__)

HOUR_US = 3_600_000_000
EPOCH = date(1970, 1, 1)
GOLD_SCHEMA = arrow_schema(GOLD_FIELDS)
FEW_ROWS = 1_000
HELD_BYTES = 16 << 20


@dataclass(frozen=True)
class OwnedTrades:
    """Gold rows that may be duplicates, all of whose ids belong to worker `owner` of `workers`.

    `commit`: the tables commit at the end of this epoch, so that no row may be held back. Every owner is told so.
    """

    owner: int
    workers: int
    rows: pa.RecordBatch
    commit: bool


def hours_of(trades: pa.RecordBatch) -> Ints:
    """The exchange hour of each of n trades, in hours since 1970."""
    hours: Ints = trades.column("timestamp").cast(pa.int64()).to_numpy() // HOUR_US
    return hours


def gold_rows(trades: pa.RecordBatch) -> pa.RecordBatch:
    """Silver's columns and `exchange_hour` (0-23, UTC)."""
    hour = pa.array((hours_of(trades) % 24).astype(np.int32))
    return pa.RecordBatch.from_arrays([*trades.columns, hour], schema=GOLD_SCHEMA)


def candidates(trades: MessageBatch, workers: int) -> list[tuple[str, OwnedTrades]]:
    """The rows of `trades` by the worker that owns their ids, each with the key that Bytewax routes to it."""
    rows = gold_rows(trades.rows)
    if workers == 1:
        parts = [rows]
    else:
        owners = owner(rows.column("message_id"), workers)
        parts = [rows.filter(pa.array(owners == w)) for w in range(workers)]
    return [
        (worker_key(w, workers), OwnedTrades(w, workers, part, trades.commit))
        for w, part in enumerate(parts)
        if part.num_rows or trades.commit
    ]


def are_few(hours: Ints) -> Bools:
    """Which of n rows, by their hours, are among no more than FEW_ROWS of one hour that stand side by side."""
    starts = np.flatnonzero(np.diff(hours, prepend=hours[:1] - 1))
    lengths = np.diff(starts, append=len(hours))
    return np.repeat(lengths <= FEW_ROWS, lengths)


class LateRows:
    """Holds back the rows of hours of which a batch has few, since a small file costs nearly as much as a large one.

    It holds HELD_BYTES at most after each call.
    """

    def __init__(self) -> None:
        self._held: list[pa.RecordBatch] = []

    def ready(self, rows: pa.RecordBatch, first: Bools, hours: Ints, commit: bool) -> pa.RecordBatch:
        """The rows to write now: of those of the n given that are `first`, and of those held; all before a commit."""
        now = first.copy()
        if not commit:
            now[first] = ~are_few(hours[first])
        ready = rows if now.all() else rows.filter(pa.array(now))
        few = first & ~now
        if few.any():
            self._held.append(rows.filter(pa.array(few)))
        if self._held and (commit or sum(held.nbytes for held in self._held) > HELD_BYTES):
            ready = pa.concat_batches([*self._held, ready])
            self._held = []
        return ready


class Deduplicator(StatefulBatchLogic[OwnedTrades, Committable, None]):
    """Writes the rows whose ids are new into Gold's data files.

    Delivery guarantee: within the hot window (`dedup_window_hours` back from Gold's newest hour) no two Gold rows of
    the exchange share a message_id; beyond it none within the same exchange_hour. What a crash left uncommitted is not
    in Gold and so not in the set of the next start; what was committed is, and is dropped when it is read again.
    """

    def __init__(self, context: FlowSession) -> None:
        self._context = context
        self._writer = context.writer(GOLD)
        self._seen: SeenIds | None = None
        self._late = LateRows()
        self._committing = False  # at the end of this epoch
        self._committed = False  # at the end of the one before

    @record_first_error
    def on_batch(self, values: list[OwnedTrades]) -> tuple[list[Committable], bool]:
        if self._seen is None:
            self._seen = self._open(values[0].owner, values[0].workers)
        if self._committed:  # only now, in a new epoch: it begins only when the tables hold the earlier ones
            self._seen.commit()
            self._committed = False
        # Whatever order the items of several workers come in: after the first that says so nothing is held.
        self._committing |= any(value.commit for value in values)
        # What several workers have sent goes into the same files.
        rows = pa.concat_batches([value.rows for value in values]) if len(values) > 1 else values[0].rows
        hours = hours_of(rows)
        with tracing.span("dedup", rows=rows.num_rows):
            first = self._seen.first_seen(rows.column("message_id"), hours)
        told = BatchStats(duplicates=rows.num_rows - int(first.sum()))
        ready = self._late.ready(rows, first, hours, self._committing)
        with tracing.span("write", table=GOLD, rows=ready.num_rows):
            written = Committable(self._context.write(self._writer, ready), told=told)
        labels = (self._context.exchange.name, str(values[0].owner))
        metrics.SEEN_IDS.labels(*labels).set(self._seen.ids)
        metrics.SEEN_BYTES.labels(*labels).set(self._seen.nbytes)
        reach(Point.GOLD_WRITTEN)
        return [written], StatefulBatchLogic.RETAIN

    def snapshot(self) -> None:
        self._committed, self._committing = self._committing, False

    def _open(self, worker: int, workers: int) -> SeenIds:
        ids = GoldIds(self._context.catalog, self._context.exchange.code)
        window = self._context.exchange.settings.dedup_window_hours
        return SeenIds(ids.load, ids.newest_hour(), window, worker, workers)


class GoldIds:
    """The message ids of one exchange that Gold holds, by exchange hour. Raises CatalogError.

    Manifests never change, so each is read once at most, and only if it may tell of an hour that is asked for. Of
    their entries those of this exchange are kept, without statistics: about 2 KB a file.
    """

    def __init__(self, catalog: Catalog, exchange: str) -> None:
        """exchange: as Gold's column `exchange` has it."""
        self._catalog = catalog
        self._is_own = parser.parse(f"exchange = '{exchange}'")
        self._table: Table | None = None
        self._manifests: list[ManifestFile] = []
        self._read_manifests: dict[str, dict[int, list[FileScanTask]]] = {}
        self._has_deletes = False

    def newest_hour(self) -> int | None:
        """The newest hour (since 1970) in which Gold has a row of this exchange; None if there is none."""
        self._refresh()
        spans = [_days(manifest) for manifest in self._manifests]
        for day in sorted({day for span in spans for day in span}, reverse=True):
            for hour in range(day * 24 + 23, day * 24 - 1, -1):
                if any(map(len, self._read(hour))):
                    return hour
        return None

    def load(self, hour: int) -> Iterator[pa.Array]:
        """The ids of one exchange hour, as Gold holds them now."""
        self._refresh()
        return self._read(hour)

    def _refresh(self) -> None:
        """Reads the table anew; if it has changed, the list of its manifests too."""
        with catalog_errors():
            reach(Point.GOLD_LOAD)
            table = load_table(self._catalog, GOLD)
            if self._table is not None and table.metadata_location == self._table.metadata_location:
                return
            snapshot = table.current_snapshot()
            self._table, self._manifests = table, snapshot.manifests(table.io) if snapshot else []
            self._has_deletes = any(manifest.content == ManifestContent.DELETES for manifest in self._manifests)
            paths = {manifest.manifest_path for manifest in self._manifests}
            self._read_manifests = {path: read for path, read in self._read_manifests.items() if path in paths}

    def _read(self, hour: int) -> Iterator[pa.Array]:
        assert self._table is not None
        with catalog_errors():
            tasks = self._tasks(hour)
            if not tasks:
                return
            columns = self._table.schema().select("message_id")
            scan = ArrowScan(self._table.metadata, self._table.io, columns, self._is_own)
            for batch in scan.to_record_batches(tasks):
                reach(Point.GOLD_READ)
                yield batch.column("message_id").cast(pa.string())

    def _tasks(self, hour: int) -> list[FileScanTask]:
        assert self._table is not None
        day, hour_of_day = divmod(hour, 24)
        if self._has_deletes:  # another engine's: which apply to which file PyIceberg knows
            its_hour = f"exchange_date = '{EPOCH + timedelta(days=day)}' and exchange_hour = {hour_of_day}"
            return list(self._table.scan(its_hour).filter(self._is_own).plan_files())
        covering = (manifest for manifest in self._manifests if day in _days(manifest))
        return [task for manifest in covering for task in self._entries(manifest).get(hour, ())]

    def _entries(self, manifest: ManifestFile) -> dict[int, list[FileScanTask]]:
        """The files of one manifest that may hold rows of this exchange, by their hour."""
        assert self._table is not None
        known = self._read_manifests.get(manifest.manifest_path)
        if known is None:
            may_be_own = _InclusiveMetricsEvaluator(self._table.schema(), self._is_own).eval
            found = defaultdict(list)
            for entry in manifest.fetch_manifest_entry(self._table.io):
                if may_be_own(entry.data_file):
                    day, hour_of_day = entry.data_file.partition[0], entry.data_file.partition[1]
                    found[day * 24 + hour_of_day].append(FileScanTask(without_statistics(entry.data_file)))
            known = self._read_manifests[manifest.manifest_path] = dict(found)
        return known


def _days(manifest: ManifestFile) -> range:
    """The days since 1970 among which are all those of a manifest of Gold (Iceberg spec, Appendix D)."""
    summaries = manifest.partitions
    if not summaries or summaries[0].lower_bound is None or summaries[0].upper_bound is None:
        return range(0)  # no day of Gold is null: it has no entries
    low, high = (int.from_bytes(b, "little", signed=True) for b in (summaries[0].lower_bound, summaries[0].upper_bound))
    return range(low, high + 1)
