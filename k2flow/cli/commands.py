"""The commands of `k2flow`: their arguments, options and help. Groups of commands are in `groups`.

This module imports no slow library. Each command imports the module that does its work when it runs.
"""

import os
import sys
from datetime import datetime
from pathlib import Path
from typing import Annotated

import typer

from k2flow.cli.exits import DEBUG
from k2flow.cli.groups import dlq_app, kafka_app, tables_app
from k2flow.cli.options import (
    AsJson,
    Exchanges,
    Format,
    StoppedExchange,
    command_group,
    day_option,
    duration_option,
)
from k2flow.config.pyiceberg_file import check_pyiceberg_file

TIME = ["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"]
HOUR_SECONDS = 3600.0

app = command_group("k2flow", "Write crypto trades from Kafka into Apache Iceberg tables, exactly once.")


@app.callback()
def _options(debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.")] = False) -> None:
    """Set the options of all commands, for the processes that a command starts too."""
    if debug:
        os.environ[DEBUG] = "1"
    if "--help" not in sys.argv:  # the check may import PyIceberg, and every command does so afterwards
        check_pyiceberg_file()


@app.command()
def run(
    exchanges: Annotated[list[str], typer.Argument(metavar="EXCHANGE", help="Exchanges: names of files in flows/.")],
    processes: Annotated[
        int | None,
        typer.Option(min=1, max=64, metavar="N", help="Processes per exchange. Default: the exchange's setting."),
    ] = None,
    trigger: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Seconds between commits. Default: the exchange's setting.")
    ] = None,
    until_caught_up: Annotated[
        bool, typer.Option("--until-caught-up", help="Stop at the offsets that end the topic now.")
    ] = False,
    addresses: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT;...", help="Cluster: the address of each process, in the same order on all hosts."
        ),
    ] = None,
    process_id: Annotated[
        int | None,
        typer.Option(
            min=0,
            metavar="N",
            help="Cluster: this host's index in --addresses. Default: the digits that end its host name.",
        ),
    ] = None,
) -> None:
    """Run the flows of exchanges until SIGTERM or SIGINT.

    Each exchange has its own Bytewax processes: `k2flow run binance` starts 3 (flows/binance.py), `k2flow run kraken`
    starts 1 (flows/kraken.py). --processes or K2FLOW_<EXCHANGE>_PROCESSES overrides this.

    After a crash all processes of the exchange restart together, with back-off. A failure of one exchange never stops
    another. On SIGTERM or SIGINT the flows drain, commit and exit.

    With --addresses this host runs one process of a cluster.
    """
    from k2flow.cli.run import run_flows

    run_flows(exchanges, processes, trigger, until_caught_up, addresses, process_id)


@app.command()
def status(
    exchanges: Exchanges = None,
    watch: Annotated[bool, typer.Option("--watch", help="Refresh until Ctrl-C.")] = False,
    every: Annotated[
        float | None,
        duration_option("With --watch: the interval. Default: 2s."),
    ] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object. With --watch: one line per refresh.")
    ] = False,
) -> None:
    """Show lag, throughput, dead letters and table health.

    The figures come from Kafka and the tables alone, so no flow needs to run.

    Exit code: 0 if the status is shown, whatever it is; 1 if the tables cannot be read.
    """
    from k2flow.cli.status import show_status

    show_status(exchanges, watch, every, as_json)


@app.command()
def query(
    sql: Annotated[str, typer.Argument(metavar="SQL", help="SQL for DuckDB. Each view has the name of its table.")],
    format: Annotated[
        Format, typer.Option("--format", "-f", help="Format of the rows on standard output.")
    ] = Format.TABLE,
    as_of: Annotated[
        str | None,
        typer.Option(
            metavar="TIME|SNAPSHOT", help="Read the tables as of a time (2026-01-31T12:00, in UTC) or a snapshot id."
        ),
    ] = None,
) -> None:
    """Query the tables with DuckDB, each as one consistent snapshot."""
    from k2flow.cli.query import run_query

    run_query(sql, format, as_of)


@app.command()
def audit(
    exchange: Annotated[
        str | None, typer.Argument(metavar="EXCHANGE", help="Exchange. Default: all that have tables.")
    ] = None,
    as_json: AsJson = False,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=TIME,
            metavar="TIME",
            help="Check only messages ingested since this time, and their rows. Default zone: UTC.",
        ),
    ] = None,
    every: Annotated[
        float | None,
        duration_option("Repeat the audit, for example every 1h or 1d. The log has each verdict."),
    ] = None,
) -> None:
    """Check that no message was lost or duplicated.

    Each Kafka offset must be in exactly one Bronze row, each Bronze row in exactly one of Silver and the dead letters,
    and each message id of Silver in Gold exactly once. With --every the verdict is also a metric, served at
    K2FLOW_METRICS_PORT.

    Exit code: 0 if all invariants hold, 1 if one is broken, 2 if the audit is incomplete.
    """
    from k2flow.cli.audit import run_audit

    run_audit(exchange, as_json, since, every)


