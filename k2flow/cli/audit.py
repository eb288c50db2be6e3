"""`k2flow audit`."""

import json
import sys
from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.console import Console

from k2flow.audit import audit
from k2flow.catalog import open_catalog
from k2flow.cli.progress import progress_bars
from k2flow.errors import K2flowError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.runtime import set_up_logging
from k2flow.settings import load_settings

EXIT_UNCHECKED = 2
PIPE_WIDTH = 240


def audit_command(
    exchange: Annotated[str | None, typer.Argument(help="Exchange to audit; default: all that have tables.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    since: Annotated[
        datetime | None,
        typer.Option(
            formats=["%Y-%m-%d", "%Y-%m-%dT%H:%M", "%Y-%m-%dT%H:%M:%S", "%Y-%m-%dT%H:%M:%S%z"],
            help="Only what was ingested since then (UTC unless it says otherwise), and what came of it.",
        ),
    ] = None,
) -> None:
    """Check that nothing was lost or doubled: each Kafka offset once in Bronze, each of its rows in Silver or the dead
    letters, each message id once in Gold. Exit code 0: the law holds; 1: it is broken; 2: it could not be checked.
    """
    try:
        settings = load_settings(exchange_names())
        set_up_logging("CRITICAL")  # what librdkafka says of a broker that is down is in the report
        exchanges = [find_exchange(exchange)] if exchange else all_exchanges()
        moment = since if since is None or since.tzinfo else since.replace(tzinfo=UTC)
        with progress_bars() as told:
            report = audit(open_catalog(settings), settings, exchanges, moment, told)
    except K2flowError as error:
        if "--debug" in sys.argv:
            raise
        print(f"k2flow: error: the law could not be checked: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_UNCHECKED) from None
    if as_json:
        print(json.dumps(report.to_dict(), indent=2))
    else:
        report.show(Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
    raise typer.Exit(report.verdict.exit_code)
