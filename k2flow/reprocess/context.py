"""What all steps of one reprocessing share: the messages in scope, the tables, the decoder, a database of hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import date, timedelta
from functools import cached_property

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import DataFile

from k2flow.errors import ReprocessError
from k2flow.exchange import Exchange
from k2flow.iceberg.catalog import catalog_errors
from k2flow.inspection.files import Advance, ReadPlan, plan, prefetch, read
from k2flow.inspection.partitions import TopicPartitions
from k2flow.inspection.pinned import FIRST_DAY, UNIX_EPOCH, PinnedTables, pin
from k2flow.inspection.row_hashes import RowHashStore, hash_of, id_hash
from k2flow.layers import BRONZE, DLQ, GOLD, SILVER, Layer
from k2flow.trades.decode import MESSAGE_ID, TradeDecoder
from k2flow.trades.messages import MESSAGE_SCHEMA, MessageBatch
from k2flow.trades.stored_schemas import StoredSchemas

REPLACED_LAYERS = (DLQ, SILVER, GOLD)  # the layers whose rows are replaced
VALID = "valid"  # what a message is that is no dead letter
UNRESOLVED = "unresolved"  # what a message is whose schema is not known

ID = hash_of(MESSAGE_ID, SILVER.arrow_schema)
"""The SQL of `id`, which names a message and its row of Silver: a hash of its `message_id`."""
SCHEMA = """
CREATE TABLE message (partition INTEGER, "offset" BIGINT, id UBIGINT, key UBIGINT, row UBIGINT, day INTEGER,
                      reason VARCHAR, content UBIGINT);  -- as decoded today; valid ones have no reason
CREATE TABLE letter (partition INTEGER, "offset" BIGINT, row UBIGINT, file INTEGER,
                     reason VARCHAR, content UBIGINT, failed_at BIGINT);
CREATE TABLE silver (id UBIGINT, key UBIGINT, row UBIGINT, day INTEGER, file INTEGER);
CREATE TABLE gold (key UBIGINT, row UBIGINT, file INTEGER);
CREATE TABLE moved (partition INTEGER, "offset" BIGINT, id UBIGINT, key UBIGINT, row UBIGINT, day INTEGER,
                    was VARCHAR, reason VARCHAR, failed_at BIGINT);  -- messages with another result today
CREATE TABLE superseded (partition INTEGER, "offset" BIGINT, id UBIGINT);  -- messages whose row of Silver is removed
CREATE TABLE removed (layer VARCHAR, file INTEGER, row UBIGINT, n BIGINT, present BIGINT);  -- n of those in a file
CREATE TABLE gold_added (key UBIGINT, row UBIGINT);  -- rows of Silver that are added to Gold
"""
_COLUMNS = {
    BRONZE: ("avro_payload", "topic", "partition", "offset", "kafka_timestamp", "ingestion_timestamp"),
    DLQ: ("payload", "topic", "partition", "offset", "kafka_timestamp", "failed_at", "reason"),
}
"""The columns that are read, the payload first."""


class ReplaceableMessages:
    """Messages whose rows may be replaced: of the current topic, not a deleted one, at offsets that all tables hold."""

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
    """Return the dead letters of some reasons and days of failure, or all. Raises ReprocessError if first > last."""
    if first and last and first > last:
        raise ReprocessError(f"{first} is after {last}: name the earlier day first")
    first_day, last_day = ((day - UNIX_EPOCH).days if day else None for day in (first, last))
    return Scope(plan(pinned, DLQ, FIRST_DAY if first_day is None else first_day, last_day), replaceable, reasons)


class NumberedFiles:
    """The data files that were read of each table, numbered in that order."""

    def __init__(self) -> None:
        self._plans: dict[Layer, ReadPlan] = {}

    def read(self, plan: ReadPlan, columns: Sequence[str], advance: Advance) -> Iterator[tuple[int, pa.RecordBatch]]:
        """Yield the rows of a table's files, each batch with its file's number."""
        self._plans[plan.layer] = plan

        def numbered() -> Iterator[tuple[int, pa.RecordBatch]]:
            for number, task in enumerate(plan.tasks):
                for batch in read(replace(plan, tasks=[task]), columns, None, advance):
                    yield number, batch

        with catalog_errors():
            yield from prefetch(numbered())

    def file(self, layer: Layer, number: int) -> DataFile:
        """Return the file with this number."""
        return self._plans[layer].tasks[number].file


@dataclass(frozen=True, kw_only=True)
class ReprocessContext:
    """The database (SCHEMA), the tables of one exchange, and the schemas by which messages are decoded today."""

    store: RowHashStore
    pinned: PinnedTables
    schemas: StoredSchemas
    files: NumberedFiles = field(default_factory=NumberedFiles)

    @cached_property
    def decoder(self) -> TradeDecoder:
        """Today's decoder."""
        return TradeDecoder(self.pinned.exchange, self.schemas)

    @property
    def key(self) -> str:
        """The SQL of `key`, which names a trade in Gold: a hash of its deduplication key."""
        return id_hash(self.pinned.exchange)


def pin_tables(catalog: Catalog, exchange: Exchange, same_offsets: bool) -> PinnedTables:
    """Pin the tables. Raises ReprocessError if there are none, or if they must hold the same offsets and do not."""
    pinned, _ = pin(catalog, [exchange])
    name = exchange.name
    if not pinned:
        raise ReprocessError(f"there are no tables of {name}: run its flow first")
    held = [{p: extent.next for p, extent in ledger.partitions.items()} for ledger in pinned[0].ledgers.values()]
    if same_offsets and any(each != held[0] for each in held):
        raise ReprocessError(
            f"the tables of {name} do not hold the same offsets, because the flow was killed between its commits: "
            f"run `k2flow run {name} --until-caught-up`, then repeat this"
        )
    return pinned[0]
