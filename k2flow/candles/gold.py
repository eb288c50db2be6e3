"""Reads the trades of Gold's data files as candles."""

from collections.abc import Iterator, Mapping, Sequence

import pyarrow as pa
from pyiceberg.manifest import DataFile
from pyiceberg.table import Table

from k2flow.batches import gathered
from k2flow.candles.aggregate import TRADES, Merged, candles_of, empty, merge
from k2flow.errors import DataFileError
from k2flow.iceberg.changes import Partition
from k2flow.iceberg.deletes import applied_deletes, deletes_text
from k2flow.iceberg.manifests import hour_of
from k2flow.iceberg.reader import FileReader
from k2flow.layers import GOLD_TABLE, HOUR_US

READ_ROWS = 1 << 18
JOINED_ROWS = 1 << 15  # copying larger batches costs more than it saves
HELD_CANDLES = 1 << 17  # before those of equal keys are merged
MESSAGE_ID = "message_id"
_WITHOUT_IDS = pa.schema([field for field in TRADES if field.name != MESSAGE_ID])


class GoldTrades:
    """Reads files of Gold, as the table was loaded. Raises DataFileError, CatalogError.

    `with_message_ids`: whether those of trades are read. It becomes true for good once an open or close needs them:
    they are half of the work, and an exchange without ties never needs them.

    Memory: a batch of READ_ROWS trades, or smaller ones joined, and the candles of the hours asked for.
    """

    def __init__(self, table: Table, with_message_ids: bool) -> None:
        """Refuse a table to which another engine's delete files apply: they may take rows from files read before."""
        if deletes := applied_deletes(table, table.current_snapshot()):
            raise DataFileError(deletes_text(GOLD_TABLE, deletes))
        self._table = table
        self.with_message_ids = with_message_ids

    def candles(self, hours: Mapping[Partition, Sequence[DataFile]]) -> pa.RecordBatch:
        """Return the candles of all trades in some files of each hour, merged, as PARTIAL."""
        found = self._merged(hours)
        if found.ambiguous:
            self.with_message_ids = True
            found = self._merged(hours)
        return found.candles

    def _merged(self, hours: Mapping[Partition, Sequence[DataFile]]) -> Merged:
        reader = FileReader(self._table, TRADES if self.with_message_ids else _WITHOUT_IDS, find_by_name=True)
        held, ambiguous = [empty()], set[int]()
        batches = (
            batch for partition, files in hours.items() for file in files for batch in _batches(reader, file, partition)
        )
        for trades in gathered(batches, JOINED_ROWS):
            candles, unclear = candles_of(_with_ids(trades))
            held.append(candles)
            ambiguous |= unclear
            if sum(each.num_rows for each in held) > HELD_CANDLES:
                candles, unclear = merge(pa.concat_batches(held))
                held = [candles]
                ambiguous |= unclear
        candles, unclear = merge(pa.concat_batches(held))
        return Merged(candles, unclear | ambiguous)


def _batches(reader: FileReader, file: DataFile, partition: Partition) -> Iterator[pa.RecordBatch]:
    rows = 0
    for batch in reader.stream(file, READ_ROWS):
        _check(batch, file, partition)
        rows += batch.num_rows
        yield batch
    if rows != file.record_count:
        raise DataFileError(f"{file.file_path} has {rows} rows, and its manifest says {file.record_count}")


def _with_ids(trades: pa.RecordBatch) -> pa.RecordBatch:
    """Return trades as TRADES, with null message ids if they lack them."""
    unknown = pa.nulls(trades.num_rows, TRADES.field(MESSAGE_ID).type)
    columns = [trades.column(name) if name in trades.schema.names else unknown for name in TRADES.names]
    return pa.RecordBatch.from_arrays(columns, schema=TRADES)


def _check(trades: pa.RecordBatch, file: DataFile, partition: Partition) -> None:
    """Refuse trades that another program has written: without a value, or in a partition of another hour."""
    for name, column in zip(trades.schema.names, trades.columns, strict=True):
        if column.null_count:
            raise DataFileError(f"{file.file_path} has a trade without {name}: run k2flow audit")
    hours = trades.column("timestamp").cast(pa.int64()).to_numpy() // HOUR_US
    if (hours != hour_of(partition)).any():
        raise DataFileError(f"{file.file_path} has trades of another hour than its partition: run k2flow audit")
