"""Gold of two exchanges in a real catalog, and its expected keys."""

import numpy as np
import pyarrow as pa
from pyiceberg.catalog import Catalog

from k2flow.exchange import find_exchange
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.head import AfterRollback
from k2flow.iceberg.ledger import OffsetRange
from k2flow.iceberg.tables import create, definitions
from k2flow.iceberg.writer import DataFileWriter
from k2flow.layers import GOLD, GOLD_TABLE, SILVER
from k2flow.trades.gold_ids import GoldIds

EXCHANGES = ("binance", "kraken")
HOUR = 3600


class Gold:
    """Gold of two exchanges; `held` has the expected ids by (exchange, hour)."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.held: dict[tuple[str, int], set[str]] = {}
        self._committers: dict[str, Committer] = {}
        for name in EXCHANGES:
            wanted = definitions(find_exchange(name))
            create(catalog, wanted.values())
            self.definition = wanted[GOLD_TABLE]
            self._writer = DataFileWriter(load_table(catalog, GOLD_TABLE), self.definition)
            self.start(name)
        self._offset = dict.fromkeys(EXCHANGES, 0)

    def start(self, exchange: str, after_rollback: AfterRollback = "stop") -> None:
        """Start the committer of an exchange, again."""
        committer = Committer(self.catalog, GOLD_TABLE, exchange, "topic", after_rollback=after_rollback)
        committer.fence("id")
        self._committers[exchange] = committer

    def add(self, exchange: str, hours: np.ndarray, **more: pa.Array) -> None:
        """Commit a row in each of these hours; `more` has its other columns of Silver, and may have its time."""
        n, first = len(hours), self._offset[exchange]
        ids = [f"{exchange}-{first + i}" for i in range(n)]
        times = more.get("timestamp", pa.array(hours * HOUR * 1_000_000 + 7).cast(pa.timestamp("us", "UTC")))
        columns = {
            "message_id": pa.array(ids),
            "exchange": pa.repeat(find_exchange(exchange).code, n),
            "timestamp": times,
            "exchange_date": times.cast(pa.date32()),
            **more,
        }
        nullable = pa.schema([field.with_nullable(True) for field in SILVER.arrow_schema])
        silver = [columns.get(field.name, pa.nulls(n, field.type)) for field in nullable]
        rows = GOLD.rows(pa.RecordBatch.from_arrays(silver, schema=nullable))
        self._committers[exchange].commit(self._writer.write(rows), [OffsetRange(0, first, first + n, n)])
        self._offset[exchange] += n
        for hour, message_id in zip(hours.tolist(), ids, strict=True):
            self.held.setdefault((exchange, hour), set()).add(message_id)

    def ids(self, exchange: str) -> GoldIds:
        return GoldIds(self.catalog, find_exchange(exchange).code)

    def newest(self, exchange: str) -> int:
        return max(hour for name, hour in self.held if name == exchange)
