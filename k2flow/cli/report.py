"""`k2flow report`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from k2flow.audit import Report, audit
from k2flow.cli.audit import EXIT_UNCHECKED, NOT_CHECKED
from k2flow.cli.progress import progress_bars
from k2flow.config.settings import load_settings
from k2flow.errors import K2flowError
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import ERROR_PREFIX
from k2flow.report import Problem, attempt, check_writable, gather, render, write


def report_command(
    html: Annotated[Path, typer.Option("--html", metavar="FILE", help="The file to write.")],
    exchanges: Annotated[
        list[str] | None, typer.Argument(metavar="[EXCHANGE]...", help="All if none is named.")
    ] = None,
    symbol: Annotated[
        list[str] | None,
        typer.Option(help="A symbol to draw candles of; may be repeated; default: the most traded."),
    ] = None,
    no_audit: Annotated[bool, typer.Option("--no-audit", help="Leave the audit out, which takes the longest.")] = False,
) -> None:
    """Tell how the flows did in one HTML page: rows, lag, throughput, freshness, dead letters, candles, files, audit.

    What cannot be told, of a broker that is down or of a table that is missing, the page says in its place. Exit code
    0: the page is written; 1: it is, and the audit found the law broken; 2: the law could not be checked, or there is
    no page.
    """
    try:
        settings = load_settings(exchange_names())
        set_up_logging("CRITICAL")  # what librdkafka says of a broker that is down is on the page
        found = [find_exchange(name) for name in dict.fromkeys(exchanges or exchange_names())]
        check_writable(html)
        catalog = open_catalog(settings)
        figures = gather(catalog, settings, found, list(dict.fromkeys(symbol or ())))
        audited: Report | Problem | None = None
        if not no_audit:
            with progress_bars() as told:
                audited = attempt(lambda: audit(catalog, settings, found, None, told))
        write(html, render(figures, audited))
    except K2flowError as error:
        if "--debug" in sys.argv:
            raise
        print(f"{ERROR_PREFIX}there is no report: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_UNCHECKED) from None
    print(f"{html}: {html.stat().st_size:,} bytes; {_said(audited)}")
    raise typer.Exit(_exit_code(audited))


def _said(audited: Report | Problem | None) -> str:
    if audited is None:
        return "the audit was left out"
    if isinstance(audited, Problem):
        return f"{NOT_CHECKED}: {audited.text}"
    return f"the audit says: {audited.verdict}"


def _exit_code(audited: Report | Problem | None) -> int:
    if audited is None:
        return 0
    return EXIT_UNCHECKED if isinstance(audited, Problem) else audited.verdict.exit_code
