"""Data files anew: without the rows that go, and with those that come. Nothing of it is committed here."""

from collections.abc import Iterator, Mapping

import numpy as np
import pyarrow as pa
from pyiceberg.manifest import DataFile

from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import ROW_HASH, hashable
from k2flow.layers import GOLD, SILVER
from k2flow.reprocess.difference import HASHES, Difference, Replaced
from k2flow.reprocess.scope import Advance, Scope
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.messages import MessageBatch

GATHERED_BYTES = 128 << 20
"""New rows of a table are held until they are so many, so that they do not make many small files."""
_SILVER = SILVER.arrow_schema


class Gathered:
    """Rows that come into one table, written whenever they are many."""

    def __init__(self, writer: DataFileWriter) -> None:
        self._writer = writer
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self.files: list[DataFile] = []

    def add(self, rows: pa.RecordBatch) -> None:
        if rows.num_rows:
            self._batches.append(rows)
            self._bytes += rows.nbytes
        if self._bytes >= GATHERED_BYTES:
            self.write()

    def write(self) -> list[DataFile]:
        """Writes what is held; returns all files so far."""
        if self._batches:
            self.files += self._writer.write(pa.concat_batches(self._batches))
        self._batches, self._bytes = [], 0
        return self.files


class Rewriting:
    """Writes the new files of the three tables, by layer."""

    def __init__(
        self,
        difference: Difference,
        pinned: PinnedTables,
        definitions: Mapping[str, TableDefinition],
        decoder: TradeDecoder,
        advance: Advance,
    ) -> None:
        self._difference = difference
        self._pinned = pinned
        self._definitions = definitions
        self._decoder = decoder
        self._advance = advance
        self.tables = {layer: Replaced() for layer in ("dlq", "silver", "gold")}

    def write_new(self, scope: Scope) -> None:
        """The rows that come into Silver and the dead letters."""
        silver, dlq = Gathered(self._writer("silver")), Gathered(self._writer("dlq"))
        for messages in self._difference.moving(scope, self._advance):
            decoded = self._decoder.decode(messages)
            silver.add(decoded.trades.rows)
            dlq.add(self._letters(decoded.failures))
        self._come("silver", silver.write())
        self._come("dlq", dlq.write())

    def write_gold(self) -> None:
        """The rows that come into Gold, out of Silver's files, the new ones among them."""
        store = self._difference.store
        wanted = store.arrays("SELECT row FROM picked ORDER BY row")["row"]
        left = np.ones(len(wanted), np.bool_)
        gold = Gathered(self._writer("gold"))
        reader = FileReader.of_table(self._pinned.tables["silver"], self._definition("silver"))
        old = self._difference.plans["silver"].tasks if "silver" in self._difference.plans else []
        files = [*self.tables["silver"].added, *(old[n].file for n in self._files_with_picked())]
        for file in files:
            if not left.any():
                break
            for rows in reader.read(file):
                rows = rows.select(_SILVER.names).cast(_SILVER)
                hashes = store.hashes(hashable(rows), ROW_HASH)
                at = np.minimum(np.searchsorted(wanted, hashes), max(0, len(wanted) - 1))
                found = np.flatnonzero((wanted[at] == hashes) & left[at])
                _, first = np.unique(at[found], return_index=True)
                left[at[found]] = False
                gold.add(GOLD.rows(rows.take(pa.array(np.sort(found[first])))))
        self._come("gold", gold.write())

    def write_without(self, layer: str) -> None:
        """Each file that has rows that go, without them."""
        replaced, table = self.tables[layer], self._pinned.tables[layer]
        reader = FileReader.of_table(table, self._definition(layer))
        writer = DataFileWriter(table, self._definition(layer).as_in(table))
        for number in self._difference.files_of(layer):
            file = self._difference.plans[layer].tasks[number].file
            left = self._left(layer, number, reader.read(file))
            first = next(left, None)
            replaced.removed.append(file.file_path)
            if first is not None:
                written = writer.write_stream(_after(first, left))
                replaced.added.append(written)
            kept = 0 if first is None else written.record_count
            replaced.rows_gone += file.record_count - kept
            self._advance(file.record_count)

    def _left(self, layer: str, number: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        gone = self._difference.gone(layer, number)
        rows, to_go = gone["row"], gone["n"].copy()
        all_go = gone["n"] >= gone["present"]
        for batch in batches:
            shown = hashable(batch) if "vendor_data" in batch.schema.names else batch
            hashes = self._difference.store.hashes(shown, HASHES[layer])
            at = np.minimum(np.searchsorted(rows, hashes), len(rows) - 1)
            goes = rows[at] == hashes
            for i in np.flatnonzero(goes & ~all_go[at]).tolist():  # rows of which others with equal values stay: few
                goes[i] = to_go[at[i]] > 0
                to_go[at[i]] -= 1
            kept = batch.filter(pa.array(~goes)) if goes.any() else batch
            if kept.num_rows:
                yield kept

    def _letters(self, failures: MessageBatch) -> pa.RecordBatch:
        """Rows of dead letters; those that were ones before keep the time at which they failed."""
        rows = failures.rows
        before = self._difference.failed_at(failures)
        now = rows.column("failed_at").cast(pa.int64()).to_numpy()
        times = pa.array(np.where(before == 0, now, before)).cast(rows.schema.field("failed_at").type)
        columns = {name: rows.column(name) for name in rows.schema.names}
        columns |= {"failed_at": times, "failed_date": times.cast(pa.date32())}
        return pa.RecordBatch.from_pydict(columns, schema=rows.schema)

    def _files_with_picked(self) -> list[int]:
        found = self._difference.store.run("SELECT min(file) FROM silver SEMI JOIN picked USING (row) GROUP BY row")
        return sorted({file for (file,) in found})

    def _come(self, layer: str, files: list[DataFile]) -> None:
        self.tables[layer].added += files
        self.tables[layer].rows_come += sum(file.record_count for file in files)

    def _writer(self, layer: str) -> DataFileWriter:
        return DataFileWriter(self._pinned.tables[layer], self._definition(layer))

    def _definition(self, layer: str) -> TableDefinition:
        return self._definitions[self._pinned.name(layer)]


def _after(first: pa.RecordBatch, rest: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
    yield first
    yield from rest
