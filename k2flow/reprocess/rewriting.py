"""Writes the replacement's data files: new rows, and rewritten files without the removed rows. Commits nothing."""

from collections.abc import Iterable, Iterator, Mapping
from itertools import chain

import numpy as np
import pyarrow as pa
from pyiceberg.manifest import DataFile

from k2flow.iceberg.reader import FileReader
from k2flow.iceberg.tables import TableDefinition
from k2flow.iceberg.writer import DataFileWriter
from k2flow.inspection.files import Advance
from k2flow.inspection.row_hashes import content_hash, hashable
from k2flow.layers import DLQ, GOLD, SILVER, Layer
from k2flow.reprocess.context import REPLACED_LAYERS, ReprocessContext
from k2flow.reprocess.replacements import RowReplacements, TableReplacement
from k2flow.reprocess.revalidation import MovedMessages, find_sorted, letter_hash
from k2flow.trades.messages import MessageBatch

BUFFER_BYTES = 128 << 20  # new rows of a table are held up to this size, so that they do not make many small files


class RowBuffer:
    """Holds the rows added to one table, and writes them when they reach BUFFER_BYTES."""

    def __init__(self, writer: DataFileWriter) -> None:
        self._writer = writer
        self._batches: list[pa.RecordBatch] = []
        self._bytes = 0
        self._files: list[DataFile] = []

    def add(self, rows: pa.RecordBatch) -> None:
        """Add rows."""
        if rows.num_rows:
            self._batches.append(rows)
            self._bytes += rows.nbytes
        if self._bytes >= BUFFER_BYTES:
            self.flush()

    def flush(self) -> list[DataFile]:
        """Write the rows held. Return all files so far."""
        if self._batches:
            self._files += self._writer.write(pa.concat_batches(self._batches))
        self._batches, self._bytes = [], 0
        return self._files


class Rewriter:
    """Writes the new files of the three tables."""

    def __init__(
        self,
        context: ReprocessContext,
        replacements: RowReplacements,
        definitions: Mapping[str, TableDefinition],
        advance: Advance,
    ) -> None:
        self._context = context
        self._replacements = replacements
        self._definitions = {layer: definitions[context.pinned.name(layer)] for layer in REPLACED_LAYERS}
        self._advance = advance

    def write_added(self, moved: MovedMessages) -> dict[Layer, TableReplacement]:
        """Write the rows that the moved messages add to all tables."""
        tables = {layer: TableReplacement() for layer in REPLACED_LAYERS}
        silver, dlq = self._buffer(SILVER), self._buffer(DLQ)
        for messages in moved.messages(self._advance):
            decoded = self._context.decoder.decode(messages)
            silver.add(decoded.trades.rows)
            dlq.add(_letters(moved, decoded.dead_letters))
        tables[SILVER].added = silver.flush()
        tables[DLQ].added = dlq.flush()
        tables[GOLD].added = self.write_gold(tables[SILVER].added)
        for table in tables.values():
            table.rows_added = sum(file.record_count for file in table.added)
        return tables

    def rewrite(self, layer: Layer, replacement: TableReplacement) -> None:
        """Rewrite each file of a table that has removed rows, without them."""
        table, definition = self._context.pinned.tables[layer], self._definitions[layer]
        reader = FileReader.of_table(table, definition)
        writer = DataFileWriter(table, definition.as_in(table))
        for number in self._replacements.files_of(layer):
            file = self._context.files.file(layer, number)
            kept = self._kept(layer, number, reader.read(file))
            first = next(kept, None)
            replacement.removed.append(file.file_path)
            rows = 0
            if first is not None:
                written = writer.write_stream(chain((first,), kept))
                replacement.added.append(written)
                rows = written.record_count
            replacement.rows_removed += file.record_count - rows
            self._advance(file.record_count)

    def write_gold(self, new: Iterable[DataFile] = ()) -> list[DataFile]:
        """Write the rows added to Gold, from Silver's files and from its new ones."""
        wanted = self._replacements.added_to_gold()
        missing = np.ones(len(wanted), np.bool_)
        gold = self._buffer(GOLD)
        reader = FileReader.of_table(self._context.pinned.tables[SILVER], self._definitions[SILVER])
        old = (self._context.files.file(SILVER, n) for n in self._replacements.silver_files_added_to_gold())
        for file in chain(new, old):
            if not missing.any():
                break
            for rows in reader.read(file):
                trades = rows.select(SILVER.columns).cast(SILVER.arrow_schema)
                hashes = self._context.store.hashes(hashable(trades), content_hash(SILVER))
                at, is_wanted = find_sorted(wanted, hashes)
                found = np.flatnonzero(is_wanted & missing[at])
                _, first = np.unique(at[found], return_index=True)
                missing[at[found]] = False
                gold.add(GOLD.rows(trades.take(pa.array(np.sort(found[first])))))
        return gold.flush()

    def _kept(self, layer: Layer, number: int, batches: Iterator[pa.RecordBatch]) -> Iterator[pa.RecordBatch]:
        removed = self._replacements.removed(layer, number)
        rows, left = removed["row"], removed["n"].copy()
        all_removed = removed["n"] >= removed["present"]
        row_hash = letter_hash() if layer is DLQ else content_hash(layer)
        for batch in batches:
            hashes = self._context.store.hashes(hashable(batch), row_hash)
            at, is_removed = find_sorted(rows, hashes)
            for i in np.flatnonzero(is_removed & ~all_removed[at]).tolist():  # few: rows with equal values that stay
                is_removed[i] = left[at[i]] > 0
                left[at[i]] -= 1
            kept = batch.filter(pa.array(~is_removed)) if is_removed.any() else batch
            if kept.num_rows:
                yield kept

    def _buffer(self, layer: Layer) -> RowBuffer:
        return RowBuffer(DataFileWriter(self._context.pinned.tables[layer], self._definitions[layer]))


def _letters(moved: MovedMessages, failures: MessageBatch) -> pa.RecordBatch:
    """Return rows of dead letters. Those that were dead letters before keep the time at which they failed."""
    rows = failures.rows
    before = moved.failed_at(failures)
    now = rows.column("failed_at").cast(pa.int64()).to_numpy()
    times = pa.array(np.where(before == 0, now, before)).cast(rows.schema.field("failed_at").type)
    columns = {name: rows.column(name) for name in rows.schema.names}
    columns |= {"failed_at": times, "failed_date": times.cast(pa.date32())}
    return pa.RecordBatch.from_pydict(columns, schema=rows.schema)
