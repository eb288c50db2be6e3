"""The commands of `k2flow`: their arguments, options and help. This module imports no slow library."""

import gc
import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from k2flow.cli.groups import dlq_app, kafka_app, tables_app
from k2flow.cli.options import (
    AsJson,
    AuditEvery,
    Debug,
    Exchanges,
    Flows,
    Format,
    FullAudit,
    Sample,
    Seed,
    Since,
    StoppedExchange,
    Version,
    argument,
    day,
    duration,
    flag,
    group,
    moment,
    option,
)
from k2flow.cli.process import DEBUG, any_output, exit_on_error
from k2flow.config.pyiceberg_file import check_pyiceberg_file
from k2flow.process_exit import EXIT_FAILED

HOUR_SECONDS = 3600.0
app = group("k2flow", "Write crypto trades from Kafka into Apache Iceberg tables, exactly once.")
for commands in (tables_app, dlq_app, kafka_app):
    app.add_typer(commands)


def main() -> None:
    """Run the command line. An error is one line on standard error and exit code 1."""
    try:
        with any_output(), exit_on_error(EXIT_FAILED):
            app()
    finally:
        gc.freeze()  # or Python searches all objects for cycles several times before it ends: a third of a second


@app.callback()
def _options(debug: Debug = False, version: Version = False) -> None:
    """Set the options of all commands, for the processes that a command starts too."""
    if debug:
        os.environ[DEBUG] = "1"
    if "--help" not in sys.argv:  # the check may import PyIceberg, and every command does so afterwards
        check_pyiceberg_file()


@app.command()
def run(
    flows: Annotated[list[str], argument("FLOW", "Exchanges, or `candles`: names of files in flows/.")],
    processes: Annotated[
        int | None, option("N", "Processes per exchange. Default: the exchange's setting.", min=1, max=64)
    ] = None,
    trigger: Annotated[
        float | None, option("SECONDS", "Seconds between commits. Default: the exchange's setting.")
    ] = None,
    until_caught_up: Annotated[bool, flag("--until-caught-up", "Stop at what the topic, or Gold, has now.")] = False,
    addresses: Annotated[
        str | None, option("HOST:PORT;...", "Cluster: the address of each process, in the same order on all hosts.")
    ] = None,
    process_id: Annotated[
        int | None,
        option("N", "Cluster: this host's index in --addresses. Default: the digits that end its host name.", min=0),
    ] = None,
) -> None:
    """Run flows until SIGTERM or SIGINT.

    Each exchange has its own Bytewax processes: `k2flow run binance` starts 3 (flows/binance.py), `k2flow run kraken`
    starts 1 (flows/kraken.py). --processes or K2FLOW_<EXCHANGE>_PROCESSES overrides this.

    `candles` is the flow from Gold to the one-minute candles, always one process.

    After a crash all processes of a flow restart together, with back-off. A failure of one flow never stops another.
    On SIGTERM or SIGINT the flows drain, commit and exit.

    With --addresses this host runs one process of a cluster.
    """
    from k2flow.cli.run import run_flows

    run_flows(flows, processes, trigger, until_caught_up, addresses, process_id)


@app.command()
def status(
    flows: Flows = None,
    watch: Annotated[bool, flag("--watch", "Refresh until Ctrl-C.")] = False,
    every: Annotated[float | None, duration("With --watch: the interval. Default: 2s.")] = None,
    as_json: Annotated[bool, flag("--json", "Print one JSON object. With --watch: one line per refresh.")] = False,
) -> None:
    """Show lag, throughput, dead letters and table health.

    The figures come from Kafka and the tables alone, so no flow needs to run.

    Exit code: 0 if the status is shown, whatever it is; 1 if the tables cannot be read.
    """
    from k2flow.cli.status import show_status

    show_status(flows, watch, every, as_json)


