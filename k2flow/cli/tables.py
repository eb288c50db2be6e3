"""`k2flow tables`."""

from humanize import naturalsize
from pyiceberg.catalog import Catalog
from rich.table import Table

from k2flow.cli.output import console
from k2flow.config.settings import load_settings
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import NAMESPACE, find_table, open_catalog
from k2flow.iceberg.tables import create, definitions
from k2flow.layers import GOLD_TABLE
from k2flow.status.model import moment
from k2flow.status.tables import totals


def create_tables(exchange: str) -> None:
    """Create the tables of one exchange, or of all, and print the result for each."""
    settings = load_settings(exchange_names())
    exchanges = all_exchanges() if exchange == "all" else [find_exchange(exchange)]
    catalog = open_catalog(settings)
    for each in exchanges:
        for name, done in create(catalog, definitions(each).values()).items():
            print(f"{NAMESPACE}.{name}: {done or 'up to date'}")


def list_tables() -> None:
    """Print the size and last commit of each table, and how many of the medallion tables exist."""
    catalog = open_catalog(load_settings(exchange_names()))
    exchanges = all_exchanges()
    medallion = [name for e in exchanges for name in (e.bronze, e.silver)] + [GOLD_TABLE]
    rows = {name: _row(catalog, name) for name in sorted(medallion + [e.dlq for e in exchanges])}
    table = Table("table", "rows", "files", "bytes", "last commit")
    for name, row in rows.items():
        table.add_row(name, *(row or ("missing", "", "", "")))
    console().print(table)
    print(f"{sum(rows[name] is not None for name in medallion)}/{len(medallion)} medallion tables")


def _row(catalog: Catalog, name: str) -> tuple[str, str, str, str] | None:
    found = find_table(catalog, name)
    if found is None:
        return None
    has = totals(found.current_snapshot())
    when = "never" if has.committed_at is None else f"{moment(has.committed_at)} UTC"
    return (f"{has.rows:,}", f"{has.files:,}", naturalsize(has.bytes), when)
