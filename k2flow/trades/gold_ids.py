"""The deduplication keys in Gold: the state of the deduplication, which is stored nowhere else."""

from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import parser
from pyiceberg.manifest import ManifestContent, ManifestFile
from pyiceberg.table import FileScanTask, Table

from k2flow.compat.pyiceberg.private import InclusiveMetricsEvaluator
from k2flow.dedup.keys import key_column
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.concurrent import read_ahead
from k2flow.iceberg.manifests import days_of, without_statistics
from k2flow.iceberg.reader import FileReader
from k2flow.layers import GOLD_TABLE

EXCHANGE = "exchange"
READ_AHEAD_BYTES = 64 << 20  # of keys that are read and wait
KEY_BYTES = 64  # of a key and its exchange in Arrow, about
MANIFEST_FACTOR = 30  # of a manifest's bytes, for its entries in memory


class _Entries(NamedTuple):
    """The files of one manifest that may have rows of the exchange."""

    tasks: dict[int, list[FileScanTask]]  # by hour
    hours: list[int]  # the same, in order
    sure: set[int]  # those in which a file has only rows of the exchange


class GoldIds:
    """The deduplication keys of one exchange in Gold, by exchange hour.

    A key that another engine deletes stays known while its data file is in the table: a message that is sent again
    does not bring it back. So delete files of no kind are read.

    Manifests never change, so each is read at most once, and only if it may cover a requested hour. Their entries of
    this exchange are kept in memory without statistics: about 2 KB per file. Files and manifests are read in threads,
    up to READ_AHEAD_BYTES or one file ahead. Raises CatalogError.
    """

    def __init__(self, catalog: Catalog, exchange: str, dedup_key: tuple[str, ...] = ("message_id",)) -> None:
        """Open nothing yet. `exchange` is the value of Gold's column `exchange`."""
        self._catalog = catalog
        self._exchange = exchange
        self._dedup_key = dedup_key
        self._is_own = parser.parse(f"exchange = '{exchange}'")
        self._table: Table | None = None
        self._reader: FileReader | None = None
        self._manifests: list[tuple[range, ManifestFile]] = []  # with their days, the newest first
        self._read_manifests: dict[str, _Entries] = {}

    def newest_hours(self, until: Sequence[int]) -> list[int | None]:
        """Return, for each hour (since 1970), the newest one up to it in which Gold has a row of this exchange."""
        self._refresh()
        return [self._newest_hour(hour) for hour in until]

    def load(self, hours: Sequence[int]) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        """Yield, for each of some hours in order, the keys that are in Gold now. The table is loaded once for all."""
        if not hours:
            return
        self._refresh()
        days = sorted({hour // 24 for hour in hours})
        self._read_entries([manifest for covered, manifest in self._manifests if _meets(covered, days)])
        found = groupby(self._read(hours), key=lambda pair: pair[0])
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
        return sure or any(len(keys) for task in self._tasks(hour) for keys in self._keys(hour, task)[1])

    def _read(self, hours: Sequence[int]) -> Iterator[tuple[int, list[pa.Array]]]:
        """Yield the keys of each file of some hours, hour after hour. `_read_entries` has read their manifests."""
        tasks = ((hour, task) for hour in hours for task in self._tasks(hour))
        calls = ((task.file.record_count * KEY_BYTES, partial(self._keys, hour, task)) for hour, task in tasks)
        return read_ahead(calls, READ_AHEAD_BYTES)

    def _keys(self, hour: int, task: FileScanTask) -> tuple[int, list[pa.Array]]:
        """Return the keys of the exchange in one file."""
        assert self._table is not None
        assert self._reader is not None
        with catalog_errors():
            found = self._reader.read(task.file)
            batches = [batch.filter(pc.equal(batch.column(EXCHANGE), self._exchange)) for batch in found]
            reach(Point.GOLD_READ)
        strings = pa.schema([(name, pa.string()) for name in self._dedup_key])
        return hour, [key_column(each.select(self._dedup_key).cast(strings), self._dedup_key) for each in batches]

    def _tasks(self, hour: int) -> list[FileScanTask]:
        assert self._table is not None
        day = hour // 24
        covering = (
            self._read_manifests.get(manifest.manifest_path) for days, manifest in self._manifests if day in days
        )
        return [task for entries in covering if entries for task in entries.tasks.get(hour, ())]

    def _read_entries(self, manifests: Sequence[ManifestFile]) -> None:
        """Read the entries of manifests that were not read before."""
        unread = [each for each in manifests if each.manifest_path not in self._read_manifests]
        calls = ((m.manifest_length * MANIFEST_FACTOR, partial(self._entries, m)) for m in unread)
        for manifest, entries in zip(unread, read_ahead(calls, READ_AHEAD_BYTES), strict=True):
            self._read_manifests[manifest.manifest_path] = entries

    def _entries(self, manifest: ManifestFile) -> _Entries:
        """Return the files of one manifest that may have rows of this exchange, by their hour."""
        assert self._table is not None
        found, sure = defaultdict(list), set()
        column = self._table.schema().find_field(EXCHANGE).field_id
        with catalog_errors():
            may_be_own = InclusiveMetricsEvaluator(self._table.schema(), self._is_own).eval
            for entry in manifest.fetch_manifest_entry(self._table.io):
                file = entry.data_file
                if may_be_own(file):
                    hour = file.partition[0] * 24 + file.partition[1]
                    found[hour].append(FileScanTask(without_statistics(file)))
                    if (
                        (file.lower_bounds or {}).get(column)
                        == self._exchange.encode()
                        == (file.upper_bounds or {}).get(column)
                    ):
                        sure.add(hour)
        return _Entries(dict(found), sorted(found), sure)


def _meets(days: range, some: Sequence[int]) -> bool:
    """Return whether one of `some` days, in order, is in the range, which may be long."""
    at = bisect_left(some, days.start)
    return at < len(some) and some[at] in days
