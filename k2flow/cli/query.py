"""`k2flow query`."""

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import duckdb
import pyarrow as pa
import typer
from rich.console import Console
from rich.table import Table as RichTable

from k2flow.query.connection import AsOf, connect, query_errors

BATCH_ROWS = 100_000
SHOWN_ROWS = 1_000
PIPE_WIDTH = 240


class Format(StrEnum):
    """How the rows are written. `json` is one object a line, `arrow` an IPC stream."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"
    ARROW = "arrow"


def query_command(
    sql: Annotated[str, typer.Argument(help="SQL for DuckDB; the views are named as the tables.")],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="How the rows are written to stdout.")
    ] = Format.TABLE,
    as_of: Annotated[
        str | None, typer.Option(help="The tables as they were: a time (2026-01-31T12:00, in UTC), or a snapshot's id.")
    ] = None,
) -> None:
    """Query the tables with DuckDB, each as one consistent snapshot."""
    connection = connect(None if as_of is None else _as_of(as_of))
    with query_errors():
        relation = connection.sql(sql)
        if relation is None:  # a statement that has no rows
            return
        if format is Format.TABLE:
            _show(relation)
        elif format is Format.ARROW:
            _stream(relation)
        else:
            _copy(relation, format)


def _as_of(text: str) -> AsOf:
    if text.isdecimal():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a time as 2026-01-31T12:00 nor a snapshot's id") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _show(relation: duckdb.DuckDBPyRelation) -> None:
    rows = relation.fetchmany(SHOWN_ROWS + 1)
    table = RichTable(*relation.columns)
    for row in rows[:SHOWN_ROWS]:
        table.add_row(*("NULL" if value is None else str(value) for value in row))
    Console(width=None if sys.stdout.isatty() else PIPE_WIDTH).print(table)
    if len(rows) > SHOWN_ROWS:
        print(f"the first {SHOWN_ROWS:,} rows; --format csv, json, parquet or arrow writes all", file=sys.stderr)


def _stream(relation: duckdb.DuckDBPyRelation) -> None:
    reader = relation.to_arrow_reader(BATCH_ROWS)
    with pa.ipc.new_stream(sys.stdout.buffer, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch)


def _copy(relation: duckdb.DuckDBPyRelation, format: Format) -> None:
    """DuckDB writes the file (it knows how each type looks in each format), which then goes to stdout."""
    header = ", HEADER" if format is Format.CSV else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        relation.query("result", f"COPY result TO '{path}' (FORMAT {format}{header})")
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()
