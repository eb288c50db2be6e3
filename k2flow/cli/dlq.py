"""`k2flow dlq`."""

import json
import sys
from dataclasses import asdict
from datetime import datetime
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table as RichTable
from rich.text import Text

from k2flow.cli.progress import progress_bars
from k2flow.cli.reprocess import DAY, day_of, set_up_redo, show_outcome
from k2flow.config.settings import load_settings
from k2flow.errors import ReprocessError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.query.connection import connect, table_names
from k2flow.reprocess import replay
from k2flow.reprocess.dead_letters import Explained, Letter, counts, explain, hex_dump, letters
from k2flow.trades.registry import open_schemas

PIPE_WIDTH = 200

dlq_app = typer.Typer(help="Dead letters: the messages that are no valid trades.", no_args_is_help=True)


@dlq_app.command("list")
def list_letters(
    exchange: Annotated[str | None, typer.Argument(help="One exchange; all if none is named.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One line of JSON for each reason.")] = False,
) -> None:
    """How many dead letters of which reason, since when, and what the last one's trouble was."""
    connection = connect()
    there = table_names(connection)
    asked = [e for e in all_exchanges() if e.dlq in there] if exchange is None else [find_exchange(exchange)]
    found = counts(connection, asked)
    if as_json:
        for each in found:
            print(json.dumps(asdict(each), default=str))
        return
    table = RichTable("exchange", "reason", "count", "first", "last", "the last one")
    for each in found:
        moments = [f"{at:%Y-%m-%d %H:%M:%S}" for at in (each.first, each.last)]
        table.add_row(each.exchange, each.reason, f"{each.count:,}", *moments, Text(each.example))
    _console().print(table)


@dlq_app.command("show")
def show_letter(
    exchange: Annotated[str, typer.Argument(help="Exchange.")],
    partition: Annotated[int, typer.Argument(help="Partition of its topic.")],
    offset: Annotated[int, typer.Argument(help="Offset of the message.")],
) -> None:
    """One dead letter: its fields as far as they can be read, where it goes wrong, and what it would be today."""
    found = find_exchange(exchange)
    schemas = open_schemas(load_settings(exchange_names()))
    for letter in letters(connect(), found, partition, offset):
        _show(letter, explain(letter, found, schemas))


@dlq_app.command("replay")
def replay_letters(
    exchange: Annotated[str, typer.Argument(help="Exchange, whose flow is stopped.")],
    reason: Annotated[list[str] | None, typer.Option(help="Only of this reason; may be given again.")] = None,
    first: Annotated[datetime | None, typer.Option("--from", formats=DAY, help="First day (UTC) of failure.")] = None,
    last: Annotated[datetime | None, typer.Option("--to", formats=DAY, help="Last day of failure.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show what would be replayed; the flow may run.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Move dead letters that are valid trades by now, after a schema or a rule was put right, into Silver and Gold:
    exactly once, whatever dies meanwhile."""
    settings = load_settings(exchange_names())
    set_up_redo(settings.log_level, settings.failpoints)
    found = find_exchange(exchange)
    with progress_bars() as told:
        outcome = replay(
            open_catalog(settings), settings, found, reason or (), day_of(first), day_of(last), dry_run, told
        )
    if reason and not outcome.judged and not outcome.finished:
        raise ReprocessError(
            f"no dead letter has reason {' or '.join(reason)}: `k2flow dlq list {exchange}` shows which do"
        )
    show_outcome(outcome, dry_run, as_json)


def _show(letter: Letter, explained: Explained) -> None:
    console = _console()
    size = "no value" if letter.payload is None else f"{len(letter.payload):,} bytes"
    today = f"{explained.now}: {explained.why}" if explained.now else "a valid trade"
    facts = RichTable(show_header=False, box=None)
    for name, value in (
        ("message", f"{letter.topic}[{letter.partition}] offset {letter.offset}, {size}"),
        ("Kafka's time", str(letter.kafka_timestamp)),
        ("schema id", str(letter.schema_id)),
        ("failed", f"{letter.failed_at}"),
        ("reason", f"{letter.reason}: {letter.detail}"),
        ("today", today),
    ):
        facts.add_row(name, Text(value))
    console.print(facts)
    if explained.fields:
        fields = RichTable("field", "bytes", "value")
        for name, value, begin, end in explained.fields:
            fields.add_row(name, f"{begin}-{end - 1}" if end > begin else "none", Text(repr(value)))
        console.print(fields)
    if explained.position is not None:
        console.print(f"goes wrong at byte {explained.position}:")
    for line in hex_dump(letter.payload or b"", explained.position):
        print(line)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
