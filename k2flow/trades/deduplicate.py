"""Gold: valid trades of all exchanges, each deduplication key of an exchange once.

The set of keys is stored in Gold only; a cache keeps a copy. After a start the flow reads it back, an hour at a time,
when a batch first needs that hour. Each key belongs to one worker, so each worker's set is exact by itself.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa
from pyiceberg.manifest import DataFile
from typing_extensions import override

from k2flow.batches import joined
from k2flow.dedup.index import SeenIds
from k2flow.dedup.keys import Bools, Ints, key_column, owners_of
from k2flow.dedup.window import DiskWindow
from k2flow.exchange import Exchange
from k2flow.iceberg.committable import Committable
from k2flow.iceberg.manifests import hour_of
from k2flow.layers import FIRST_TRADE_US, GOLD, GOLD_TABLE, HOUR_US
from k2flow.observability import metrics, tracing
from k2flow.observability.metrics import BatchStats
from k2flow.trades.messages import MessageBatch
from k2flow.trades.validate import FUTURE_US, int64_times

FEW_ROWS = 1_000
HELD_BYTES = 16 << 20


@dataclass(frozen=True, kw_only=True)
class OwnedTrades:
    """Gold rows that may be duplicates, all of whose keys belong to worker `owner` of `owners`.

    `kafka_hours` are those of all messages of their batch, see `kafka_hours`.
    `ends_checkpoint`: the tables commit at the end of this epoch, so no row may be held back. Every owner gets such an
    item in such an epoch.
    """

    owner: int
    owners: int
    rows: pa.RecordBatch
    kafka_hours: Mapping[int, int]
    ends_checkpoint: bool

    @override
    def __reduce__(self) -> tuple[Callable[..., "OwnedTrades"], tuple[object, ...]]:
        """Have `pickle` send an IPC stream: by default it sends the whole parent of a small slice."""
        return _restored, (self.owner, self.owners, self._ipc_stream, self.kafka_hours, self.ends_checkpoint)

    @cached_property
    def _ipc_stream(self) -> bytes:
        """The rows for another process. Bytewax pickles an item twice: the first time to learn its size."""
        sink = pa.BufferOutputStream()
        with pa.ipc.new_stream(sink, self.rows.schema) as writer:
            writer.write_batch(self.rows)
        stream: bytes = sink.getvalue().to_pybytes()
        return stream


def _restored(owner: int, owners: int, stream: bytes, hours: Mapping[int, int], ends_checkpoint: bool) -> OwnedTrades:
    rows = pa.ipc.open_stream(stream).read_next_batch()
    return OwnedTrades(owner=owner, owners=owners, rows=rows, kafka_hours=hours, ends_checkpoint=ends_checkpoint)


def split_by_owner(
    trades: MessageBatch, kafka_hours: Mapping[int, int], dedup_key: tuple[str, ...], owners: int
) -> list[OwnedTrades]:
    """Return Gold's rows of `trades` by the worker that owns their deduplication keys.

    A batch without offsets, as each source's first one, goes to every owner: from then on it can sleep in an epoch.
    """
    rows = GOLD.rows(trades.rows)
    if owners == 1:
        parts = [rows]
    else:
        owner_of_row = owners_of(key_column(rows, dedup_key), owners)
        parts = [rows.filter(pa.array(owner_of_row == w)) for w in range(owners)]
    return [
        OwnedTrades(owner=w, owners=owners, rows=part, kafka_hours=kafka_hours, ends_checkpoint=trades.ends_checkpoint)
        for w, part in enumerate(parts)
        if part.num_rows or trades.ends_checkpoint or not trades.offsets
    ]


def kafka_hours(kafka_times: pa.TimestampArray, trades: pa.RecordBatch) -> Mapping[int, int]:
    """Return the hours, since 1970, of Kafka's time in a batch, each with its number of messages.

    They are those of a minute later, since a trade may be so much ahead. If a message has no usable time, the hours of
    ingestion of all `trades` in the batch are added: its producer's clock stands for Kafka's.
    """
    known = int64_times(kafka_times.drop_null())
    hours = (known[known >= FIRST_TRADE_US] + FUTURE_US) // HOUR_US
    if len(hours) < len(kafka_times):
        hours = np.append(hours, int64_times(trades.column("ingestion_timestamp")) // HOUR_US)
    if len(hours) and (first := hours.min()) == hours.max():
        return {int(first): len(hours)}
    distinct, counts = np.unique(hours, return_counts=True)
    return dict(zip(distinct.tolist(), counts.tolist(), strict=True))


def hours_of(trades: pa.RecordBatch) -> Ints:
    """Return the exchange hour of each of n trades, in hours since 1970."""
    hours: Ints = trades.column("timestamp").cast(pa.int64()).to_numpy() // HOUR_US
    return hours


def are_few(hours: Ints) -> Bools:
    """Return which of n rows, given their hours, are in a run of at most FEW_ROWS rows of one hour."""
    starts = np.flatnonzero(np.diff(hours, prepend=hours[:1] - 1))
    lengths = np.diff(starts, append=len(hours))
    return np.repeat(lengths <= FEW_ROWS, lengths)


class HeldRows:
    """Holds back new rows until they make a file worth its cost: small files cost nearly as much as large ones.

    All rows wait until HELD_BYTES are together. Several workers send parts of one batch, and each may come alone. Then
    rows of an hour with few rows wait for the commit, up to HELD_BYTES too.
    """

    def __init__(self) -> None:
        self._held: list[pa.RecordBatch] = []
        self._few: list[pa.RecordBatch] = []

    def ready(self, rows: pa.RecordBatch, first: Bools, ends_checkpoint: bool) -> pa.RecordBatch:
        """Return the rows to write now, of the rows held and of the `first` ones among `rows`; all before a commit."""
        self._held.append(rows if first.all() else rows.filter(pa.array(first)))
        if not ends_checkpoint and _nbytes(self._held) < HELD_BYTES:
            return rows.slice(0, 0)
        held, self._held = joined(self._held), []
        few = are_few(hours_of(held))
        if few.any() and not ends_checkpoint:
            self._few.append(held.filter(pa.array(few)))
            held = held.filter(pa.array(~few))
        if self._few and (ends_checkpoint or _nbytes(self._few) > HELD_BYTES):
            held = joined([*self._few, held])
            self._few = []
        return held


def _nbytes(batches: Sequence[pa.RecordBatch]) -> int:
    return sum(batch.nbytes for batch in batches)


class Deduplicator:
    """Writes the rows whose keys are new into Gold's data files.

    Delivery guarantee: within the hot window no two Gold rows of the exchange share a key; outside it none within the
    same exchange hour. The window is `dedup_window_hours` long and follows Kafka's time, see `SeenIds`. Rows that a
    crash leaves uncommitted are not in Gold, and so not in the set of the next start. Committed rows are, and are
    dropped when they are read again.
    """

    def __init__(
        self,
        exchange: Exchange,
        seen: SeenIds,
        write: Callable[[str, pa.RecordBatch], Callable[[], list[DataFile]]],
        disk: DiskWindow | None = None,
    ) -> None:
        """`write` begins to write Gold's files. `disk` is that of `seen`."""
        self._exchange = exchange
        self._seen = seen
        self._write = write
        self._disk = disk
        self._files: list[Callable[[], list[DataFile]]] = []  # of the rows since the last commit
        self._held = HeldRows()
        self._committing = False  # at the end of this epoch
        self._committed = False  # at the end of the one before

    def process(self, items: Sequence[OwnedTrades]) -> Committable:
        """Return the files of the rows to write now; `items` are of one owner and one epoch, from any worker."""
        if self._committed:  # only now, in a new epoch: it begins only when the tables hold the earlier ones
            self._seen.on_commit((hour_of(file.partition), file.file_path) for files in self._files for file in files())
            self._files.clear()
            self._committed = False
        # Items of several workers come in any order: after the first one that ends a checkpoint, no row is held back.
        self._committing |= any(item.ends_checkpoint for item in items)
        # Rows from several workers go into the same files.
        rows = joined([item.rows for item in items])
        hours = hours_of(rows)
        kafka = sum((Counter(item.kafka_hours) for item in items), Counter[int]())
        with tracing.span("dedup", rows=rows.num_rows):
            first = self._seen.accept_new(key_column(rows, self._exchange.dedup_key), hours, kafka)
        stats = BatchStats(duplicates=rows.num_rows - int(first.sum()))
        ready = self._held.ready(rows, first, self._committing)
        with tracing.span("write", table=GOLD_TABLE, rows=ready.num_rows):
            files = self._write(GOLD_TABLE, ready)
        if self._disk:
            self._files.append(files)
        self._count(str(items[0].owner))
        return Committable(table=GOLD_TABLE, files=files, stats=stats)

    def on_epoch_end(self) -> None:
        """Note that an epoch is over: the tables commit now if one of its items ended a checkpoint.

        It may be called several times, for epochs without items too.
        """
        self._committed |= self._committing
        self._committing = False

    def _count(self, owner: str) -> None:
        labels = (self._exchange.name, owner)
        metrics.SEEN_IDS.labels(*labels).set(self._seen.ids)
        metrics.SEEN_BYTES.labels(*labels).set(self._seen.nbytes)
        if self._disk:
            metrics.SEEN_DISK_BYTES.labels(*labels).set(self._disk.disk_bytes)
            metrics.SEEN_DISK_HITS.labels(*labels).set(self._disk.hits)
            if self._committing:
                self._disk.write_figures(len(self._seen.hours), self._seen.ids, self._seen.nbytes)
