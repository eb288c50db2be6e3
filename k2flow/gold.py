"""Gold: valid trades of all exchanges, each message_id of an exchange once.

The set of ids is not kept anywhere but in Gold itself: a flow that starts reads it back, an hour at a time, when a
batch first needs it. An id belongs to one worker, so that each worker's set is exact alone.
"""

import logging
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from bytewax.operators import StatefulBatchLogic
from pyiceberg.expressions import parser
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.table import FileScanTask, Table

from k2flow.catalog import catalog_errors, load_table
from k2flow.context import FlowContext
from k2flow.dedup.index import SeenIds
from k2flow.dedup.keys import owner
from k2flow.exchange import GOLD
from k2flow.failpoints import Point, reach
from k2flow.failure import logged
from k2flow.messages import Slice
from k2flow.routing import worker_key
from k2flow.sink import Written
from k2flow.tables import GOLD_FIELDS, arrow_schema

log = logging.getLogger(__name__)

HOUR_US = 3_600_000_000
GOLD_SCHEMA = arrow_schema(GOLD_FIELDS)


@dataclass(frozen=True)
class Candidates:
    """Gold rows that may be duplicates, all of whose ids belong to worker `owner` of `workers`."""

    owner: int
    workers: int
    rows: pa.RecordBatch


def hours_of(trades: pa.RecordBatch) -> npt.NDArray[np.int64]:
    """The exchange hour of each of n trades, in hours since 1970."""
    hours: npt.NDArray[np.int64] = trades.column("timestamp").cast(pa.int64()).to_numpy() // HOUR_US
    return hours


def gold_rows(trades: pa.RecordBatch) -> pa.RecordBatch:
    """Silver's columns and `exchange_hour` (0-23, UTC)."""
    hour = pa.array((hours_of(trades) % 24).astype(np.int32))
    return pa.RecordBatch.from_arrays([*trades.columns, hour], schema=GOLD_SCHEMA)


def candidates(trades: Slice, workers: int) -> list[tuple[str, Candidates]]:
    """The rows of `trades` by the worker that owns their ids, each with the key that Bytewax routes to it."""
    rows = gold_rows(trades.rows)
    if rows.num_rows == 0:
        return []
    if workers == 1:
        return [(worker_key(0, 1), Candidates(0, 1, rows))]
    owners = owner(rows.column("message_id"), workers)
    return [
        (worker_key(w, workers), Candidates(w, workers, rows.filter(pa.array(owners == w))))
        for w in np.unique(owners).tolist()
    ]


class Deduplicator(StatefulBatchLogic[Candidates, Written, None]):
    """Writes the rows whose ids are new into Gold's data files.

    Delivery guarantee: within the hot window (`dedup_window_hours` back from Gold's newest hour) no two Gold rows of
    the exchange share a message_id; beyond it none within the same exchange_hour. What a crash left uncommitted is not
    in Gold and so not in the set of the next start; what was committed is, and is dropped when it is read again.
    """

    def __init__(self, context: FlowContext) -> None:
        self._context = context
        self._writer = context.writer(GOLD)
        self._seen: SeenIds | None = None
        self._epoch_ended = False

    @logged
    def on_batch(self, values: list[Candidates]) -> tuple[list[Written], bool]:
        if self._seen is None:
            self._seen = self._open(values[0].owner, values[0].workers)
        if self._epoch_ended:  # a new epoch begins only when the tables hold the earlier ones
            self._seen.commit()
            self._epoch_ended = False
        # What several workers have sent goes into the same files.
        rows = pa.concat_batches([value.rows for value in values]) if len(values) > 1 else values[0].rows
        first = self._seen.first_seen(rows.column("message_id"), hours_of(rows))
        fresh = rows if first.all() else rows.filter(pa.array(first))
        written = Written(self._context.write(self._writer, fresh))
        reach(Point.GOLD_WRITTEN)
        return [written], StatefulBatchLogic.RETAIN

    def snapshot(self) -> None:
        self._epoch_ended = True

    def _open(self, worker: int, workers: int) -> SeenIds:
        ids = GoldIds(self._context)
        window = self._context.exchange.settings.dedup_window_hours
        return SeenIds(ids.load, ids.newest_hour(), window, worker, workers)


class GoldIds:
    """The message ids of one exchange that Gold holds, by exchange hour. Raises CatalogError."""

    def __init__(self, context: FlowContext) -> None:
        self._context = context
        self._is_own = parser.parse(f"exchange = '{context.exchange.code}'")
        self._table: Table | None = None
        self._files: dict[int, list[FileScanTask]] = {}

    def newest_hour(self) -> int | None:
        """The newest hour (since 1970) in which Gold has a row of this exchange; None if there is none."""
        self._refresh()
        return next((hour for hour in sorted(self._files, reverse=True) if any(map(len, self._read(hour)))), None)

    def load(self, hour: int) -> Iterator[pa.Array]:
        """The ids of one exchange hour, as Gold holds them now."""
        self._refresh()
        return self._read(hour)

    def _refresh(self) -> None:
        """Reads the table anew; which files hold which hour is worked out again only if it has changed."""
        with catalog_errors():
            reach(Point.GOLD_LOAD)
            table = load_table(self._context.catalog, GOLD)
            if self._table is not None and table.metadata_location == self._table.metadata_location:
                return
            files = defaultdict(list)
            for task in table.scan(row_filter=self._is_own).plan_files():
                day, hour = task.file.partition[0], task.file.partition[1]
                files[day * 24 + hour].append(task)
            self._table, self._files = table, dict(files)

    def _read(self, hour: int) -> Iterator[pa.Array]:
        assert self._table is not None
        tasks = self._files.get(hour)
        if not tasks:
            return
        columns = self._table.schema().select("message_id")
        with catalog_errors():
            scan = ArrowScan(self._table.metadata, self._table.io, columns, self._is_own)
            for batch in scan.to_record_batches(tasks):
                reach(Point.GOLD_READ)
                yield batch.column("message_id").cast(pa.string())
