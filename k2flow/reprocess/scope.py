"""Which messages are judged again: those that Bronze ingested on given days, or those that are dead letters."""

from collections.abc import Callable, Iterator, Sequence
from datetime import date, timedelta

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.errors import ReprocessError
from k2flow.inspection.files import Plan, ahead, plan, read
from k2flow.inspection.partitions import OUTSIDE, Parts
from k2flow.inspection.pinned import LAYERS, PinnedTables
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch

EPOCH = date(1970, 1, 1)
ALWAYS = (date.min - EPOCH).days
_BRONZE = ("avro_payload", "topic", "partition", "offset", "kafka_timestamp", "ingestion_timestamp", "ingestion_date")
_LETTERS = ("payload", "topic", "partition", "offset", "kafka_timestamp", "failed_at", "failed_date", "reason")

Advance = Callable[[int], None]


class Known:
    """Which rows of Bronze and of the dead letters are messages of the topic of now that all four tables hold.

    Those of a topic that was deleted since, under the same name, are left as they are.
    """

    def __init__(self, pinned: PinnedTables) -> None:
        parts = Parts(pinned, 0)
        self._parts = parts
        self._topic = pinned.exchange.settings.topic
        self._current = {part.number: part.partition for part in parts if part.current}
        extents = {part.partition: [part.extent(layer) for layer in LAYERS] for part in parts if part.current}
        self._until = {p: min(extent.next for extent in each) for p, each in extents.items()}

    def mask(self, layer: str, batch: pa.RecordBatch, written: str) -> npt.NDArray[np.bool_]:
        """For each row of a batch; `written` is the column that tells when it was."""
        partition = batch.column("partition").fill_null(OUTSIDE).to_numpy()
        offset = batch.column("offset").fill_null(OUTSIDE).to_numpy()
        times = batch.column(written).cast(pa.int64()).fill_null(0).to_numpy()
        numbers = self._parts.numbers(layer, partition, offset, times)
        ours = pc.equal(batch.column("topic"), self._topic).fill_null(False).to_numpy(zero_copy_only=False)
        current: npt.NDArray[np.bool_] = np.isin(numbers, list(self._current)) & ours
        for p, until in self._until.items():
            current &= (partition != p) | (offset < until)
        return current


class Days:
    """The messages that Bronze ingested on the days [first, last]."""

    def __init__(self, pinned: PinnedTables, known: Known, days: tuple[date, date]) -> None:
        """Raises ReprocessError where the dead letters of those days may have expired: nobody knows which were bad then."""
        first, last = days
        self.plan: Plan = plan(pinned, "bronze", (first - EPOCH).days, (last - EPOCH).days)
        oldest, kept = self.plan.first_day, max(pinned.cutoff("dlq"), pinned.cutoff("bronze"))
        # A letter may be dated a day before its message's row in Bronze: the first day that is kept may lack some.
        if oldest is not None and EPOCH + timedelta(oldest) <= kept:
            raise ReprocessError(
                f"what was ingested before {kept + timedelta(1)} cannot be judged again: Bronze or the dead letters of "
                f"then are no longer kept, or not all of them. Begin at {kept + timedelta(1)}"
            )
        self._known = known
        self.left_alone = 0
        """Rows that `messages` has left out."""

    def messages(self, advance: Advance) -> Iterator[MessageBatch]:
        """In batches of some ten thousand, without their keys. May be read again."""
        self.left_alone = 0
        for batch in ahead(read(self.plan, _BRONZE, None, advance)):
            known = self._known.mask("bronze", batch, "ingestion_timestamp")
            self.left_alone += int(np.count_nonzero(~known))
            batch = batch.filter(pa.array(known))
            if batch.num_rows:
                yield _slice(batch, "avro_payload")


class Letters:
    """The messages that are dead letters, of some reasons and days or of all."""

    def __init__(
        self,
        pinned: PinnedTables,
        known: Known,
        reasons: Sequence[str] = (),
        days: tuple[date | None, date | None] = (None, None),
    ) -> None:
        if None not in days and days[0] > days[1]:  # type: ignore[operator]
            raise ReprocessError(f"{days[0]} is after {days[1]}: no dead letter is of such days")
        first, last = ((day - EPOCH).days if day else None for day in days)
        self.plan: Plan = plan(pinned, "dlq", ALWAYS if first is None else first, last)
        self._known = known
        self._reasons = pa.array(reasons, pa.string())
        self.left_alone = 0
        """Rows that `messages` has left out, of those that were asked for."""

    def messages(self, advance: Advance) -> Iterator[MessageBatch]:
        """In batches of some ten thousand, without their keys. May be read again."""
        self.left_alone = 0
        for batch in ahead(read(self.plan, _LETTERS, None, advance)):
            if len(self._reasons):
                batch = batch.filter(pc.is_in(batch.column("reason"), self._reasons))
            known = self._known.mask("dlq", batch, "failed_at")
            self.left_alone += int(np.count_nonzero(~known))
            batch = batch.filter(pa.array(known))
            if batch.num_rows:
                yield _slice(batch, "payload")


Scope = Days | Letters


def _slice(batch: pa.RecordBatch, payload: str) -> MessageBatch:
    columns = [pa.nulls(batch.num_rows, pa.binary()), batch.column(payload), batch.column("kafka_timestamp")]
    rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
    return MessageBatch(rows, batch.column("partition").to_numpy(), batch.column("offset").to_numpy(), [])
