"""`k2flow reprocess` and `k2flow dlq`."""

import signal
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, date, datetime
from typing import Any

import typer
from rich.console import Console

from k2flow.cli.output import console, new_table, print_json, progress_bars
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import ReprocessError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.failpoints import arm
from k2flow.iceberg.catalog import find_table, open_catalog
from k2flow.layers import GOLD_TABLE
from k2flow.observability.logs import set_up_logging
from k2flow.query.connection import connect, table_names
from k2flow.reprocess import Outcome, replay, reprocess, set_new_key
from k2flow.reprocess.dead_letters import DeadLetter, Explanation, count_by_reason, explain, find_dead_letters, hex_dump
from k2flow.trades.stored_schemas import StoredSchemas


def reprocess_days(exchange: str, first: date, last: date | None, dry_run: bool, as_json: bool) -> None:
    """Reprocess the messages that Bronze ingested from `first` to `last` (default: today), and show the result."""
    settings = load_settings(exchange_names())
    _set_up_process(settings)
    last = last or datetime.now(UTC).date()
    if last < first:
        raise typer.BadParameter(f"--to {last} is before --from {first}")
    with progress_bars() as progress:
        outcome = reprocess(open_catalog(settings), settings, find_exchange(exchange), first, last, dry_run, progress)
    _show_outcome(outcome, dry_run, as_json)


def change_key(exchange: str, dry_run: bool, as_json: bool) -> None:
    """Replace the rows of an exchange in Gold by those of the key that it declares, and show the result."""
    settings = load_settings(exchange_names())
    _set_up_process(settings)
    with progress_bars() as progress:
        found = set_new_key(open_catalog(settings), settings, find_exchange(exchange), dry_run, progress)
    if as_json:
        print_json(asdict(found))
        return
    would = "would be " if dry_run else ""
    before, after = " and ".join(found.before), " and ".join(found.after)
    print(f"deduplication key of {exchange}: {before} before, {after} {'then' if dry_run else 'now'}")
    print(f"{GOLD_TABLE}: {found.rows_removed:,} rows {would}removed, {found.rows_added:,} rows {would}added")


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
    table = new_table("exchange", "reason", "count", "first", "last", "last detail")
    for each in found:
        moments = [f"{at:%Y-%m-%d %H:%M:%S}" for at in (each.first, each.last)]
        table.add_row(each.exchange, each.reason, f"{each.count:,}", *moments, each.example)
    console().print(table)


def show_dead_letter(exchange: str, partition: int, offset: int) -> None:
    """Print the dead letter of one offset, as today's schemas and rules read it."""
    found, settings = find_exchange(exchange), load_settings(exchange_names())
    bronze = find_table(open_catalog(settings), found.bronze)
    schemas = StoredSchemas(settings, bronze.properties if bronze else {}, found.name)
    for letter in find_dead_letters(connect(), found, partition, offset):
        _show_letter(letter, explain(letter, found, schemas))


def replay_dead_letters(
    exchange: str, reasons: Sequence[str], days: tuple[date | None, date | None], dry_run: bool, as_json: bool
) -> None:
    """Replay the dead letters of these reasons and days of failure, and show the result."""
    settings = load_settings(exchange_names())
    _set_up_process(settings)
    found = find_exchange(exchange)
    with progress_bars() as progress:
        outcome = replay(open_catalog(settings), settings, found, reasons, *days, dry_run, progress)
    if reasons and not outcome.messages and not outcome.finished:
        raise ReprocessError(
            f"no dead letter has reason {' or '.join(reasons)}: `k2flow dlq list {exchange}` lists the reasons"
        )
    _show_outcome(outcome, dry_run, as_json)


def _set_up_process(settings: Settings) -> None:
    """Set up logging, signals, memory and failpoints of a process that replaces rows."""
    set_up_logging(settings.log_level)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the replacement is rolled back first
    keep_freed_memory()
    install_metadata_cache()
    arm(settings.failpoints)


def _show_outcome(outcome: Outcome, dry_run: bool, as_json: bool) -> None:
    if as_json:
        print_json(_as_json(outcome))
        return
    out = console()
    for text in _notes(outcome):
        out.print(text)
    messages = f"{outcome.messages:,} messages, since {outcome.since}" if outcome.messages else "no messages"
    if not outcome.moved:
        out.print(f"{messages}: nothing {'would change' if dry_run else 'changed'}")
        return
    moved = new_table("before", "today", "messages", title=f"of {messages}", title_justify="left")
    for (was, now), count in outcome.moved.items():
        moved.add_row(was, now if was != now else f"{now}, with other values", f"{count:,}")
    out.print(moved)
    _show_tables(out, outcome, dry_run)
    if outcome.changes:
        _show_changes(out, outcome)


def _notes(outcome: Outcome) -> Iterator[str]:
    if outcome.finished:
        yield f"finished an earlier replacement first: {outcome.finished}"
    if outcome.skipped:
        yield f"{outcome.skipped:,} messages are skipped: their topic was deleted, or they are not in all tables yet"
    if outcome.ambiguous:
        yield (
            f"{outcome.ambiguous:,} message ids are left unchanged: Silver has rows that messages of other days may "
            "have written, or no longer keeps some. Include more days, if Bronze has them"
        )


def _show_tables(out: Console, outcome: Outcome, dry_run: bool) -> None:
    would = "would be " if dry_run else ""
    table = new_table("table", f"rows {would}removed", f"rows {would}added", "files removed", "files added")
    for layer, replaced in outcome.tables.items():
        files = ("", "") if dry_run else (f"{len(replaced.removed):,}", f"{len(replaced.added):,}")
        table.add_row(layer, f"{replaced.rows_removed:,}", f"{replaced.rows_added:,}", *files)
    out.print(table)


def _show_changes(out: Console, outcome: Outcome) -> None:
    table = new_table("message", "trade", "column", "before", "after", title="examples", title_justify="left")
    for change in outcome.changes:
        place = f"[{change.partition}] {change.offset}"
        for column, (before, after) in change.values.items():
            table.add_row(place, change.message_id, column, str(before), str(after))
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
            layer: {"rows_removed": t.rows_removed, "rows_added": t.rows_added} for layer, t in outcome.tables.items()
        },
        "changes": [
            {**asdict(change), "values": {name: {"before": a, "after": b} for name, (a, b) in change.values.items()}}
            for change in outcome.changes
        ],
    }


def _show_letter(letter: DeadLetter, explained: Explanation) -> None:
    size = "no value" if letter.payload is None else f"{len(letter.payload):,} bytes"
    facts = new_table("", "", show_header=False, box=None)
    for name, value in (
        ("message", f"{letter.topic}[{letter.partition}] offset {letter.offset}, {size}"),
        ("Kafka timestamp", str(letter.kafka_timestamp)),
        ("schema id", str(letter.schema_id)),
        ("failed at", str(letter.failed_at)),
        ("reason", f"{letter.reason}: {letter.detail}"),
        ("today", f"{explained.reason}: {explained.detail}" if explained.reason else "a valid trade"),
    ):
        facts.add_row(name, value)
    out = console()
    out.print(facts)
    if explained.fields:
        fields = new_table("field", "bytes", "value")
        for name, value, begin, end in explained.fields:
            fields.add_row(name, f"{begin}-{end - 1}" if end > begin else "none", repr(value))
        out.print(fields)
    if explained.position is not None:
        out.print(f"defect at byte {explained.position}:")
    for line in hex_dump(letter.payload or b"", explained.position):
        print(line)