@app.command()
def report(
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="HTML file to write.")],
    exchanges: Exchanges = None,
    symbol: Annotated[
        list[str] | None,
        typer.Option(metavar="SYMBOL", help="Symbol to draw candles of. Repeatable. Default: the most traded."),
    ] = None,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Skip the audit, the slowest part.")] = False,
) -> None:
    """Write an HTML report of the flows and tables.

    It shows lag, throughput, freshness, dead letters, candles, files and the audit. Where a broker is down or a table
    is missing, the page says so.

    Exit code: 0 if the page is written, 1 if it is and the audit found a broken invariant, 2 if the audit is
    incomplete or no page is written.
    """
    from k2flow.cli.report import write_report

    write_report(html, exchanges, symbol, no_audit)


@app.command()
def maintain(
    tables: Annotated[list[str] | None, typer.Argument(metavar="TABLE", help="Tables. Default: all.")] = None,
    every: Annotated[
        float | None,
        duration_option("Repeat, for example every 5m or 1h."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only show what would be done now.")] = False,
    orphan_older_than: Annotated[
        float,
        duration_option(
            "Delete orphan files older than this. Younger ones may belong to a commit in progress. Default: 1h."
        ),
    ] = HOUR_SECONDS,
    reader_grace: Annotated[
        float,
        duration_option("Keep replaced files this long, for queries that still read them. Default: 1h."),
    ] = HOUR_SECONDS,
) -> None:
    """Apply retention, compact small files and delete unused ones.

    One run removes expired rows, merges small files, rewrites manifests, expires snapshots and deletes orphan files.
    It runs beside the flows, which never wait for it.
    """
    from k2flow.cli.maintain import run_maintenance

    run_maintenance(tables or [], every, dry_run, orphan_older_than, reader_grace)


@app.command()
def reprocess(
    exchange: StoppedExchange,
    first: Annotated[datetime, day_option("--from", "First day (UTC) of ingestion into Bronze.")],
    last: Annotated[datetime | None, day_option("--to", "Last day. Default: today.")] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only show which rows would be replaced. The flow may run.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Reprocess messages from Bronze with today's schemas and rules.

    Their rows in Silver, the dead letters and Gold are replaced exactly once, whatever crashes in between.
    """
    from k2flow.cli.reprocess import reprocess_days

    reprocess_days(exchange, first.date(), last.date() if last else None, dry_run, as_json)


@app.command()
def produce(
    exchange: Annotated[
        str | None, typer.Argument(metavar="EXCHANGE", help="Exchange whose topic gets the trades. Omit with --replay.")
    ] = None,
    count: Annotated[
        int, typer.Option(metavar="N", help="Number of messages, with bad ones and duplicates.")
    ] = 100_000,
    rate: Annotated[float, typer.Option(metavar="N", help="Messages per second. 0: as fast as possible.")] = 0.0,
    over: Annotated[
        float | None,
        duration_option("Spread the trades over the last 1h, for example, to get candles. Default: they happen now."),
    ] = None,
    bad: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of bad records, from 0 to 1. All kinds in turn.")
    ] = 0.0,
    duplicates: Annotated[
        float,
        typer.Option(
            metavar="SHARE", help="Share of duplicates, from 0 to 1: exact copies, and copies with another timestamp."
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="The same seed and start time give the same messages.")] = 0,
    schema_id: Annotated[int, typer.Option(metavar="N", help="Schema id in the header of each message.")] = 1,
    manifest: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write the counts of sent messages to this JSON file.")
    ] = None,
    replay_csv: Annotated[
        Path | None,
        typer.Option(
            "--replay", metavar="FILE", help="Send recorded trades from this CSV file, shifted in time to end now."
        ),
    ] = None,
) -> None:
    """Send realistic trades to Kafka, and check their delivery."""
    from k2flow.cli.produce import produce_trades, replay_trades
    from k2flow.sandbox.producer import ProduceOptions

    if replay_csv is None:
        options = ProduceOptions(
            count=count,
            rate=rate,
            bad=bad,
            duplicates=duplicates,
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
        bool, typer.Option("--markdown", help="Print docs/configuration.md instead, the reference of all settings.")
    ] = False,
) -> None:
    """Show all settings, their values and their sources. Secrets are masked."""
    from k2flow.cli.config import print_reference, show_settings

    if as_markdown:
        print_reference()
    else:
        show_settings()


for group in (tables_app, dlq_app, kafka_app):
    app.add_typer(group)
