"""The ledgers against the rows of the tables and against each other.

Each check proves:

- `bronze_outside_ledger`, `dlq_outside_ledger`: no row that was read has a topic, partition or offset that the table's
  ledger does not hold.
- `ledger_rows`: in each partition, as many messages were valid as the ledgers of Silver and Gold count, and as many bad
  as the dead letters' counts, if all its messages could be decoded; unresolved ones may be either. No ledger counts
  more rows than offsets, and no table has more rows than its ledger counts (Gold's counts before deduplication).
- `ledgers_disagree`: where the ledgers hold the same offsets, Silver's and the dead letters' rows add up to Bronze's,
  and Gold's are as many as Silver's. This holds for all messages ever, including those that retention has removed.
- `head_moved`: main's history has the commit that each ledger names as its last (see k2flow.iceberg.head).
- `loss_accepted` (a note): offsets whose rows a table lost when its main was moved, which was accepted.
"""

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from k2flow.audit.context import AuditContext
from k2flow.audit.database import within
from k2flow.audit.offsets import OffsetsFound
from k2flow.audit.report import SAMPLES, Severity
from k2flow.iceberg.head import head_problem
from k2flow.inspection.partitions import OUTSIDE, TopicPartition, TopicPartitions
from k2flow.inspection.pinned import PinnedTables
from k2flow.layers import BRONZE, DLQ, GOLD, SILVER, Layer, Stream

Ints = npt.NDArray[np.int64]
DECODED = {Stream.TRADES: "valid", Stream.DEAD_LETTERS: "bad"}
"""The table of the database with the messages that a layer's rows come from, by its stream."""


class LedgerFilter:
    """The check `<layer>_outside_ledger`, of Bronze or the dead letters."""

    def __init__(self, partitions: TopicPartitions, layer: Layer) -> None:
        self._partitions = partitions
        self._layer = layer
        self._count = 0
        self._samples: list[dict[str, object]] = []

    def numbers(self, batch: pa.RecordBatch) -> Ints:
        """Return the partition number of each of n rows, OUTSIDE for those that the ledger does not hold: (n,)."""
        number = self._partitions.numbers(self._layer, batch)
        if (number == OUTSIDE).any():
            rows = batch.filter(pa.array(number == OUTSIDE)).select(["topic", "partition", "offset"])
            self._count += rows.num_rows
            self._samples += rows.slice(0, SAMPLES).to_pylist()
        return number

    def report(self, context: AuditContext) -> None:
        """Report the rows outside the ledger."""
        if self._count:
            text = f"{self._count:,} rows have a topic or offset that the table's ledger does not hold"
            check, pinned = f"{self._layer.name}_outside_ledger", self._partitions.pinned
            context.broken(check, text, self._count, pinned, self._layer, self._samples)


def check_ledgers(context: AuditContext, offsets: Mapping[TopicPartition, OffsetsFound]) -> None:
    """Check the ledgers of one exchange's partitions."""
    layers = dict.fromkeys(layer for partition in offsets for layer in partition.pinned.exchange.layers)
    decoded = {
        layer: dict(context.store.run(f"SELECT v.number, count(*) FROM {table} v {within(layer)} GROUP BY 1"))
        for layer in layers
        if (table := DECODED.get(layer.stream))
    }
    unresolved = {
        layer: dict(context.store.run(f"SELECT v.number, count(*) FROM unresolved v {within(layer)} GROUP BY 1"))
        for layer in decoded
    }
    for partition, found in offsets.items():
        for layer in layers:
            _note_lost(context, partition, layer)
            extent = partition.extent(layer)
            if extent.first > extent.next or extent.rows > extent.next - extent.first:
                span = f"offsets {extent.first} to {extent.next - 1}"
                text = f"{partition}: the ledger counts {extent.rows:,} rows of {span}"
                _broken(context, "ledger_rows", partition, text, layer)
            elif layer in decoded and context.whole and found.covered:
                n = decoded[layer].get(partition.number, 0)
                if not n <= extent.rows <= n + unresolved[layer].get(partition.number, 0):
                    text = f"{partition}: the ledger counts {extent.rows:,} messages of this table, Bronze has {n:,}"
                    _broken(context, "ledger_rows", partition, text, layer, abs(n - extent.rows))
        _compare(context, partition)


def check_totals(context: AuditContext, partitions: TopicPartitions, layer: Layer, rows: int) -> None:
    """Check that a table of `rows` rows has no more than its ledger counts."""
    counted = sum(partition.ledger_extent(layer).rows for partition in partitions)
    if rows > counted:
        text = f"the table has {rows:,} rows, its ledger counts {counted:,}"
        context.broken("ledger_rows", text, rows - counted, partitions.pinned, layer)


def check_head(context: AuditContext, pinned: PinnedTables) -> None:
    """Check `head_moved`: main's own history has the rows of each table's ledger."""
    for layer in pinned.exchange.layers:
        ledger, metadata = pinned.ledgers[layer], pinned.tables[layer].metadata
        if problem := head_problem(metadata, pinned.exchange.name, ledger):
            text = f"main was moved to another snapshot, or the ledger was edited: {problem}"
            context.broken("head_moved", text, 1, pinned, layer)


def _note_lost(context: AuditContext, partition: TopicPartition, layer: Layer) -> None:
    for first, end in partition.lost.get(layer, ()):
        text = f"{partition}: the loss of the rows of offsets {first} to {end - 1} was accepted, after main was moved"
        samples = [partition.between(first, end)]
        context.add("loss_accepted", Severity.NOTE, text, end - first, partition.pinned, layer, samples)


def _compare(context: AuditContext, partition: TopicPartition) -> None:
    extents = [partition.ledger_extent(layer) for layer in (BRONZE, SILVER, DLQ, GOLD)]
    bronze, silver, dlq, gold = extents
    if partition.lost:
        return
    bronze_span, silver_span, dlq_span, gold_span = ((extent.first, extent.next) for extent in extents)
    if bronze_span == silver_span == dlq_span and silver.rows + dlq.rows != bronze.rows:
        text = (
            f"{partition}: Silver's {silver.rows:,} and the dead letters' {dlq.rows:,} are not Bronze's {bronze.rows:,}"
        )
        _broken(context, "ledgers_disagree", partition, text, None, abs(silver.rows + dlq.rows - bronze.rows))
    if silver_span == gold_span and silver.rows != gold.rows:
        text = f"{partition}: Gold's {gold.rows:,} (before deduplication) are not Silver's {silver.rows:,}"
        _broken(context, "ledgers_disagree", partition, text, None, abs(silver.rows - gold.rows))


def _broken(
    context: AuditContext, check: str, partition: TopicPartition, text: str, layer: Layer | None, count: int = 1
) -> None:
    sample = {"topic": partition.topic, "partition": partition.partition}
    context.broken(check, text, count, partition.pinned, layer, [sample])
