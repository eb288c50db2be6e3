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

_PAYLOAD = {BRONZE: "avro_payload", DLQ: "payload"}
_BRONZE_COLUMNS = ("avro_payload", "topic", "partition", "offset", "kafka_timestamp", "ingestion_timestamp")
_DLQ_COLUMNS = ("payload", "topic", "partition", "offset", "kafka_timestamp", "failed_at", "reason")


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


class DayScope:
    """The messages that Bronze ingested on the days [first, last]."""

    def __init__(self, pinned: PinnedTables, replaceable: ReplaceableMessages, days: tuple[date, date]) -> None:
        """Plan what to read.

        Raises:
            ReprocessError: The dead letters of those days may have expired, so it is unknown which messages were bad.
        """
        first, last = days
        self.plan: ReadPlan = plan(pinned, BRONZE, (first - UNIX_EPOCH).days, (last - UNIX_EPOCH).days)
        oldest, kept = self.plan.first_day, max(pinned.cutoff(DLQ), pinned.cutoff(BRONZE))
        # A dead letter may be dated a day before its message's row in Bronze: the first day kept may lack some.
        if oldest is not None and UNIX_EPOCH + timedelta(oldest) <= kept:
            begin = kept + timedelta(1)
            raise ReprocessError(
                f"messages ingested before {begin} cannot be reprocessed: Bronze or the dead letters of those days are "
                f"no longer kept, or incomplete. Begin at {begin}"
            )
        self._replaceable = replaceable
        self.skipped = 0
        """Rows that `messages` has left out."""

    def messages(self, advance: Advance) -> Iterator[MessageBatch]:
        """Yield batches of about ten thousand messages, without keys. May be read again."""
        self.skipped = 0
        for batch in prefetch(read(self.plan, _BRONZE_COLUMNS, None, advance)):
            replaceable = self._replaceable.mask(BRONZE, batch)
            self.skipped += int(np.count_nonzero(~replaceable))
            yield from _messages(BRONZE, batch.filter(pa.array(replaceable)))


class DeadLetterScope:
    """The messages that are dead letters, of some reasons and days of failure, or of all."""

    def __init__(
        self,
        pinned: PinnedTables,
        replaceable: ReplaceableMessages,
        reasons: Sequence[str] = (),
        days: tuple[date | None, date | None] = (None, None),
    ) -> None:
        """Plan what to read. Raises ReprocessError if the first day is after the last."""
        start, end = days
        if start and end and start > end:
            raise ReprocessError(f"{start} is after {end}: name the earlier day first")
        first, last = ((day - UNIX_EPOCH).days if day else None for day in days)
        self.plan: ReadPlan = plan(pinned, DLQ, FIRST_DAY if first is None else first, last)
        self._replaceable = replaceable
        self._reasons = pa.array(reasons, pa.string())
        self.skipped = 0
        """Rows of these reasons that `messages` has left out."""

    def messages(self, advance: Advance) -> Iterator[MessageBatch]:
        """Yield batches of about ten thousand messages, without keys. May be read again."""
        self.skipped = 0
        for batch in prefetch(read(self.plan, _DLQ_COLUMNS, None, advance)):
            if len(self._reasons):
                batch = batch.filter(pc.is_in(batch.column("reason"), self._reasons))
            replaceable = self._replaceable.mask(DLQ, batch)
            self.skipped += int(np.count_nonzero(~replaceable))
            yield from _messages(DLQ, batch.filter(pa.array(replaceable)))


Scope = DayScope | DeadLetterScope


def _messages(layer: Layer, batch: pa.RecordBatch) -> Iterator[MessageBatch]:
    if batch.num_rows:
        columns = [pa.nulls(batch.num_rows, pa.binary()), batch[_PAYLOAD[layer]], batch["kafka_timestamp"]]
        rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
        yield MessageBatch(rows, batch["partition"].to_numpy(), batch["offset"].to_numpy(), [])
