"""`k2flow query`."""

import shutil
import sys
import tempfile
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import typer
from rich.cells import cell_len
from rich.console import Console

from k2flow.cli.options import Format
from k2flow.cli.output import console, new_table, styled
from k2flow.errors import QueryError
from k2flow.printable import printable
from k2flow.query.connection import AsOf, connect
from k2flow.query.sql import query_errors, string_literal

BATCH_ROWS = 100_000
SHOWN_ROWS = 1_000
LEAST_COLUMN = 12
"""Characters of a value that a column must have room for: where it has not, each value gets a line."""
NULL = styled("NULL", "dim italic")
NOT_IN_ARROW = "VARIANT"  # the one type of DuckDB that Arrow has no form for
EXPLAINED = ["explain_key", "explain_value"]
Row = tuple[str | None, ...]


def run_query(sql: str, format: Format, as_of: str | None) -> None:
    """Run SQL and write its rows to standard output."""
    try:
        sql.encode()
    except UnicodeEncodeError as error:
        raise QueryError(f"the SQL is not valid UTF-8 at its character {error.start + 1}: type it again") from None
    connection = connect(None if as_of is None else _as_of(as_of))
    with query_errors():
        if format == "table" and _is_query(connection, sql):
            _show(*_first_texts(connection, sql))
            return
        relation = connection.sql(sql)
        if relation is None:  # a statement without rows
            return
        if format == "table":
            _show(relation.columns, _texts(relation))
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


def _is_query(connection: duckdb.DuckDBPyConnection, sql: str) -> bool:
    """Return whether some SQL is one statement that only reads."""
    kinds = [statement.expected_result_type for statement in connection.extract_statements(sql)]
    return kinds == [[duckdb.ExpectedResultType.QUERY_RESULT]]


def _first_texts(connection: duckdb.DuckDBPyConnection, sql: str) -> tuple[list[str], list[Row]]:
    """Return the columns of a query and the texts of its first rows.

    DuckDB reads all manifests of a table each time it plans: once here, three times for a relation that is projected.
    """
    connection.execute("SET arrow_lossless_conversion = true")
    result = connection.execute(sql)
    if any(NOT_IN_ARROW in str(column[1]) for column in result.description or ()):
        relation = connection.sql(sql)
        return relation.columns, _texts(relation)
    reader = result.to_arrow_reader(SHOWN_ROWS + 1)
    batches: list[pa.RecordBatch] = []
    while sum(batch.num_rows for batch in batches) <= SHOWN_ROWS and (batch := next(reader, None)) is not None:
        batches.append(batch)
    names = reader.schema.names
    first = pa.Table.from_batches(batches, reader.schema).rename_columns([f"column{i}" for i in range(len(names))])
    return names, _texts(connection.from_arrow(first))


def _texts(relation: duckdb.DuckDBPyRelation) -> list[Row]:
    """Return the first rows, and one more than are shown if there are more, each value in DuckDB's own words."""
    texts = ", ".join(f"#{i}::VARCHAR" for i in range(1, len(relation.columns) + 1))
    return relation.project(texts).fetchmany(SHOWN_ROWS + 1)


def _show(columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Print rows that `_texts` returns."""
    shown, out = rows[:SHOWN_ROWS], console()
    if columns == EXPLAINED:  # a drawing
        print(*(printable(line) for _, text in shown for line in str(text).splitlines()), sep="\n")
    elif shown and _width(columns, shown) > out.width:
        _print_records(out, columns, shown)
    else:
        table = new_table(*columns)
        for row in shown:
            table.add_row(*(NULL if text is None else text for text in row))
        out.print(table)
    if len(rows) > SHOWN_ROWS:
        text = f"these are the first {SHOWN_ROWS:,} rows: --format csv, json, parquet or arrow writes all"
        print(text, file=sys.stderr)


def _width(columns: Sequence[str], rows: Sequence[Row]) -> int:
    """Return the columns of a terminal that a table of these rows needs to be read."""
    widest = [
        max(cell_len(printable(text or "NULL")) for text in column) for column in zip(columns, *rows, strict=True)
    ]
    return sum(min(width, LEAST_COLUMN) + 3 for width in widest) + 1


def _print_records(out: Console, columns: Sequence[str], rows: Sequence[Row]) -> None:
    for number, row in enumerate(rows, 1):
        record = new_table("", "", show_header=False, box=None, title=f"row {number}", title_justify="left")
        for name, text in zip(columns, row, strict=True):
            record.add_row(name, NULL if text is None else text)
        out.print(record)


def _copy(relation: duckdb.DuckDBPyRelation, format: Format) -> None:
    """Let DuckDB write a file, since it knows the form of each type, and copy the file to standard output."""
    header = ", HEADER" if format == "csv" else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "rows"
        relation.query("result", f"COPY result TO {string_literal(str(path))} (FORMAT {format}{header})")
        with path.open("rb") as file:
            shutil.copyfileobj(file, sys.stdout.buffer)
    sys.stdout.buffer.flush()
