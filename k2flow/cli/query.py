"""`k2flow query`."""

import shutil
import sys
import tempfile
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import typer
from rich.table import Table

from k2flow.cli.options import Format
from k2flow.cli.output import console
from k2flow.query.connection import AsOf, connect, query_errors

BATCH_ROWS = 100_000
SHOWN_ROWS = 1_000


def run_query(sql: str, format: Format, as_of: str | None) -> None:
    """Run SQL and write its rows to standard output."""
    connection = connect(None if as_of is None else _as_of(as_of))
    with query_errors():
        relation = connection.sql(sql)
        if relation is None:  # a statement without rows
            return
        if format == "table":
            _show(relation)
        elif format == "arrow":
            reader = relation.to_arrow_reader(BATCH_ROWS)
            with pa.ipc.new_stream(sys.stdout.buffer, reader.schema) as writer:
                for batch in reader:
                    writer.write_batch(batch)
        else:
            _copy(relation, format)


def _as_of(text: str) -> AsOf:
    if text.isdecimal():
        return int(text)
    try:
        moment = datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is neither a time, such as 2026-01-31T12:00, nor a snapshot id") from None
    return moment if moment.tzinfo else moment.replace(tzinfo=UTC)


def _show(relation: duckdb.DuckDBPyRelation) -> None:
    rows = relation.fetchmany(SHOWN_ROWS + 1)
    table = Table(*relation.columns)
    for row in rows[:SHOWN_ROWS]:
        table.add_row(*("NULL" if value is None else str(value) for value in row))
    console().print(table)
    if len(rows) > SHOWN_ROWS:
        text = f"these are the first {SHOWN_ROWS:,} rows: --format csv, json, parquet or arrow writes all"
        print(text, file=sys.stderr)


def _copy(relation: duckdb.DuckDBPyRelation, format: Format) -> None:
    """Let DuckDB write a file, since it knows the form of each type, and copy the file to standard output."""
    header = ", HEADER" if format == "csv" else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        relation.query("result", f"COPY result TO '{path}' (FORMAT {format}{header})")
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()
