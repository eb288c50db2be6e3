"""Opens Gold for the search of holes: one snapshot, in bounded memory."""

from collections.abc import Iterator
from contextlib import closing, contextmanager
from tempfile import TemporaryDirectory

import duckdb
from pyiceberg.catalog import Catalog

from k2flow.iceberg.catalog import load_table
from k2flow.layers import GOLD_TABLE
from k2flow.query.connection import connect_tables
from k2flow.query.sql import limit_memory

MEMORY_MB = 512


@contextmanager
def open_gold(catalog: Catalog) -> Iterator[duckdb.DuckDBPyConnection]:
    """Open a connection with the view of Gold's newest snapshot; what exceeds MEMORY_MB is spilled to disk.

    Raises CatalogError, also if Gold does not exist.
    """
    tables = {GOLD_TABLE: load_table(catalog, GOLD_TABLE)}
    with TemporaryDirectory(prefix="k2flow-gaps-") as folder, closing(connect_tables(tables)) as db:
        limit_memory(db, MEMORY_MB, folder)
        yield db
