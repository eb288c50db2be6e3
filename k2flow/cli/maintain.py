"""`k2flow maintain`."""

import logging
import threading
import time
from typing import Annotated

import typer
from pyiceberg.catalog import Catalog
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table as RichTable

from k2flow.cli.repeated import duration, stop_event
from k2flow.compat.table_metadata import install_metadata_cache
from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError, K2flowError, MaintenanceError
from k2flow.exchange import all_exchanges, exchange_names
from k2flow.flow.runtime import keep_freed_memory
from k2flow.iceberg.catalog import NAMESPACE, catalog_errors, open_catalog
from k2flow.iceberg.tables import TableDefinition, definitions
from k2flow.maintain.lease import Leadership
from k2flow.maintain.run import Action, Pass, Timing
from k2flow.observability.logs import set_up_logging

log = logging.getLogger(__name__)


def maintain_command(
    tables: Annotated[list[str] | None, typer.Argument(help="Tables; all if none is named.")] = None,
    every: Annotated[str | None, typer.Option(help="Go on, with a pass so often: 5m, 1h.")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what a pass would do now.")] = False,
    safe_age: Annotated[
        str, typer.Option(help="Files that nothing reaches go once they are so old; younger ones may be in flight.")
    ] = "1h",
    reader_time: Annotated[
        str, typer.Option(help="Files that were replaced stay so long, for queries that are still reading them.")
    ] = "1h",
) -> None:
    """Retention, compaction, snapshot expiry, files that nothing reaches: beside the flows, which never wait for it."""
    settings = load_settings(exchange_names())
    set_up_logging(settings.log_level if every else "WARNING")
    pause = duration(every) if every else None
    timing = Timing(duration(safe_age), duration(reader_time))
    if every and dry_run:
        raise typer.BadParameter("--dry-run is of one pass: leave out --every")
    keep_freed_memory()
    install_metadata_cache()
    catalog = open_catalog(settings)
    wanted = _chosen(catalog, tables or [])
    leadership = Leadership(catalog)
    stop = stop_event()
    try:
        while True:
            began = time.monotonic()
            actions, failed = _pass(catalog, wanted, timing, leadership, dry_run, stop)
            if pause is None or stop.wait(max(0.0, pause - (time.monotonic() - began))):
                break
            try:
                wanted = _chosen(catalog, tables or [])  # there may be new ones
            except CatalogError as error:
                log.error("%s", error)
    finally:
        leadership.release()
    if every is None:
        _show(actions, dry_run)
        if failed:
            raise MaintenanceError(f"not done: {'; '.join(failed)}")


def _pass(
    catalog: Catalog,
    wanted: list[TableDefinition],
    timing: Timing,
    leadership: Leadership,
    dry_run: bool,
    stop: threading.Event,
) -> tuple[list[Action], list[str]]:
    """What was done to each table, and what went wrong, which keeps no other table from its turn."""
    actions: list[Action] = []
    failed: list[str] = []
    for definition in wanted:
        try:
            leader = None if dry_run else leadership.take(definition.name)
            if leader:
                log.warning("%s: %s maintains it: left to that one", definition.name, leader)
                continue
            for action in Pass(catalog, definition, timing, dry_run).run():
                actions.append(action)
                if stop.is_set():
                    return actions, failed
        except K2flowError as error:
            log.error("%s: %s", definition.name, error)
            failed.append(f"{definition.name}: {error}")
    return actions, failed


def _chosen(catalog: Catalog, names: list[str]) -> list[TableDefinition]:
    """The definitions of the tables that are named, or of all that there are. Raises MaintenanceError."""
    known = {name: each for exchange in all_exchanges() for name, each in definitions(exchange).items()}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MaintenanceError(f"unknown table {unknown[0]}: known are {', '.join(sorted(known))}")
    with catalog_errors():
        return [
            each
            for name, each in sorted(known.items())
            if name in names or (not names and catalog.table_exists((NAMESPACE, name)))
        ]


def _show(actions: list[Action], dry_run: bool) -> None:
    table = RichTable("table", "would do" if dry_run else "did", "gone", "come", "rows", "bytes", "s", "")
    for a in actions:
        table.add_row(
            a.table, a.what, f"{a.gone:,}", f"{a.come:,}", f"{a.rows:,}", decimal(a.bytes), f"{a.seconds:.1f}", a.detail
        )
    if actions:
        Console(width=160).print(table)
    else:
        print("nothing to do")
