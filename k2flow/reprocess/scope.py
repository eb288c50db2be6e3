"""Which messages are reprocessed: those that Bronze ingested on given days, or those that are dead letters."""

from collections.abc import Iterator, Sequence
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.errors import ReprocessError
from k2flow.inspection.files import Advance, ReadPlan, plan, prefetch, read
from k2flow.inspection.partitions import TopicPartitions
from k2flow.inspection.pinned import FIRST_DAY, UNIX_EPOCH, PinnedTables
from k2flow.layers import BRONZE, DLQ, Layer
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch

_COLUMNS = {
    BRONZE: ("avro_payload", "topic", "partition", "offset", "kafka_timestamp", "ingestion_timestamp"),
    DLQ: ("payload", "topic", "partition", "offset", "kafka_timestamp", "failed_at", "reason"),
}
"""The columns that are read, the payload first."""


class ReplaceableMessages:
    """The messages whose rows may be replaced: of the current topic, at offsets that all tables hold.

    Rows of a deleted topic with the same name stay as they are.
    """

    def __init__(self, pinned: PinnedTables) -> None:
        partitions = TopicPartitions(pinned)
        self._partitions = partitions
        current = [each for each in partitions if each.current]
        self._numbers = [each.number for each in current]
        layers = pinned.exchange.layers
        self._ends = {each.partition: min(each.extent(layer).next for layer in layers) for each in current}

    def mask(self, layer: Layer, batch: pa.RecordBatch) -> npt.NDArray[np.bool_]:
        """Return for each of n rows of Bronze or the dead letters whether its message is one of these: (n,)."""
        partition = batch.column("partition").fill_null(-1).to_numpy()
        offset = batch.column("offset").fill_null(-1).to_numpy()
        found: npt.NDArray[np.bool_] = np.isin(self._partitions.numbers(layer, batch), self._numbers)
        for p, end in self._ends.items():
            found &= (partition != p) | (offset < end)
        return found


class Scope:
    """The messages to reprocess, read from the rows of a plan: of Bronze, or of some reasons of the dead letters."""

    def __init__(self, plan: ReadPlan, replaceable: ReplaceableMessages, reasons: Sequence[str] = ()) -> None:
        self.plan = plan
        self.skipped = 0
        """Rows (of these reasons) that `messages` has left out."""
        self._replaceable = replaceable
        self._reasons = pa.array(reasons, pa.string())

    @property
    def whole(self) -> bool:
        """Whether the scope has all messages of its days, not only dead letters."""
        return self.plan.layer is BRONZE

    def messages(self, advance: Advance) -> Iterator[MessageBatch]:
        """Yield batches of about ten thousand messages, without keys. May be read again."""
        self.skipped = 0
        layer = self.plan.layer
        for batch in prefetch(read(self.plan, _COLUMNS[layer], None, advance)):
            if len(self._reasons):
                batch = batch.filter(pc.is_in(batch.column("reason"), self._reasons))
            replaceable = self._replaceable.mask(layer, batch)
            self.skipped += int(np.count_nonzero(~replaceable))
            batch = batch.filter(pa.array(replaceable))
            if batch.num_rows:
                columns = [pa.nulls(batch.num_rows, pa.binary()), batch[_COLUMNS[layer][0]], batch["kafka_timestamp"]]
                rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
                yield MessageBatch(rows, batch["partition"].to_numpy(), batch["offset"].to_numpy(), [])


def day_scope(pinned: PinnedTables, replaceable: ReplaceableMessages, first: date, last: date) -> Scope:
    """Return the messages that Bronze ingested on the days [first, last].

    Raises ReprocessError if their dead letters may have expired, so that it is unknown which messages were bad.
    """
    files = plan(pinned, BRONZE, (first - UNIX_EPOCH).days, (last - UNIX_EPOCH).days)
    oldest, kept = files.first_day, max(pinned.cutoff(DLQ), pinned.cutoff(BRONZE))
    # A dead letter may be dated a day before its message's row in Bronze: the first day kept may lack some.
    if oldest is not None and UNIX_EPOCH + timedelta(oldest) <= kept:
        begin = kept + timedelta(1)
        raise ReprocessError(
            f"messages ingested before {begin} cannot be reprocessed: Bronze or the dead letters of those days are "
            f"no longer kept, or incomplete. Begin at {begin}"
        )
    return Scope(files, replaceable)


def dead_letter_scope(
    pinned: PinnedTables,
    replaceable: ReplaceableMessages,
    reasons: Sequence[str] = (),
    first: date | None = None,
    last: date | None = None,
) -> Scope:
    """Return the messages that are dead letters, of some reasons and days of failure, or of all.

    Raises ReprocessError if the first day is after the last.
    """
    if first and last and first > last:
        raise ReprocessError(f"{first} is after {last}: name the earlier day first")
    first_day, last_day = ((day - UNIX_EPOCH).days if day else None for day in (first, last))
    return Scope(plan(pinned, DLQ, FIRST_DAY if first_day is None else first_day, last_day), replaceable, reasons)
