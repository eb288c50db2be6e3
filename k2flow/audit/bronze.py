"""Bronze, decoded again: what each message is, by the flow's own decoder, as hashes in the store."""

from collections.abc import Callable, Iterable, Iterator
from datetime import datetime

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.audit.file_checks import FileChecks
from k2flow.audit.report import SAMPLES, Report, Severity
from k2flow.inspection.files import Plan, ahead, read
from k2flow.inspection.partitions import OUTSIDE, Parts
from k2flow.inspection.row_hashes import CONTENT_HASH, ID_HASH, ROW_HASH, Store, hashable
from k2flow.trades.decode import Decoded, TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch

COLUMNS = ("avro_payload", "topic", "partition", "offset", "kafka_timestamp", "ingestion_timestamp", "ingestion_date")

Ints = npt.NDArray[np.int64]


class BronzeReader:
    """Fills `runs`, `valid` and `bad` of the store from Bronze's rows of one exchange.

    Check `bronze_outside_ledger` proves that no row that was read has a topic, partition or offset that Bronze's ledger
    does not hold. Whether a message is valid is judged by the rules of today's k2flow and, with a registry, by the
    schemas that it gives today; what is kept of fields that TradeV2 does not know, by today's setting. After a change
    of these, rows that were judged before differ.
    """

    def __init__(self, parts: Parts, decoder: TradeDecoder, store: Store, topic: str, since: datetime | None) -> None:
        self._parts = parts
        self._decoder = decoder
        self._store = store
        self._topic = topic
        self._since = since
        self._outside = 0
        self._samples: list[dict[str, object]] = []

    def read(self, plan: Plan, checks: FileChecks, advance: Callable[[int], None]) -> None:
        """Reads, decodes and stores, each in a thread of its own."""
        for decoded, found, day in ahead(self._decoded(ahead(read(plan, COLUMNS, checks, advance)))):
            self._store.insert("runs", found)
            self.store(decoded, day)

    def decode(self, part: Ints, offset: Ints, values: pa.Array, times: pa.Array) -> Decoded:
        """What n messages are; `part` is the number of each one's part, and stands for its partition in the result."""
        rows = pa.RecordBatch.from_arrays([pa.nulls(len(values), pa.binary()), values, times], schema=MESSAGE_SCHEMA)
        return self._decoder.decode(MessageBatch(rows, part.astype(np.int32), offset, []))

    def store(self, decoded: Decoded, day: int) -> None:
        """Stores what messages became that were ingested on `day` (since 1970)."""
        trades, failures = decoded.trades, decoded.failures.rows
        if trades.rows.num_rows:
            batch = hashable(trades.rows)
            batch = batch.append_column("part", pa.array(trades.partition))
            batch = batch.append_column("kafka_offset", pa.array(trades.offset))
            traded = "exchange_date - DATE '1970-01-01'"
            self._store.insert("valid", batch, f"part, kafka_offset, {traded}, {ID_HASH}, {ROW_HASH}")
        if failures.num_rows:
            self._store.insert("bad", failures, f'partition, "offset", {day}, reason, {CONTENT_HASH}')

    def report(self, report: Report, exchange: str, table: str) -> None:
        if self._outside:
            text = f"{self._outside:,} rows have an offset that the table's ledger does not hold"
            report.add("bronze_outside_ledger", Severity.BROKEN, text, self._outside, exchange, table, self._samples)

    def _decoded(self, batches: Iterable[pa.RecordBatch]) -> Iterator[tuple[Decoded, pa.RecordBatch, int]]:
        for batch in batches:
            if self._since is not None:
                batch = batch.filter(pc.greater_equal(batch.column("ingestion_timestamp"), pa.scalar(self._since)))
            batch, part = self._known(batch)
            if batch.num_rows == 0:
                continue
            offset = batch.column("offset").to_numpy()
            decoded = self.decode(part, offset, batch.column("avro_payload"), batch.column("kafka_timestamp"))
            yield decoded, runs(part, offset), batch.column("ingestion_date").cast(pa.int32())[0].as_py() or 0

    def _known(self, batch: pa.RecordBatch) -> tuple[pa.RecordBatch, Ints]:
        """The rows that the ledger holds, and their parts' numbers."""
        partition = batch.column("partition").fill_null(OUTSIDE).to_numpy()
        offset = batch.column("offset").fill_null(OUTSIDE).to_numpy()
        written = batch.column("ingestion_timestamp").cast(pa.int64()).fill_null(0).to_numpy()
        part = self._parts.numbers("bronze", partition, offset, written)
        ours = pc.equal(batch.column("topic"), self._topic).fill_null(False)
        if ours.false_count:
            part[~ours.to_numpy(zero_copy_only=False)] = OUTSIDE
        known = part != OUTSIDE
        if known.all():
            return batch, part
        outside = batch.filter(pa.array(~known))
        self._outside += outside.num_rows
        self._samples += outside.select(["topic", "partition", "offset"]).slice(0, SAMPLES).to_pylist()
        return batch.filter(pa.array(known)), part[known]


def runs(part: Ints, offset: Ints) -> pa.RecordBatch:
    """The offsets of n rows as runs (part, first, next) without a gap; one that is there twice is in two runs."""
    order = np.lexsort((offset, part))
    part, offset = part[order], offset[order]
    starts = np.flatnonzero(np.append(True, (part[1:] != part[:-1]) | (offset[1:] != offset[:-1] + 1)))
    ends = np.append(starts[1:], len(part)) - 1
    return pa.RecordBatch.from_pydict(
        {"part": pa.array(part[starts].astype(np.int32)), "first": offset[starts], "next": offset[ends] + 1}
    )
