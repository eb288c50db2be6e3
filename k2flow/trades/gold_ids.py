"""The deduplication keys in Gold: the state of the deduplication, which is stored nowhere else."""

from collections import defaultdict
from collections.abc import Iterator
from datetime import date, timedelta

import pyarrow as pa
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import parser
from pyiceberg.io.pyarrow import ArrowScan
from pyiceberg.manifest import ManifestContent, ManifestFile
from pyiceberg.table import FileScanTask, Table

from k2flow.compat.pyiceberg.private import InclusiveMetricsEvaluator
from k2flow.dedup.keys import key_column
from k2flow.failpoints import Point, reach
from k2flow.iceberg.catalog import catalog_errors, load_table
from k2flow.iceberg.manifests import without_statistics
from k2flow.layers import GOLD_TABLE

UNIX_EPOCH = date(1970, 1, 1)


class GoldIds:
    """The deduplication keys of one exchange in Gold, by exchange hour.

    Manifests never change, so each is read at most once, and only if it may cover a requested hour. Their entries of
    this exchange are kept in memory without statistics: about 2 KB per file. Raises CatalogError.
    """

    def __init__(self, catalog: Catalog, exchange: str, dedup_key: tuple[str, ...] = ("message_id",)) -> None:
        """Open nothing yet. `exchange` is the value of Gold's column `exchange`."""
        self._catalog = catalog
        self._dedup_key = dedup_key
        self._is_own = parser.parse(f"exchange = '{exchange}'")
        self._table: Table | None = None
        self._manifests: list[ManifestFile] = []
        self._read_manifests: dict[str, dict[int, list[FileScanTask]]] = {}
        self._has_deletes = False

    def newest_hour(self) -> int | None:
        """Return the newest hour (since 1970) in which Gold has a row of this exchange, or None without one."""
        self._refresh()
        spans = [_days(manifest) for manifest in self._manifests]
        for day in sorted({day for span in spans for day in span}, reverse=True):
            for hour in range(day * 24 + 23, day * 24 - 1, -1):
                if any(map(len, self._read(hour))):
                    return hour
        return None

    def load(self, hour: int) -> Iterator[pa.Array]:
        """Return the keys of one exchange hour that are in Gold now."""
        self._refresh()
        return self._read(hour)

    def _refresh(self) -> None:
        with catalog_errors():
            reach(Point.GOLD_LOAD)
            table = load_table(self._catalog, GOLD_TABLE)
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
            columns = self._table.schema().select(*self._dedup_key)
            scan = ArrowScan(self._table.metadata, self._table.io, columns, self._is_own)
            for batch in scan.to_record_batches(tasks):
                reach(Point.GOLD_READ)
                strings = pa.schema([(name, pa.string()) for name in self._dedup_key])
                yield key_column(batch.select(self._dedup_key).cast(strings), self._dedup_key)

    def _tasks(self, hour: int) -> list[FileScanTask]:
        assert self._table is not None
        day, hour_of_day = divmod(hour, 24)
        if self._has_deletes:  # by another engine; PyIceberg assigns them to files
            its_hour = f"exchange_date = '{UNIX_EPOCH + timedelta(days=day)}' and exchange_hour = {hour_of_day}"
            return list(self._table.scan(its_hour).filter(self._is_own).plan_files())
        covering = (manifest for manifest in self._manifests if day in _days(manifest))
        return [task for manifest in covering for task in self._entries(manifest).get(hour, ())]

    def _entries(self, manifest: ManifestFile) -> dict[int, list[FileScanTask]]:
        """Return the files of one manifest that may have rows of this exchange, by their hour."""
        assert self._table is not None
        known = self._read_manifests.get(manifest.manifest_path)
        if known is None:
            may_be_own = InclusiveMetricsEvaluator(self._table.schema(), self._is_own).eval
            found = defaultdict(list)
            for entry in manifest.fetch_manifest_entry(self._table.io):
                if may_be_own(entry.data_file):
                    day, hour_of_day = entry.data_file.partition[0], entry.data_file.partition[1]
                    found[day * 24 + hour_of_day].append(FileScanTask(without_statistics(entry.data_file)))
            known = self._read_manifests[manifest.manifest_path] = dict(found)
        return known


def _days(manifest: ManifestFile) -> range:
    """Return a range of days since 1970 that covers a manifest of Gold (Iceberg spec, Appendix D)."""
    summaries = manifest.partitions
    if not summaries or summaries[0].lower_bound is None or summaries[0].upper_bound is None:
        return range(0)  # no day of Gold is null: it has no entries
    low, high = (int.from_bytes(b, "little", signed=True) for b in (summaries[0].lower_bound, summaries[0].upper_bound))
    return range(low, high + 1)
