"""`k2flow dlq`."""

from collections.abc import Sequence
from dataclasses import asdict
from datetime import date

from rich.table import Table
from rich.text import Text

from k2flow.cli.output import console, print_json
from k2flow.cli.progress import progress_bars
from k2flow.cli.reprocess import set_up_process, show_outcome
from k2flow.config.settings import load_settings
from k2flow.errors import ReprocessError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.query.connection import connect, table_names
from k2flow.reprocess import replay
from k2flow.reprocess.dead_letters import DeadLetter, Explanation, count_by_reason, explain, find_dead_letters, hex_dump
from k2flow.trades.registry import open_schemas


def list_dead_letters(exchange: str | None, as_json: bool) -> None:
    """Print the number of dead letters per exchange and reason."""
    connection = connect()
    existing = table_names(connection)
    chosen = [e for e in all_exchanges() if e.dlq in existing] if exchange is None else [find_exchange(exchange)]
    found = count_by_reason(connection, chosen)
    if as_json:
        for each in found:
            print_json(asdict(each))
        return
    table = Table("exchange", "reason", "count", "first", "last", "last detail")
    for each in found:
        moments = [f"{at:%Y-%m-%d %H:%M:%S}" for at in (each.first, each.last)]
        table.add_row(each.exchange, each.reason, f"{each.count:,}", *moments, Text(each.example))
    console().print(table)


def show_dead_letter(exchange: str, partition: int, offset: int) -> None:
    """Print the dead letter of one offset, as today's schemas and rules read it."""
    found = find_exchange(exchange)
    schemas = open_schemas(load_settings(exchange_names()))
    for letter in find_dead_letters(connect(), found, partition, offset):
        _show(letter, explain(letter, found, schemas))


def replay_dead_letters(
    exchange: str, reasons: Sequence[str], days: tuple[date | None, date | None], dry_run: bool, as_json: bool
) -> None:
    """Replay the dead letters of these reasons and days of failure, and show the result."""
    settings = load_settings(exchange_names())
    set_up_process(settings)
    found = find_exchange(exchange)
    with progress_bars() as progress:
        outcome = replay(open_catalog(settings), settings, found, reasons, *days, dry_run, progress)
    if reasons and not outcome.messages and not outcome.finished:
        raise ReprocessError(
            f"no dead letter has reason {' or '.join(reasons)}: `k2flow dlq list {exchange}` lists the reasons"
        )
    show_outcome(outcome, dry_run, as_json)


def _show(letter: DeadLetter, explained: Explanation) -> None:
    size = "no value" if letter.payload is None else f"{len(letter.payload):,} bytes"
    facts = Table(show_header=False, box=None)
    for name, value in (
        ("message", f"{letter.topic}[{letter.partition}] offset {letter.offset}, {size}"),
        ("Kafka timestamp", str(letter.kafka_timestamp)),
        ("schema id", str(letter.schema_id)),
        ("failed at", str(letter.failed_at)),
        ("reason", f"{letter.reason}: {letter.detail}"),
        ("today", f"{explained.reason}: {explained.detail}" if explained.reason else "a valid trade"),
    ):
        facts.add_row(name, Text(value))
    out = console()
    out.print(facts)
    if explained.fields:
        fields = Table("field", "bytes", "value")
        for name, value, begin, end in explained.fields:
            fields.add_row(name, f"{begin}-{end - 1}" if end > begin else "none", Text(repr(value)))
        out.print(fields)
    if explained.position is not None:
        out.print(f"defect at byte {explained.position}:")
    for line in hex_dump(letter.payload or b"", explained.position):
        print(line)
