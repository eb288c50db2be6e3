"""Brings the candle table from one state of Gold to another one.

The table is a pure function of Gold at one of its snapshots. Work follows new trades: candles are made of Gold's new
files, and merged with those of their minutes in the table. The candles of an hour are computed again if

- a commit replaced or removed trades of it, or a compacted file has new trades beside old ones, see
  k2flow.iceberg.changes;
- an open or close ties with that of the table up to the trade id, see k2flow.candles.aggregate.

All hours are computed again if Gold is another table, if its main branch was moved, or if another program removed rows.
"""

import json
import logging
import time
from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from uuid import UUID

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.candles.aggregate import KEY, Merged, merge
from k2flow.candles.gold import GoldTrades
from k2flow.candles.hours import CandleHours, Hour, RecentHours
from k2flow.iceberg.changes import Changes, Partition, Position, changes, files_of
from k2flow.iceberg.ledger import CommittedRange, Ledger
from k2flow.iceberg.manifests import hour_of, partition_values
from k2flow.iceberg.snapshots import head_number
from k2flow.layers import GOLD_TABLE, HOUR_US

log = logging.getLogger(__name__)
NAME = "candles"
"""In the ledger's property, in metrics, in commands: it takes the place of an exchange's name."""
SOURCE_KEY = "k2flow.source"
"""The property with the state of Gold that the candles are of, in JSON: its uuid and its snapshot's sequence number.

`"complete": false` stands there while many new trades are committed in parts.
"""


MAX_TRADES = 100_000_000
"""New trades of one commit, about: maintenance may delete files that wait longer for theirs, see flow.sink."""
GROUP_HOURS, GROUP_TRADES = 24, 1 << 18  # hours that are read and merged at once, and about the trades in their files


@dataclass(frozen=True, kw_only=True)
class CandleUpdate:
    """One commit of the candle table: the files to add, and those to remove, with their days since 1970."""

    source: Position  # the state of Gold that the table has afterwards
    complete: bool = True  # whether it is Gold at that snapshot, not a part of its changes up to there
    files: Sequence[DataFile] = ()
    removed: Mapping[str, int] = field(default_factory=dict)
    changed: Collection[Partition] | None = ()  # the hours that are not as before; None: all
    hours: Mapping[Partition, Hour] = field(default_factory=dict)  # some of them, as they are afterwards
    began: float = 0.0  # when its first file may have been written, by the monotonic clock
    gold_committed_ms: int | None = None  # the time of Gold's first commit that the table did not have

    @property
    def held(self) -> dict[int, CommittedRange]:
        """What the ledger holds afterwards: Gold's sequence numbers are its offsets, and its rows are trades."""
        return {0: CommittedRange(0, self.source.sequence_number + 1, self.source.rows)}

    @property
    def properties(self) -> dict[str, str]:
        """The table properties to set."""
        source = {"table_uuid": str(self.source.table_uuid), "sequence_number": self.source.sequence_number}
        return {SOURCE_KEY: json.dumps(source if self.complete else {**source, "complete": False})}


def position_of(ledger: Ledger) -> Position | None:
    """Return the state of Gold that the candle table has; None before its first commit."""
    held = ledger.partitions.get(0)
    return None if held is None else Position(UUID(ledger.topic_id), held.next - 1, held.rows)


