"""The candle table, an hour at a time: each hour is one data file."""

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
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


class CandleHours:
    """Reads and writes hours of the candle table, to which one process commits. Raises CatalogError, DataFileError."""

    def __init__(self, catalog: Catalog) -> None:
        """Load the table."""
        self._catalog = catalog
        table = load_table(catalog, CANDLES_TABLE)
        self._reader = FileReader.of_table(table, candles_definition())
        self._writer = DataFileWriter(table, candles_definition())
        self._kept: OrderedDict[Partition, Hour] = OrderedDict()

    def read(self, partitions: Iterable[Partition]) -> dict[Partition, Hour]:
        """Return some hours as they were committed. An hour that the table lacks has no candles."""
        wanted = list(partitions)
        if unknown := [each for each in wanted if each not in self._kept]:
            found = files_of(load_table(self._catalog, CANDLES_TABLE), unknown)
            self.keep({partition: self._hour(found[partition]) for partition in unknown})
        hours = {partition: self._kept[partition] for partition in wanted}
        self._forget()
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
            self._kept[partition] = hour
            self._kept.move_to_end(partition)

    def forget_all(self) -> None:
        """Forget all hours: the table was written anew."""
        self._kept.clear()

    def _forget(self) -> None:
        while len(self._kept) > 1 and sum(hour.candles.num_rows for hour in self._kept.values()) > KEPT_CANDLES:
            self._kept.popitem(last=False)

    def _hour(self, files: Sequence[DataFile]) -> Hour:
        batches = [batch for file in files for batch in self._reader.read(file)]
        rows = pa.concat_batches(batches) if batches else empty().select(CANDLES.columns)
        return Hour(of_table(rows), tuple(file.file_path for file in files))