@app.command()
def query(
    sql: Annotated[str, argument("SQL", "SQL for DuckDB. Each view has the name of its table.")],
    format: Annotated[Format, typer.Option("--format", "-f", help="Format of the rows on standard output.")] = "table",
    as_of: Annotated[
        str | None, option("TIME|SNAPSHOT", "Read the tables as of a time (2026-01-31T12:00, in UTC) or a snapshot id.")
    ] = None,
) -> None:
    """Query the tables with DuckDB, each as one consistent snapshot."""
    from k2flow.cli.query import run_query

    run_query(sql, format, as_of)


@app.command()
def audit(
    exchange: Annotated[str | None, argument("EXCHANGE", "Exchange. Default: all that have tables.")] = None,
    as_json: AsJson = False,
    since: Since = None,
    every: AuditEvery = None,
    full: FullAudit = False,
    sample: Sample = 0.01,
    seed: Seed = None,
) -> None:
    """Check that no message was lost or duplicated.

    Each Kafka offset must be in exactly one Bronze row, each Bronze row in exactly one of Silver and the dead letters,
    and each deduplication key of Silver in Gold once. It reads what is new since the last audit, or everything.
    Exit code: 0 if all invariants hold, 1 if one is broken, 2 if the audit is incomplete.
    """
    from k2flow.cli.audit import run_audit

    run_audit(exchange, as_json, since, every, full, sample, seed)


@app.command()
def gaps(
    exchange: Annotated[str, argument("EXCHANGE", "Exchange that declares dense trade ids.")],
    symbol: Annotated[list[str] | None, option("SYMBOL", "Only this symbol. Repeatable. Default: all.")] = None,
    first: Annotated[datetime | None, moment("--from", "Only trades from this time on. Default zone: UTC.")] = None,
    last: Annotated[datetime | None, moment("--to", "Only trades before this time. Default zone: UTC.")] = None,
    as_json: AsJson = False,
) -> None:
    """Find holes in the trade ids of each symbol in Gold.

    The ids of an exchange with dense trade ids are consecutive, so a missing one is a trade that Gold does not have.
    docs/operations.md says what a hole can mean.

    Exit code: 0 without holes, 1 with holes, 2 if the ids could not be checked.
    """
    from k2flow.cli.gaps import show_gaps

    show_gaps(exchange, symbol or [], first, last, as_json)


@app.command()
def report(
    html: Annotated[Path, option("FILE", "HTML file to write.", "--html")],
    exchanges: Exchanges = None,
    symbol: Annotated[
        list[str] | None, option("SYMBOL", "Symbol to draw candles of. Repeatable. Default: the most traded.")
    ] = None,
    no_audit: Annotated[bool, flag("--no-audit", "Skip the audit, the slowest part.")] = False,
    since: Annotated[float, duration("Read and show only this much time up to now. Default: 24h.")] = 24 * HOUR_SECONDS,
) -> None:
    """Write an HTML report of the flows and tables.

    It shows lag, throughput, freshness, dead letters, candles, files and the audit. Where a broker is down or a table
    is missing, the page says so.

    Exit code: 0 if the page is written, 1 if it is and the audit found a broken invariant, 2 if the audit is
    incomplete or no page is written.
    """
    from k2flow.cli.report import write_report

    write_report(html, exchanges, symbol, no_audit, since)


@app.command()
def maintain(
    tables: Annotated[list[str] | None, argument("TABLE", "Tables. Default: all.")] = None,
    every: Annotated[float | None, duration("Repeat, for example every 5m or 1h.")] = None,
    dry_run: Annotated[bool, flag("--dry-run", "Only show what would be done now.")] = False,
    orphan_older_than: Annotated[
        float,
        duration("Delete orphan files older than this. Younger ones may belong to a commit in progress. Default: 1h."),
    ] = HOUR_SECONDS,
    reader_grace: Annotated[
        float, duration("Keep replaced files this long, for queries that still read them. Default: 1h.")
    ] = HOUR_SECONDS,
) -> None:
    """Apply retention, compact small files and delete unused ones.

    One run removes expired rows, merges small files, rewrites manifests, expires snapshots and deletes orphan files.
    It runs beside the flows, which never wait for it.
    """
    from k2flow.cli.tables import run_maintenance

    run_maintenance(tables or [], every, dry_run, orphan_older_than, reader_grace)


