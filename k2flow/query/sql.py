"""Pieces of SQL, memory and errors of DuckDB."""

from collections.abc import Iterator
from contextlib import contextmanager

import duckdb

from k2flow.errors import QueryError

THREADS = 4  # of a connection in bounded memory: each thread needs some


def string_literal(text: str) -> str:
    """Return SQL for a text."""
    return "'" + text.replace("'", "''") + "'"


def identifier(name: str) -> str:
    """Return SQL for the name of a table or column."""
    return '"' + name.replace('"', '""') + '"'


def limit_memory(connection: duckdb.DuckDBPyConnection, megabytes: int, folder: str) -> None:
    """Let a connection use this much memory; it spills what exceeds it to `folder`. Raises QueryError."""
    with query_errors():
        connection.execute(f"SET memory_limit = '{megabytes}MB'; SET threads = {THREADS}")
        connection.execute(f"SET preserve_insertion_order = false; SET temp_directory = {string_literal(folder)}")


@contextmanager
def query_errors() -> Iterator[None]:
    """Turn DuckDB's errors into QueryError, both of parsing a statement and of producing its rows."""
    try:
        yield
    except duckdb.Error as error:
        raise QueryError(error_text(error)) from error


def error_text(error: Exception) -> str:
    """Return the text of a DuckDB error on one line."""
    return " ".join(str(error).split())
