"""k2flow: crypto trades from Kafka into Apache Iceberg, exactly once."""

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import duckdb

    from k2flow.query.connection import AsOf

# Before pyarrow is imported, for it looks only then: see runtime.keep_freed_memory.
os.environ.setdefault("ARROW_DEFAULT_MEMORY_POOL", "system")

__version__ = "0.1.0"


def connect(as_of: "AsOf | None" = None) -> "duckdb.DuckDBPyConnection":
    """A DuckDB connection with a view for each table, as it is or was; see k2flow.query.connection.connect."""
    from k2flow.query import connection as query

    return query.connect(as_of)
