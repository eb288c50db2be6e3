"""`k2flow reprocess`, and the output that it shares with `k2flow dlq replay`."""

import signal
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from k2flow.cli.output import console, print_json
from k2flow.cli.progress import progress_bars
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.failpoints import arm
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.logs import set_up_logging
from k2flow.reprocess import Outcome, reprocess

AMBIGUOUS = (
    "{:,} message ids are left unchanged: Silver has rows that messages of other days may have written, or no longer "
    "keeps some. Include more days, if Bronze has them"
)


def reprocess_days(exchange: str, first: date, last: date | None, dry_run: bool, as_json: bool) -> None:
    """Reprocess the messages that Bronze ingested from `first` to `last` (default: today), and show the result."""
    settings = load_settings(exchange_names())
    set_up_process(settings)
    last = last or datetime.now(UTC).date()
    if last < first:
        raise typer.BadParameter(f"--to {last} is before --from {first}")
    with progress_bars() as progress:
        outcome = reprocess(open_catalog(settings), settings, find_exchange(exchange), first, last, dry_run, progress)
    show_outcome(outcome, dry_run, as_json)


def set_up_process(settings: Settings) -> None:
    """Set up logging, signals, memory and failpoints of a process that replaces rows."""
    set_up_logging(settings.log_level)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the replacement is rolled back first
    keep_freed_memory()
    install_metadata_cache()
    arm(settings.failpoints)


def show_outcome(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    """Print the changes by reason, the rows replaced in each table, and some trades whose values changed."""
    if as_json:
        print_json(_as_json(outcome))
        return
    out = console()
    for text in _notes(outcome):
        out.print(text, highlight=False)
    messages = f"{outcome.messages:,} messages, since {outcome.since}" if outcome.messages else "no messages"
    if not outcome.moved:
        out.print(f"{messages}: nothing {'would change' if dry_run else 'changed'}", highlight=False)
        return
    _show_moved(out, outcome, messages)
    _show_tables(out, outcome, dry_run)
    if outcome.changes:
        _show_changes(out, outcome)


def _notes(outcome: Outcome) -> list[str]:
    notes = []
    if outcome.finished:
        notes.append(f"finished an earlier replacement first: {outcome.finished}")
    if outcome.skipped:
        reason = "their topic was deleted, or they are not in all tables yet"
        notes.append(f"{outcome.skipped:,} messages are skipped: {reason}")
    if outcome.ambiguous:
        notes.append(AMBIGUOUS.format(outcome.ambiguous))
    return notes


def _show_moved(out: Console, outcome: Outcome, messages: str) -> None:
    table = Table("before", "today", "messages", title=f"of {messages}", title_justify="left")
    for (was, now), count in outcome.moved.items():
        table.add_row(was, now if was != now else f"{now}, with other values", f"{count:,}")
    out.print(table)


def _show_tables(out: Console, outcome: Outcome, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    table = Table("table", f"rows {would}removed", f"rows {would}added", "files removed", "files added")
    for layer, replaced in outcome.tables.items():
        files = ("", "") if dry_run else (f"{len(replaced.removed):,}", f"{len(replaced.added):,}")
        table.add_row(layer, f"{replaced.rows_removed:,}", f"{replaced.rows_added:,}", *files)
    out.print(table)


def _show_changes(out: Console, outcome: Outcome) -> None:
    table = Table("message", "trade", "column", "before", "after", title="examples", title_justify="left")
    for change in outcome.changes:
        place = f"[{change.partition}] {change.offset}"
        for column, (before, after) in change.values.items():
            table.add_row(Text(place), Text(change.message_id), column, Text(str(before)), Text(str(after)))
    out.print(table)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "what": outcome.what,
        "finished": outcome.finished,
        "published": outcome.published,
        "messages": outcome.messages,
        "since": outcome.since,
        "skipped": outcome.skipped,
        "ambiguous": outcome.ambiguous,
        "moved": [{"before": was, "after": now, "messages": n} for (was, now), n in outcome.moved.items()],
        "tables": {
            layer: {"rows_removed": replaced.rows_removed, "rows_added": replaced.rows_added}
            for layer, replaced in outcome.tables.items()
        },
        "changes": [
            {**asdict(change), "values": {name: {"before": a, "after": b} for name, (a, b) in change.values.items()}}
            for change in outcome.changes
        ],
    }
