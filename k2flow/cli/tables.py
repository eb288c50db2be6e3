"""`k2flow tables` and `k2flow maintain`."""

import logging
import math
import time
from collections.abc import Sequence
from threading import Event

import typer
from humanize import naturalsize
from pyiceberg.catalog import Catalog

from k2flow.cli.output import console, new_table
from k2flow.cli.process import every, exit_on_error, stop_event
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import load_settings
from k2flow.errors import CatalogError, DataFileError, MaintenanceError, one_line
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import NAMESPACE, find_table, open_catalog, table_names
from k2flow.iceberg.deletes import delete_files
from k2flow.iceberg.tables import TableDefinition, candles_definition, create, definitions, gold_definition
from k2flow.layers import CANDLES, CANDLES_TABLE, GOLD_TABLE
from k2flow.maintain.actions import MaintenanceAction, Timing
from k2flow.maintain.lease import MaintenanceLeases
from k2flow.maintain.ownership import OtherTables
from k2flow.maintain.run import MaintenanceRun
from k2flow.observability.logs import set_up_logging
from k2flow.observability.systemd import report_to_systemd
from k2flow.process_exit import EXIT_FAILED, EXIT_UNAVAILABLE
from k2flow.status.model import moment
from k2flow.status.tables import totals

log = logging.getLogger(__name__)


def create_tables(flow: str) -> None:
    """Create the tables of one flow, or of all, and print the result for each."""
    settings = load_settings(exchange_names())
    exchanges = all_exchanges() if flow == "all" else [] if flow == CANDLES.name else [find_exchange(flow)]
    wanted = [list(definitions(each).values()) for each in exchanges]
    if flow in ("all", CANDLES.name):
        wanted.append([candles_definition()] if exchanges else [gold_definition(), candles_definition()])
    catalog = open_catalog(settings)
    for each in wanted:
        for name, done in create(catalog, each, settings.accept_lost_tables).items():
            print(f"{NAMESPACE}.{name}: {done or 'up to date'}")


def list_tables() -> None:
    """Print the size and last commit of each table, and how many of the medallion tables exist."""
    catalog = open_catalog(load_settings(exchange_names()))
    exchanges = all_exchanges()
    medallion = [name for e in exchanges for name in (e.bronze, e.silver)] + [GOLD_TABLE]
    rows, errors = {}, []
    for name in sorted([*medallion, *(e.dlq for e in exchanges), CANDLES_TABLE]):
        try:
            rows[name] = _row(catalog, name)
        except (DataFileError, ValueError) as error:  # the other tables are listed
            rows[name] = ("unreadable", "", "", "")
            errors.append(one_line(error))
    table = new_table("table", "rows", "files", "bytes", "last commit")
    for name, row in rows.items():
        table.add_row(name, *(row or ("missing", "", "", "")))
    console().print(table)
    print(f"{sum(rows[name] is not None for name in medallion)}/{len(medallion)} medallion tables")
    if errors:
        raise DataFileError("; ".join(errors))


def run_maintenance(
    tables: Sequence[str], interval: float | None, dry_run: bool, orphan_seconds: float, reader_seconds: float
) -> None:
    """Maintain tables once and show the result; or every `interval` seconds, until a signal, and log it."""
    if interval is not None and dry_run:
        raise typer.BadParameter("--dry-run shows one run: omit --every")
    settings = load_settings(exchange_names())
    set_up_logging("WARNING" if interval is None else settings.log_level, settings.log_format)
    keep_freed_memory()
    install_metadata_cache()
    timing, stop = Timing(orphan_seconds, reader_seconds), stop_event()
    with exit_on_error(EXIT_FAILED, retryable_code=None if interval is None else EXIT_UNAVAILABLE):
        catalog = open_catalog(settings)
        chosen, leases = _chosen(catalog, tables), MaintenanceLeases(catalog)
    try:
        if interval is None:
            actions, errors = _maintain(catalog, chosen, timing, None if dry_run else leases, stop)
            _show_actions(actions, dry_run)
            if errors:
                raise MaintenanceError(f"not done: {'; '.join(errors)}")
            return
        with report_to_systemd(lambda: None, lambda: None, stop):
            listed = -math.inf
            for _ in every(interval, stop):
                # Orphan files are an hour old anyway, and may wait as long again: a listing costs more than the rest.
                if full := time.monotonic() - listed >= orphan_seconds:
                    listed = time.monotonic()
                try:
                    chosen = _chosen(catalog, tables)  # tables may be new
                except CatalogError as error:
                    log.error("%s", error)
                _maintain(catalog, chosen, timing, leases, stop, full)
    finally:
        leases.release()


def _row(catalog: Catalog, name: str) -> tuple[str, str, str, str] | None:
    found = find_table(catalog, name)
    if found is None:
        return None
    has = totals(found.current_snapshot(), delete_files(found, found.current_snapshot()))
    deleted = ", deleted ones too" if has.delete_files else ""
    when = "never" if has.committed_at is None else f"{moment(has.committed_at)} UTC"
    return (f"{has.rows:,}{deleted}", f"{has.files:,}", naturalsize(has.bytes), when)


def _maintain(
    catalog: Catalog,
    chosen: Sequence[TableDefinition],
    timing: Timing,
    leases: MaintenanceLeases | None,
    stop: Event,
    full: bool = True,
) -> tuple[list[MaintenanceAction], list[str]]:
    """Return the actions and errors of a run over all tables; no table stops the others. A dry run has no leases."""
    actions: list[MaintenanceAction] = []
    errors: list[str] = []
    others = OtherTables(catalog)
    for definition in chosen:
        try:
            holder = leases.acquire(definition.name) if leases else None
            if holder:
                log.warning("%s: skipped, since %s maintains it", definition.name, holder)
                continue
            for action in MaintenanceRun(catalog, definition, timing, leases is None, others, full).run():
                actions.append(action)
                if stop.is_set():
                    return actions, errors
        except Exception as error:  # whatever is in one table, the others are maintained
            log.error("%s: %s", definition.name, one_line(error))
            log.debug("%s", definition.name, exc_info=True)
            errors.append(f"{definition.name}: {one_line(error)}")
    return actions, errors


def _chosen(catalog: Catalog, names: Sequence[str]) -> list[TableDefinition]:
    """Return the definitions of the named tables, or of all that exist. Raises MaintenanceError, CatalogError."""
    known = {name: each for exchange in all_exchanges() for name, each in definitions(exchange).items()}
    known[CANDLES_TABLE] = candles_definition()
    unknown = [name for name in names if name not in known]
    if unknown:
        raise MaintenanceError(f"unknown table {unknown[0]}: known are {', '.join(sorted(known))}")
    existing = names or known.keys() & table_names(catalog)
    return [known[name] for name in sorted(set(existing))]


def _show_actions(actions: Sequence[MaintenanceAction], dry_run: bool) -> None:
    if not actions:
        print("nothing to do")
        return
    table = new_table("table", "due" if dry_run else "done", "removed", "added", "rows", "bytes", "s", "")
    for a in actions:
        numbers = (f"{a.removed:,}", f"{a.added:,}", f"{a.rows:,}", naturalsize(a.bytes), f"{a.seconds:.1f}")
        table.add_row(a.table, a.what, *numbers, a.detail)
    console().print(table)
