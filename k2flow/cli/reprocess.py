"""`k2flow reprocess`, and how it and `k2flow dlq replay` show what they did."""

import json
import signal
import sys
from datetime import UTC, date, datetime
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from k2flow.cli.progress import progress_bars
from k2flow.compat.table_metadata import install_metadata_cache
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.failpoints import arm
from k2flow.flow.runtime import keep_freed_memory
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.logs import set_up_logging
from k2flow.reprocess import Outcome, reprocess

DAY = ["%Y-%m-%d"]
PIPE_WIDTH = 200


def reprocess_command(
    exchange: Annotated[str, typer.Argument(help="Exchange, whose flow is stopped.")],
    first: Annotated[
        datetime, typer.Option("--from", formats=DAY, help="First day (UTC) of those on which Bronze took messages in.")
    ],
    last: Annotated[datetime | None, typer.Option("--to", formats=DAY, help="Last day; default: today.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be replaced; the flow may run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Judge messages again, by today's schemas and rules, out of Bronze, and replace what came of them in Silver, the
    dead letters and Gold: exactly once, whatever dies meanwhile.
    """
    settings = load_settings(exchange_names())
    set_up_redo(settings.log_level, settings.failpoints)
    until = last.date() if last else datetime.now(UTC).date()
    if until < first.date():
        raise typer.BadParameter(f"--to {until} is before --from {first.date()}")
    with progress_bars() as told:
        outcome = reprocess(
            open_catalog(settings), settings, find_exchange(exchange), first.date(), until, dry_run, told
        )
    show_outcome(outcome, dry_run, as_json)


def set_up_redo(log_level: str, failpoints: str) -> None:
    """What a process that replaces rows needs first."""
    set_up_logging(log_level)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what was begun is given up first
    keep_freed_memory()
    install_metadata_cache()
    arm(failpoints)


def show_outcome(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    """Prints it: what becomes of what, the rows of each table, and some trades of which values change."""
    if as_json:
        print(json.dumps(_as_json(outcome), default=str))
        return
    console = Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
    if outcome.finished:
        console.print(f"finished first, what an earlier run had decided: {outcome.finished}", highlight=False)
    if outcome.left_alone:
        text = f"{outcome.left_alone:,} messages are left alone: of a topic that was deleted, or not yet in all tables"
        console.print(text, highlight=False)
    if outcome.unclear:
        text = (
            f"{outcome.unclear:,} message ids are left as they are: Silver has rows of theirs that messages of other "
            "days may have given, or lacks some that it no longer keeps, and nothing tells which are whose. Take in "
            "more days, if Bronze has them"
        )
        console.print(text, highlight=False)
    judged = f"{outcome.judged:,} messages, since {outcome.since}" if outcome.judged else "no messages"
    if not outcome.moved:
        console.print(f"{judged}: nothing would be different", highlight=False)
        return
    moved = RichTable("was", "is today", "messages", title=f"of {judged}", title_justify="left")
    for (was, now), count in outcome.moved.items():
        moved.add_row(was, now if was != now else f"{now}, with other values", f"{count:,}")
    console.print(moved)
    tables = RichTable("table", "rows that would go" if dry_run else "rows gone", "come", "files gone", "come")
    for layer, replaced in outcome.tables.items():
        files = ("", "") if dry_run else (f"{len(replaced.removed):,}", f"{len(replaced.added):,}")
        tables.add_row(layer, f"{replaced.rows_gone:,}", f"{replaced.rows_come:,}", *files)
    console.print(tables)
    if outcome.changes:
        changed = RichTable("message", "trade", "column", "before", "after", title="for example", title_justify="left")
        for change in outcome.changes:
            for column, (before, after) in change.values.items():
                place = f"[{change.partition}] {change.offset}"
                changed.add_row(Text(place), Text(change.message_id), column, Text(str(before)), Text(str(after)))
        console.print(changed)


def _as_json(outcome: Outcome) -> dict[str, Any]:
    return {
        "what": outcome.what,
        "finished": outcome.finished,
        "published": outcome.published,
        "judged": outcome.judged,
        "since": outcome.since,
        "left_alone": outcome.left_alone,
        "unclear": outcome.unclear,
        "moved": [{"was": was, "is": now, "messages": n} for (was, now), n in outcome.moved.items()],
        "tables": {
            layer: {"rows_gone": replaced.rows_gone, "rows_come": replaced.rows_come}
            for layer, replaced in outcome.tables.items()
        },
        "changes": [
            {
                "partition": change.partition,
                "offset": change.offset,
                "message_id": change.message_id,
                "values": {name: {"before": a, "after": b} for name, (a, b) in change.values.items()},
            }
            for change in outcome.changes
        ],
    }


def day_of(moment: datetime | None) -> date | None:
    return moment.date() if moment else None
