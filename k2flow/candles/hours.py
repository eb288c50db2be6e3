"""The candle table, an hour at a time: each hour is one data file."""

from collections import OrderedDict
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile

from k2flow.candles.aggregate import empty, of_table
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.changes import Partition, files_of
from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import candles_definition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import CANDLES, CANDLES_TABLE

KEPT_CANDLES = 200_000
"""Candles of the hours used last that stay in memory: about 60 MB."""


class Hour(NamedTuple):
    """The candles of one hour (PARTIAL) in the table, and the paths of their files."""

    candles: pa.RecordBatch
    paths: tuple[str, ...]

    @property
    def trades(self) -> int:
        """The number of trades that the candles are made of."""
        return pc.sum(self.candles.column("trades")).as_py() or 0


class RecentHours(OrderedDict[Partition, Hour]):
    """The hours kept last, with up to KEPT_CANDLES candles together, or one hour."""

    def keep(self, partition: Partition, hour: Hour) -> None:
        """Keep an hour, and forget those kept before it if there are too many candles."""
        self[partition] = hour
        self.move_to_end(partition)
        while len(self) > 1 and sum(each.candles.num_rows for each in self.values()) > KEPT_CANDLES:
            self.popitem(last=False)


class CandleHours:
    """Reads and writes hours of the candle table, to which one process commits. Raises CatalogError, DataFileError."""

    def __init__(self, catalog: Catalog) -> None:
        """Load the table."""
        self._catalog = catalog
        table = load_table(catalog, CANDLES_TABLE)
        self._reader = FileReader.of_table(table, candles_definition())
        self._writer = DataFileWriter(table, candles_definition())
        self._kept = RecentHours()

    def read(self, partitions: Collection[Partition]) -> dict[Partition, Hour]:
        """Return hours as they were committed. One that the table lacks has no candles."""
        missing = [partition for partition in partitions if partition not in self._kept]
        files = files_of(load_table(self._catalog, CANDLES_TABLE), missing) if missing else {}
        hours = {partition: self._kept.get(partition) or self._hour(files[partition]) for partition in partitions}
        self.keep(hours)
        return hours

    def all_paths(self) -> dict[str, int]:
        """Return the paths of all files of the table, with their days since 1970."""
        found = files_of(load_table(self._catalog, CANDLES_TABLE))
        return {file.file_path: partition[0] for partition, files in found.items() for file in files}

    def write(self, candles: pa.RecordBatch) -> list[DataFile]:
        """Write the candles (PARTIAL) of one hour, sorted as the table is. No candles give no file."""
        return self._writer.write(candles.select(CANDLES.columns))

    def keep(self, hours: Mapping[Partition, Hour]) -> None:
        """Keep hours in memory, as they are now in the table."""
        for partition, hour in hours.items():
            self._kept.keep(partition, hour)

    def forget(self, partitions: Collection[Partition] | None) -> None:
        """Forget hours that are not in the table as they were; None: all."""
        for partition in list(self._kept) if partitions is None else partitions:
            self._kept.pop(partition, None)

    def _hour(self, files: Sequence[DataFile]) -> Hour:
        batches = [batch for file in files for batch in self._reader.read(file)]
        rows = pa.concat_batches(batches) if batches else empty().select(CANDLES.columns)
        return Hour(of_table(rows), tuple(file.file_path for file in files))
