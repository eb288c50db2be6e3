"""`k2flow audit`."""

import json
import logging
import sys
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated

import typer
from prometheus_client import CollectorRegistry
from rich.console import Console

from k2flow.audit import Report, audit
from k2flow.audit.metrics import AuditCollector
from k2flow.audit.report import Verdict
from k2flow.cli.progress import progress_bars
from k2flow.cli.repeated import duration, stop_event
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import K2flowError
from k2flow.exchange import Exchange, all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.endpoint import serve
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import ERROR_PREFIX

log = logging.getLogger(__name__)

NOT_CHECKED = "the law could not be checked"
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
    every: Annotated[
        str | None, typer.Option(help="Go on, with an audit so often: 1h, 1d; the log says the verdict.")
    ] = None,
) -> None:
    """Check that nothing was lost or doubled: each Kafka offset once in Bronze, each of its rows in Silver or the dead
    letters, each message id once in Gold. Exit code 0: the law holds; 1: it is broken; 2: it could not be checked.

    With --every it serves the verdict at K2FLOW_METRICS_PORT, for an alert.
    """
    try:
        settings = load_settings(exchange_names())
        set_up_logging(settings.log_level if every else "CRITICAL", settings.log_format)
        logging.getLogger("k2flow.inspection.broker").setLevel("CRITICAL")  # a broker that is down is in the report
        exchanges = [find_exchange(exchange)] if exchange else all_exchanges()
        moment = since if since is None or since.tzinfo else since.replace(tzinfo=UTC)
        if every:
            _repeat(settings, exchanges, moment, duration(every), as_json)
            return
        with progress_bars() as told:
            report = audit(open_catalog(settings), settings, exchanges, moment, told)
    except K2flowError as error:
        if "--debug" in sys.argv:
            raise
        print(f"{ERROR_PREFIX}{NOT_CHECKED}: {error}", file=sys.stderr)
        raise typer.Exit(EXIT_UNCHECKED) from None
    _show(report, as_json)
    raise typer.Exit(report.verdict.exit_code)


def _repeat(
    settings: Settings, exchanges: Sequence[Exchange], since: datetime | None, pause: float, as_json: bool
) -> None:
    """One audit after the other until SIGTERM or SIGINT, which wait for the one that runs."""
    told, stop, registry = AuditCollector(), stop_event(), CollectorRegistry()
    registry.register(told)
    if settings.metrics_port is not None:
        serve(settings.metrics_host, settings.metrics_port, registry, lambda: None, lambda: None)
    while True:
        began = time.monotonic()
        try:
            report = audit(open_catalog(settings), settings, exchanges, since)
        except K2flowError as error:
            log.error("%s: %s", NOT_CHECKED, error)
            told.tell(Verdict.UNKNOWN, [])
        else:
            told.tell(report.verdict, [finding.severity for finding in report.findings])
            level = logging.INFO if report.verdict is Verdict.HOLDS else logging.ERROR
            log.log(level, "the law: %s, %d rows in %.1f s", report.verdict, report.rows, report.seconds)
            if as_json or report.verdict is not Verdict.HOLDS:
                _show(report, as_json)
        if stop.wait(max(0.0, pause - (time.monotonic() - began))):
            return


def _show(report: Report, as_json: bool) -> None:
    if as_json:
        print(json.dumps(report.to_dict(), indent=2), flush=True)
    else:
        report.show(Console(width=None if sys.stdout.isatty() else PIPE_WIDTH))