class CandleTable:
    """Computes the updates of the candle table. Raises CatalogError, CommitError, DataFileError.

    Memory: a batch of trades, the candles of GROUP_HOURS hours, and those of the hours used last.
    """

    def __init__(self, catalog: Catalog, position: Position | None) -> None:
        """`position` is the state of Gold that the table has; None: it must be computed again."""
        self.position = position
        self._hours = CandleHours(catalog)
        self._with_message_ids = False

    def has(self, gold: Table) -> bool:
        """Return whether the table has the state of Gold as it was loaded."""
        now = gold.metadata.table_uuid, head_number(gold.metadata)
        return self.position is not None and now == (self.position.table_uuid, self.position.sequence_number)

    def update(self, gold: Table) -> CandleUpdate:
        """Return an update towards Gold as it was loaded. Writes data files.

        It takes about MAX_TRADES new trades at most, those with the earliest sequence numbers.
        """
        began = time.monotonic()
        feed = changes(gold, self.position, self._trades_in, MAX_TRADES)
        trades = GoldTrades(gold, self._with_message_ids)
        update = self._whole(feed, trades) if feed.whole else self._changed(feed, gold, trades)
        self._with_message_ids = trades.with_message_ids
        complete = feed.position.sequence_number == head_number(gold.metadata)
        since = _first_commit_ms(gold, self.position)
        return replace(update, complete=complete, began=began, gold_committed_ms=since)

    def on_committed(self, update: CandleUpdate) -> None:
        """Note that an update is in the table."""
        self.position = update.source
        self._hours.forget(update.changed)
        self._hours.keep(update.hours)

    def _trades_in(self, partition: Partition) -> int:
        return self._hours.read([partition])[partition].trades

    def _whole(self, feed: Changes, trades: GoldTrades) -> CandleUpdate:
        """Compute all hours again, one after the other."""
        removed = self._hours.all_paths()
        if removed:
            log.warning("all candles are computed again: of %s: %s", GOLD_TABLE, feed.whole)
        added: list[DataFile] = []
        for partition, files in _by_partition(feed.appended).items():
            candles = trades.candles({partition: files})
            _warn_of_overflows(candles)
            added += self._hours.write(candles)
        return CandleUpdate(source=feed.position, files=added, removed=removed, changed=None)

    def _changed(self, feed: Changes, gold: Table, trades: GoldTrades) -> CandleUpdate:
        """Merge new trades with the hours they belong to, and compute replaced hours again."""
        added: list[DataFile] = []
        removed: dict[str, int] = {}
        changed: list[Partition] = []
        hours = RecentHours()
        for partition, candles, old in self._new_hours(feed, gold, trades):
            _warn_of_overflows(candles)
            files = self._hours.write(candles)
            added += files
            removed.update((path, partition[0]) for path in old.paths)
            changed.append(partition)
            hours.keep(partition, Hour(candles, tuple(file.file_path for file in files)))
        return CandleUpdate(source=feed.position, files=added, removed=removed, changed=changed, hours=hours)

    def _new_hours(
        self, feed: Changes, gold: Table, trades: GoldTrades
    ) -> Iterator[tuple[Partition, pa.RecordBatch, Hour]]:
        """Yield each hour whose candles change: its partition, its new candles, and the hour as it was."""
        for hours in _in_groups(_by_partition(feed.appended)):
            old = self._hours.read(hours)
            merged = _with_new(old, trades.candles(hours))
            for partition, (candles, ambiguous) in merged.items():
                if ambiguous:
                    trades.with_message_ids = True
                    every = files_of(gold, [partition], feed.position.sequence_number)
                    candles = trades.candles(every)
                yield partition, candles, old[partition]
        for hours in _in_groups(feed.replaced):
            old = self._hours.read(hours)
            for partition, files in hours.items():
                candles = trades.candles({partition: files})
                if not _same(candles, old[partition].candles):
                    yield partition, candles, old[partition]


def _in_groups(hours: Mapping[Partition, Sequence[DataFile]]) -> Iterator[dict[Partition, Sequence[DataFile]]]:
    """Yield hours with their files in groups: several hours at once cost little more than one."""
    group: dict[Partition, Sequence[DataFile]] = {}
    rows = 0
    for partition, files in hours.items():
        group[partition] = files
        rows += sum(file.record_count for file in files)
        if len(group) == GROUP_HOURS or rows >= GROUP_TRADES:
            yield group
            group, rows = {}, 0
    if group:
        yield group


def _with_new(old: Mapping[Partition, Hour], new: pa.RecordBatch) -> dict[Partition, Merged]:
    """Return the candles of each hour merged with those of new trades, which may belong to any of the hours."""
    minutes = pc.unique(new.column("open_time"))
    touched = {partition: pc.is_in(hour.candles.column("open_time"), minutes) for partition, hour in old.items()}
    before = [hour.candles.filter(touched[partition]) for partition, hour in old.items()]
    merged, ambiguous = merge(pa.concat_batches([*before, new]))
    hours = merged.column("open_time").cast(pa.int64()).to_numpy() // HOUR_US
    found = {}
    for partition, hour in old.items():
        number = hour_of(partition)
        untouched = hour.candles.filter(pc.invert(touched[partition]))
        own = merged.filter(pa.array(hours == number))
        unclear = frozenset(minute for minute in ambiguous if minute // HOUR_US == number)
        found[partition] = Merged(pa.concat_batches([untouched, own]), unclear)
    return found


def _same(one: pa.RecordBatch, other: pa.RecordBatch) -> bool:
    """Return whether both have the same candles, in any order."""
    columns = [name for name in one.schema.names if not name.endswith("_message_id")]
    keys = [(name, "ascending") for name in KEY]
    first, second = (each.take(pc.sort_indices(each, keys)).select(columns) for each in (one, other))
    return bool(first.equals(second))


def _by_partition(files: Sequence[DataFile]) -> dict[Partition, list[DataFile]]:
    found: dict[Partition, list[DataFile]] = defaultdict(list)
    for file in files:
        found[partition_values(file)].append(file)
    return dict(sorted(found.items()))


def _first_commit_ms(gold: Table, after: Position | None) -> int | None:
    """Return the time of Gold's first commit after a position, among the snapshots that it still has."""
    number = after.sequence_number if after else 0
    times = [each.timestamp_ms for each in gold.metadata.snapshots if (each.sequence_number or 0) > number]
    return min(times, default=None)


def _warn_of_overflows(candles: pa.RecordBatch) -> None:
    """Name the candles whose sum of price x quantity has more digits than its column."""
    for row in candles.filter(candles.column("quote_volume").is_null()).to_pylist():
        text = "%s %s, minute %s: the sum of price x quantity has more than 38 digits: quote_volume is null"
        log.error(text, row["exchange"], row["symbol"], row["open_time"].isoformat())
