"""Gold of two exchanges in a real catalog, and what it should hold."""

import numpy as np
import pyarrow as pa
from pyiceberg.catalog import Catalog

from k2flow.exchange import GOLD, find_exchange
from k2flow.flow.dedup import GoldIds, gold_rows
from k2flow.iceberg.catalog import load_table
from k2flow.iceberg.commit import Committer
from k2flow.iceberg.ledger import Range
from k2flow.iceberg.tables import SILVER_FIELDS, arrow_schema, create, definitions
from k2flow.iceberg.writer import DataFileWriter

EXCHANGES = ("binance", "kraken")
HOUR = 3600


class Gold:
    """Gold of two exchanges, and what it should hold: (exchange, hour) to ids."""

    def __init__(self, catalog: Catalog) -> None:
        self.catalog = catalog
        self.held: dict[tuple[str, int], set[str]] = {}
        self._committers = {}
        for name in EXCHANGES:
            wanted = definitions(find_exchange(name))
            create(catalog, wanted.values())
            self._writer = DataFileWriter(load_table(catalog, GOLD), wanted[GOLD])
            self._committers[name] = Committer(catalog, GOLD, name, "topic")
            self._committers[name].fence("id")
        self._offset = dict.fromkeys(EXCHANGES, 0)

    def add(self, exchange: str, hours: np.ndarray) -> None:
        """One commit with a row in each of these hours."""
        n, first = len(hours), self._offset[exchange]
        ids = [f"{exchange}-{first + i}" for i in range(n)]
        times = pa.array(hours * HOUR * 1_000_000 + 7).cast(pa.timestamp("us", "UTC"))
        columns = {
            "message_id": pa.array(ids),
            "exchange": pa.repeat(find_exchange(exchange).code, n),
            "timestamp": times,
            "exchange_date": times.cast(pa.date32()),
        }
        nullable = pa.schema([field.with_nullable(True) for field in arrow_schema(SILVER_FIELDS)])
        silver = [columns.get(field.name, pa.nulls(n, field.type)) for field in nullable]
        rows = gold_rows(pa.RecordBatch.from_arrays(silver, schema=nullable))
        self._committers[exchange].commit(self._writer.write(rows), [Range(0, first, first + n, n)])
        self._offset[exchange] += n
        for hour, message_id in zip(hours.tolist(), ids, strict=True):
            self.held.setdefault((exchange, hour), set()).add(message_id)

    def ids(self, exchange: str) -> GoldIds:
        return GoldIds(self.catalog, find_exchange(exchange).code)

    def newest(self, exchange: str) -> int:
        return max(hour for name, hour in self.held if name == exchange)
