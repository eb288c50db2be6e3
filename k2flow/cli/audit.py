"""`k2flow audit`."""

import logging
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial

from prometheus_client import CollectorRegistry

from k2flow.audit import AuditReport, audit
from k2flow.audit.report import AuditCollector, Verdict
from k2flow.cli.output import console, print_json, progress_bars
from k2flow.cli.process import every, exit_on_error, stop_event
from k2flow.compat.pyarrow import keep_freed_memory
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import K2flowError, SettingsError
from k2flow.exchange import all_exchanges, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.endpoint import serve
from k2flow.observability.logs import set_up_logging
from k2flow.observability.systemd import report_to_systemd

log = logging.getLogger(__name__)
INCOMPLETE = "audit incomplete: "
EXIT_INCOMPLETE = 2


def run_audit(
    exchange: str | None,
    as_json: bool,
    since: datetime | None,
    interval: float | None,
    full: bool,
    sample: float,
    seed: int | None,
) -> None:
    """Audit once and exit with the code of the verdict; or every `interval` seconds, until a signal."""
    keep_freed_memory()
    with exit_on_error(EXIT_INCOMPLETE, INCOMPLETE):
        settings = load_settings(exchange_names())
        set_up_logging("CRITICAL" if interval is None else settings.log_level, settings.log_format)
        logging.getLogger("k2flow.inspection.broker").setLevel("CRITICAL")  # the report has a broker that is down
        exchanges = [find_exchange(exchange)] if exchange else all_exchanges()
        since = since if since is None or since.tzinfo else since.replace(tzinfo=UTC)
        if since is not None and full:
            raise SettingsError("--since and --full exclude each other: give one of them")
        read = partial(audit, settings=settings, exchanges=exchanges, since=since, full=full, sample=sample, seed=seed)
        if interval is not None:
            _repeat(lambda: read(open_catalog(settings)), settings, interval, as_json)
            return
        with progress_bars() as progress:
            report = read(open_catalog(settings), progress=progress)
    _show(report, as_json)
    raise SystemExit(report.verdict.exit_code)


def _repeat(run: Callable[[], AuditReport], settings: Settings, interval: float, as_json: bool) -> None:
    """Audit again and again. SIGTERM and SIGINT wait for the audit in progress."""
    metrics, registry = AuditCollector(), CollectorRegistry()
    registry.register(metrics)
    if settings.metrics_port is not None:
        serve(settings.metrics_host, settings.metrics_port, registry, lambda: None, lambda: None)
    stop = stop_event()
    with report_to_systemd(lambda: None, lambda: None, stop):
        for _ in every(interval, stop):
            try:
                report = run()
            except K2flowError as error:
                log.error("%s%s", INCOMPLETE, error)
                metrics.record(Verdict.UNKNOWN, [])
                continue
            metrics.record(report.verdict, [finding.severity for finding in report.findings], report.last_full)
            level = logging.INFO if report.verdict is Verdict.HOLDS else logging.ERROR
            text = "audit verdict: %s, %d rows in %.1f s, %s"
            log.log(level, text, report.verdict, report.rows, report.seconds, report.describe_reading())
            if as_json or report.verdict is not Verdict.HOLDS:
                _show(report, as_json)


def _show(report: AuditReport, as_json: bool) -> None:
    if as_json:
        print_json(report.to_dict(), indent=2)
    else:
        report.show(console())
