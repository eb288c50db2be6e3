"""`k2flow report`."""

import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from k2flow.audit import AuditReport, audit
from k2flow.cli.audit import EXIT_INCOMPLETE, INCOMPLETE
from k2flow.cli.output import progress_bars
from k2flow.cli.process import exit_on_error
from k2flow.config.settings import load_settings
from k2flow.exchange import exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.layers import MIN_TIME_US
from k2flow.observability.logs import set_up_logging
from k2flow.report import Unavailable, attempt, check_writable, gather, render, write


def write_report(
    html: Path, exchanges: Sequence[str] | None, symbols: Sequence[str] | None, no_audit: bool, since_seconds: float
) -> None:
    """Write the page of the last `since_seconds`, and exit with the code of the audit's verdict."""
    with exit_on_error(EXIT_INCOMPLETE, "no report is written: "):
        settings = load_settings(exchange_names())
        set_up_logging("CRITICAL")  # the page has librdkafka's messages about a broker that is down
        found = [find_exchange(name) for name in dict.fromkeys(exchanges or exchange_names())]
        check_writable(html)
        catalog = open_catalog(settings)
        since = datetime.fromtimestamp(max(MIN_TIME_US // 1_000_000, int(time.time() - since_seconds)), UTC)
        since_us = int(since.timestamp()) * 1_000_000
        figures = gather(catalog, settings, found, list(dict.fromkeys(symbols or ())), since_us)
        audit_result: AuditReport | Unavailable | None = None
        if not no_audit:
            with progress_bars() as progress:
                audit_result = attempt(lambda: audit(catalog, settings, found, since, progress))
        write(html, render(figures, audit_result))
    verdict, exit_code = _result(audit_result)
    print(f"{html}: {html.stat().st_size:,} bytes; {verdict}")
    raise SystemExit(exit_code)


def _result(audit_result: AuditReport | Unavailable | None) -> tuple[str, int]:
    if audit_result is None:
        return "audit skipped", 0
    if isinstance(audit_result, Unavailable):
        return f"{INCOMPLETE}{audit_result.text}", EXIT_INCOMPLETE
    return f"audit verdict: {audit_result.verdict}", audit_result.verdict.exit_code
