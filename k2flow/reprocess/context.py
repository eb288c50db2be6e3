"""What all steps of one reprocessing share: the tables, the decoder, and a database of hashes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

import pyarrow as pa
from pyiceberg.manifest import DataFile

from k2flow.iceberg.catalog import catalog_errors
from k2flow.inspection.files import Advance, ReadPlan, prefetch, read
from k2flow.inspection.pinned import PinnedTables
from k2flow.inspection.row_hashes import RowHashStore, id_hash
from k2flow.layers import DLQ, GOLD, SILVER, Layer
from k2flow.trades.decode import TradeDecoder

REPLACED_LAYERS = (DLQ, SILVER, GOLD)
"""The layers whose rows are replaced."""
VALID = "valid"
"""What a message is that is no dead letter."""

SCHEMA = """
CREATE TABLE message (partition INTEGER, "offset" BIGINT, id UBIGINT, row UBIGINT, day INTEGER,
                      reason VARCHAR, content UBIGINT);  -- as decoded today; valid ones have no reason
CREATE TABLE letter (partition INTEGER, "offset" BIGINT, row UBIGINT, file INTEGER,
                     reason VARCHAR, content UBIGINT, failed_at BIGINT);
CREATE TABLE silver (id UBIGINT, row UBIGINT, day INTEGER, file INTEGER);
CREATE TABLE gold (id UBIGINT, row UBIGINT, file INTEGER);
CREATE TABLE moved (partition INTEGER, "offset" BIGINT, id UBIGINT, row UBIGINT, day INTEGER,
                    was VARCHAR, reason VARCHAR, failed_at BIGINT);  -- messages with another result today
CREATE TABLE superseded (partition INTEGER, "offset" BIGINT, id UBIGINT);  -- messages whose row of Silver is removed
CREATE TABLE removed (layer VARCHAR, file INTEGER, row UBIGINT, n BIGINT, present BIGINT);  -- n of those in a file
CREATE TABLE gold_added (id UBIGINT, row UBIGINT);  -- rows of Silver that are added to Gold
"""


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
    """The database (SCHEMA), the tables of one exchange, and today's decoder."""

    store: RowHashStore
    pinned: PinnedTables
    decoder: TradeDecoder
    files: NumberedFiles = field(default_factory=NumberedFiles)

    @property
    def id_hash(self) -> str:
        """The SQL that hashes a trade's deduplication key."""
        return id_hash(self.pinned.exchange)
