"""The deduplication keys in Gold: the state of the deduplication. Everything else is a copy."""

import re
import zlib
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from types import MappingProxyType
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import parser
from pyiceberg.manifest import ManifestContent, ManifestFile
from pyiceberg.table import FileScanTask, Table

from k2flow.compat.pyiceberg.private import InclusiveMetricsEvaluator
from k2flow.dedup.cache import Position
from k2flow.dedup.keys import key_column, share_of
from k2flow.exchange import DEDUP_KEY
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.concurrent import read_ahead
from k2flow.iceberg.manifests import days_of, hour_of, without_statistics
from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.snapshots import main_lacks
from k2flow.layers import GOLD_TABLE

EXCHANGE = "exchange"
READ_AHEAD_BYTES = 64 << 20  # of keys that are read and wait
KEY_BYTES = 64  # of a key and its exchange in Arrow, about
MANIFEST_FACTOR = 30  # of a manifest's bytes, for its entries in memory
_PREFIX = re.compile(r"(\d+)-of-(\d+)-([0-9a-f]{8})-")


class _File(NamedTuple):
    """A file of an hour, with its data sequence number. It has no `task` if it has no row of the exchange."""

    number: int
    rows: int
    task: FileScanTask | None


class _Entries(NamedTuple):
    """The files of one manifest."""

    files: dict[int, list[_File]]  # by hour
    hours: list[int]  # those that may have rows of the exchange, in order
    sure: set[int]  # those in which a file has only rows of the exchange


