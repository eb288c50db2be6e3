"""`k2flow tables`."""

from typing import Annotated

import typer
from pyiceberg.catalog import Catalog
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as RichTable

from k2flow.config.settings import load_settings
from k2flow.exchange import GOLD, all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import NAMESPACE, find_table, open_catalog
from k2flow.iceberg.tables import create, definitions
from k2flow.status.report import moment
from k2flow.status.tables import totals

tables_app = typer.Typer(help="The Iceberg tables.", no_args_is_help=True)


@tables_app.command("create")
def create_tables(
    which: Annotated[str, typer.Argument(help="`all`, or one exchange.")] = "all",
) -> None:
    """Make the tables that are missing, and bring the columns of those that are there up to date; any other difference
    is an error. Never drops anything."""
    settings = load_settings(exchange_names())
    exchanges = all_exchanges() if which == "all" else [find_exchange(which)]
    catalog = open_catalog(settings)
    for exchange in exchanges:
        for name, done in create(catalog, definitions(exchange).values()).items():
            print(f"{NAMESPACE}.{name}: {done or 'is there, as it must be'}")


@tables_app.command("list")
def list_tables() -> None:
    """The tables: rows, files, bytes, last commit."""
    catalog = open_catalog(load_settings(exchange_names()))
    exchanges = all_exchanges()
    medallion = [name for e in exchanges for name in (e.bronze, e.silver)] + [GOLD]
    table = RichTable("table", "rows", "files", "bytes", "last commit")
    there = 0
    for name in sorted(medallion + [e.dlq for e in exchanges]):
        row = _row(catalog, name)
        there += row is not None and name in medallion
        table.add_row(name, *(row or ("missing", "", "", "")))
    Console().print(table)
    print(f"{there}/{len(medallion)} medallion tables")


def _row(catalog: Catalog, name: str) -> tuple[str, str, str, str] | None:
    found = find_table(catalog, name)
    if found is None:
        return None
    has = totals(found.current_snapshot())
    when = "never" if has.committed_at is None else f"{moment(has.committed_at)} UTC"
    return (f"{has.rows:,}", f"{has.files:,}", decimal(has.bytes), when)