@app.command()
def reprocess(
    exchange: StoppedExchange,
    first: Annotated[datetime | None, day("--from", "First day (UTC) of ingestion into Bronze.")] = None,
    last: Annotated[datetime | None, day("--to", "Last day. Default: today.")] = None,
    new_key: Annotated[
        bool, flag("--new-key", "Deduplicate Gold again, by the deduplication key that the exchange declares.")
    ] = False,
    dry_run: Annotated[bool, flag("--dry-run", "Only show which rows would be replaced. The flow may run.")] = False,
    as_json: AsJson = False,
) -> None:
    """Reprocess messages from Bronze with today's schemas and rules.

    Their rows in Silver, the dead letters and Gold are replaced exactly once, whatever crashes in between. With
    --new-key, all rows of the exchange in Gold are deduplicated again.
    """
    from k2flow.cli.reprocess import change_key, reprocess_days

    if new_key == (first is not None) or (new_key and last is not None):
        raise typer.BadParameter("give either --from, and --to if you like, or --new-key")
    if first is None:
        change_key(exchange, dry_run, as_json)
    else:
        reprocess_days(exchange, first.date(), last.date() if last else None, dry_run, as_json)


@app.command()
def produce(
    exchange: Annotated[
        str | None, argument("EXCHANGE", "Exchange whose topic gets the trades. Omit with --replay.")
    ] = None,
    count: Annotated[int, option("N", "Number of messages of each handler, with bad ones and duplicates.")] = 100_000,
    rate: Annotated[float, option("N", "Messages per second. 0: as fast as possible.")] = 0.0,
    over: Annotated[
        float | None,
        duration("Spread the trades over the last 1h, for example, to get candles. Default: they happen now."),
    ] = None,
    bad: Annotated[float, option("SHARE", "Share of bad records, from 0 to 1. All kinds in turn.")] = 0.0,
    duplicates: Annotated[
        float, option("SHARE", "Share of duplicates, from 0 to 1: exact copies, and copies with another timestamp.")
    ] = 0.0,
    loss: Annotated[float, option("SHARE", "Share of messages that are not sent, from 0 to 1.")] = 0.0,
    late: Annotated[
        float, option("SHARE", "Share of trades that come minutes, hours or days late, from 0 to 1.")
    ] = 0.001,
    handlers: Annotated[
        int, option("N", "Feed handlers. All send the same trades, with message ids, delays and losses of their own.")
    ] = 1,
    seed: Annotated[int, option("N", "The same seed and start time give the same messages.")] = 0,
    schema_id: Annotated[int, option("N", "Schema id in the header of each message.")] = 1,
    manifest: Annotated[Path | None, option("FILE", "Write the counts of sent messages to this JSON file.")] = None,
    replay_csv: Annotated[
        Path | None, option("FILE", "Send recorded trades from this CSV file, shifted in time to end now.", "--replay")
    ] = None,
) -> None:
    """Send realistic trades to Kafka, and check their delivery."""
    from k2flow.cli.sandbox import produce_trades, replay_trades
    from k2flow.sandbox.producer import ProduceOptions

    if replay_csv is None:
        options = ProduceOptions(
            count=count,
            rate=rate,
            bad=bad,
            duplicates=duplicates,
            loss=loss,
            late=late,
            handlers=handlers,
            seed=seed,
            over_seconds=over,
            schema_id=schema_id,
        )
        produce_trades(exchange, options, manifest)
    else:
        replay_trades(replay_csv, exchange, schema_id, manifest)


@app.command()
def config(
    as_markdown: Annotated[
        bool, flag("--markdown", "Print docs/configuration.md instead, the reference of all settings.")
    ] = False,
) -> None:
    """Show all settings, their values and their sources. Secrets are masked."""
    from k2flow.cli.config import print_reference, show_settings

    if as_markdown:
        print_reference()
    else:
        show_settings()