class GoldIds:
    """The deduplication keys of one exchange in Gold, by exchange hour.

    A key that another engine deletes stays known while its data file is in the table: a message that is sent again
    does not bring it back. So delete files of no kind are read.

    Manifests never change, so each is read at most once, and only if it may cover a requested hour. Their entries of
    this exchange are kept in memory without statistics: about 2 KB per file. Files and manifests are read in threads,
    up to READ_AHEAD_BYTES or one file ahead. Raises CatalogError.
    """

    def __init__(
        self, catalog: Catalog, exchange: str, dedup_key: tuple[str, ...] = DEDUP_KEY, worker: int = 0, workers: int = 1
    ) -> None:
        """Open nothing yet. `exchange` is the value of Gold's column `exchange`.

        Files that `file_prefix` says to have no keys of this worker are not read.
        """
        self._catalog = catalog
        self._share = share_of(worker, workers)
        self._exchange = exchange
        self._dedup_key = dedup_key
        self._is_own = parser.parse(f"exchange = '{exchange}'")
        self._table: Table | None = None
        self._reader: FileReader | None = None
        self._manifests: list[tuple[range, ManifestFile]] = []  # with their days, the newest first
        self._read_manifests: dict[str, _Entries] = {}

    @property
    def position(self) -> Position:
        """The state of Gold that was loaded last."""
        assert self._table is not None
        snapshot, uuid = self._table.current_snapshot(), str(self._table.metadata.table_uuid)
        if snapshot is None:
            return Position(uuid, 0, None)
        return Position(uuid, snapshot.sequence_number or 0, snapshot.snapshot_id)

    def reload(self) -> Position:
        """Load the table again, and return its state."""
        self._refresh()
        return self.position

    def was_at(self, position: Position) -> bool:
        """Return False if main, as loaded, surely never was in this state, or was moved away from it."""
        assert self._table is not None
        if self.position.table != position.table:
            return False
        metadata = self._table.metadata
        same_number = {each.snapshot_id for each in metadata.snapshots if each.sequence_number == position.number}
        return same_number <= {position.snapshot} and not main_lacks(metadata, position.number)

    def rows(self, hour: int, until: int) -> int:
        """Return the number of rows of all exchanges in an hour, in files with a sequence number up to `until`."""
        return sum(file.rows for file in self._files(hour) if file.number <= until)

    def files(self, hour: int, after: int) -> set[str]:
        """Return the files of an hour, with a sequence number above `after`, that may have keys of this worker."""
        return {task.file.file_path for task in self._tasks(hour, after)}

    def newest_hours(self, until: Sequence[int]) -> list[int | None]:
        """Return, for each hour (since 1970), the newest one up to it in which Gold has a row of this exchange."""
        self._refresh()
        return [self._newest_hour(hour) for hour in until]

    def load(
        self, hours: Sequence[int], after: Mapping[int, int] = MappingProxyType({})
    ) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        """Yield, for each of some hours in order, the keys that are in Gold now. The table is loaded once for all.

        Of an hour in `after`, only files with a greater sequence number are read.
        """
        if not hours:
            return
        self._refresh()
        self._read_entries_of({hour // 24 for hour in hours})
        found = groupby(self._read(hours, after), key=lambda pair: pair[0])
        hour_found = next(found, None)
        for hour in hours:
            if hour_found is not None and hour_found[0] == hour:
                yield hour, (keys for _, arrays in hour_found[1] for keys in arrays)
                hour_found = next(found, None)
            else:
                yield hour, iter(())

    def _refresh(self) -> None:
        with catalog_errors():
            reach(Point.GOLD_LOAD)
            table = load_table(self._catalog, GOLD_TABLE)
            if self._table is not None and table.metadata_location == self._table.metadata_location:
                return
            snapshot = table.current_snapshot()
            manifests = snapshot.manifests(table.io) if snapshot else []
            columns = pa.schema([(name, pa.string()) for name in dict.fromkeys((*self._dedup_key, EXCHANGE))])
            self._table, self._reader = table, FileReader(table, columns, find_by_name=True)
            data = [(days_of(manifest), manifest) for manifest in manifests if manifest.content == ManifestContent.DATA]
            self._manifests = sorted(data, key=lambda pair: -pair[0].stop)
            paths = {manifest.manifest_path for manifest in manifests}
            self._read_manifests = {path: read for path, read in self._read_manifests.items() if path in paths}

    def _newest_hour(self, until: int) -> int | None:
        while (newest := self._newest_own(until)) is not None and not self._has_rows(newest):
            until = newest - 1  # its files are of another exchange
        return newest

    def _newest_own(self, until: int) -> int | None:
        """Return the newest hour whose files may have rows: from the newest manifests on, until none can be newer."""
        newest: int | None = None
        for days, manifest in self._manifests:
            if newest is not None and days.stop <= newest // 24:
                break
            if days.start * 24 <= until:
                self._read_entries([manifest])
                hours = self._read_manifests[manifest.manifest_path].hours
                if before := bisect_right(hours, until):
                    newest = max(hours[before - 1], hours[0] if newest is None else newest)
        return newest

    def _has_rows(self, hour: int) -> bool:
        """Return whether the exchange has rows in this hour. Files of several exchanges must be read."""
        sure = any(hour in entries.sure for entries in self._read_manifests.values())
        tasks = (file.task for file in self._files(hour))
        return sure or any(len(keys) for task in tasks if task for keys in self._keys(hour, task)[1])

    def _read(self, hours: Sequence[int], after: Mapping[int, int]) -> Iterator[tuple[int, list[pa.Array]]]:
        """Yield the keys of each file of some hours, hour after hour."""
        tasks = ((hour, task) for hour in hours for task in self._tasks(hour, after.get(hour, -1)))
        calls = ((task.file.record_count * KEY_BYTES, partial(self._keys, hour, task)) for hour, task in tasks)
        return read_ahead(calls, READ_AHEAD_BYTES)

    def _keys(self, hour: int, task: FileScanTask) -> tuple[int, list[pa.Array]]:
        """Return the keys of the exchange in one file."""
        assert self._table is not None
        assert self._reader is not None
        with catalog_errors():
            found = self._reader.read(task.file)
            batches = list(map(self._own_rows, found))
            reach(Point.GOLD_READ)
        strings = pa.schema([(name, pa.string()) for name in self._dedup_key])
        return hour, [key_column(each.select(self._dedup_key).cast(strings), self._dedup_key) for each in batches]

    def _own_rows(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        own = pc.equal(batch.column(EXCHANGE), self._exchange)
        return batch if own.true_count == len(own) else batch.filter(own)  # a copy of strings takes longer than reading

    def _tasks(self, hour: int, after: int = -1) -> list[FileScanTask]:
        files = (file.task for file in self._files(hour) if file.number > after)
        return [task for task in files if task and self._may_own(task.file.file_path)]

    def _may_own(self, path: str) -> bool:
        name = _PREFIX.match(path.rpartition("/")[2])
        if not name or name[3] != _key_checksum(self._dedup_key):
            return True
        return share_of(int(name[1]), int(name[2])).meets(self._share)

    def _files(self, hour: int) -> list[_File]:
        day = hour // 24
        self._read_entries_of({day})
        covering = (self._read_manifests[manifest.manifest_path] for days, manifest in self._manifests if day in days)
        return [file for entries in covering for file in entries.files.get(hour, ())]

    def _read_entries_of(self, days: set[int]) -> None:
        """Read the entries of the manifests of some days that were not read before."""
        some = sorted(days)
        self._read_entries([manifest for covered, manifest in self._manifests if _meets(covered, some)])

    def _read_entries(self, manifests: Sequence[ManifestFile]) -> None:
        """Read the entries of manifests that were not read before."""
        unread = [each for each in manifests if each.manifest_path not in self._read_manifests]
        calls = ((m.manifest_length * MANIFEST_FACTOR, partial(self._entries, m)) for m in unread)
        for manifest, entries in zip(unread, read_ahead(calls, READ_AHEAD_BYTES), strict=True):
            self._read_manifests[manifest.manifest_path] = entries

    def _entries(self, manifest: ManifestFile) -> _Entries:
        """Return the files of one manifest by their hour."""
        assert self._table is not None
        found, own, sure = defaultdict(list), set(), set()
        column = self._table.schema().find_field(EXCHANGE).field_id
        with catalog_errors():
            may_be_own = InclusiveMetricsEvaluator(self._table.schema(), self._is_own).eval
            for entry in manifest.fetch_manifest_entry(self._table.io):
                file = entry.data_file
                hour = hour_of(file.partition)
                task = FileScanTask(without_statistics(file)) if may_be_own(file) else None
                found[hour].append(_File(entry.sequence_number or 0, file.record_count, task))
                if task:
                    own.add(hour)
                    if (
                        (file.lower_bounds or {}).get(column)
                        == self._exchange.encode()
                        == (file.upper_bounds or {}).get(column)
                    ):
                        sure.add(hour)
        return _Entries(dict(found), sorted(own), sure)


def file_prefix(worker: int, workers: int, dedup_key: tuple[str, ...]) -> str:
    """Return what begins the name of a file whose keys all belong to one of several workers."""
    return f"{worker}-of-{workers}-{_key_checksum(dedup_key)}-" if workers > 1 else ""


def _key_checksum(dedup_key: tuple[str, ...]) -> str:
    """Return a name of the key's columns: other columns give other owners."""
    return f"{zlib.crc32(','.join(dedup_key).encode()):08x}"


def _meets(days: range, some: Sequence[int]) -> bool:
    """Return whether one of `some` days, in order, is in the range, which may be long."""
    at = bisect_left(some, days.start)
    return at < len(some) and some[at] in days
