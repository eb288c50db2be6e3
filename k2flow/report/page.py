"""Renders figures and an audit's result into the page, and writes the file.

The template escapes text from messages, and cleans it of characters that no document may contain. The page loads and
runs nothing; its content security policy makes the browser enforce that.
"""

import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from k2flow.audit import AuditReport, Finding, Severity
from k2flow.audit.report import Verdict
from k2flow.errors import ReportError
from k2flow.layers import LAYERS
from k2flow.report import charts, formats
from k2flow.report.charts import Bar, Line
from k2flow.report.figures import DeadLetterReason, Figures, Freshness, Unavailable, available
from k2flow.status.model import Level

Value = TypeVar("Value")
MAX_BARS = 20  # reasons that have a bar; the table has all of them
MAX_SYMBOLS = 50  # rows of a table of symbols with holes


def render(figures: Figures, audit_result: AuditReport | Unavailable | None) -> str:
    """Render the whole page; `audit_result` is None if the audit was skipped."""
    status = available(figures.status)
    return (
        _environment()
        .get_template("report.html")
        .render(
            figures=figures,
            audit=audit_result,
            findings=_findings(audit_result),
            letters=_reason_rows(figures),
            layers=[layer.name for layer in LAYERS],
            colours={each.name: charts.colour(i) for i, each in enumerate(figures.exchanges)},
            status=status.exchanges if status else {},
            candles=status.candles if status else None,
            share=_share,
            shown_symbols=MAX_SYMBOLS,
            summary=_summary(figures, audit_result),
            charts=_charts(figures),
        )
    )


def check_writable(path: Path) -> None:
    """Raise ReportError if `write` would fail, before the report is computed."""
    if path.is_dir():
        raise ReportError(f"{path} is a folder: name a file")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: Path, text: str) -> None:
    """Replace the file's content by `text` atomically. Raises ReportError."""
    target = path.resolve()  # keep a symbolic link
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # after success it has been moved
            beside.unlink()


def _unwritable(path: Path, error: OSError) -> ReportError:
    return ReportError(f"{path} cannot be written: {error.strerror or error}; name another file")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("k2flow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: formats.clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for function in (formats.count, formats.duration, formats.moment, formats.step, formats.amount, formats.size):
        environment.filters[function.__name__] = function
    environment.tests["unavailable"] = lambda value: isinstance(value, Unavailable)
    return environment


def _share(rows: Mapping[str, int | None]) -> str:
    """Return the dead letters' share of the messages.

    Silver's rows of a time are fewer if old trades were caught up with, and Bronze's if the time is longer than its
    retention. So the larger number counts.
    """
    letters, trades = rows.get("dlq"), rows.get("silver")
    if letters is None or trades is None:
        return "unknown"
    messages = max(rows.get("bronze") or 0, letters + trades)
    return f"{letters / messages:.2%}" if messages else "none"


@dataclass(frozen=True)
class Fact:
    """One fact of the summary; `level` is good, warn, bad or empty."""

    name: str
    value: str
    level: str = ""


def _summary(figures: Figures, audit_result: AuditReport | Unavailable | None) -> list[Fact]:
    rows = (available(figures.rows) or {}).values()
    names = [layer.name for layer in LAYERS]
    sums = {name: sum(known) if (known := _present(each[name] for each in rows)) else None for name in names}
    return [
        Fact("messages", formats.count(sums["bronze"])),
        Fact("trades in Gold", formats.count(sums["gold"])),
        Fact("dead letters", _share(sums)),
        _largest_lag(figures),
        _verdict(audit_result),
    ]


def _present(values: Iterable[Value | None]) -> list[Value]:
    return [value for value in values if value is not None]


def _largest_lag(figures: Figures) -> Fact:
    status = available(figures.status)
    layers = _present(layer for each in status.exchanges.values() for layer in each.layers.values()) if status else []
    seconds = _present(layer.lag_seconds for layer in layers)
    if not layers or len(seconds) < len(layers):
        return Fact("largest lag", "unknown")
    levels = {Level.OK: "good", Level.LATE: "warn", Level.STALE: "bad"}
    furthest = max(layers, key=lambda layer: layer.lag_seconds or 0.0)
    return Fact("largest lag", formats.duration(max(seconds)), levels.get(furthest.level, ""))


def _verdict(audit_result: AuditReport | Unavailable | None) -> Fact:
    if audit_result is None:
        return Fact("audit", "skipped")
    if isinstance(audit_result, Unavailable):
        return Fact("audit", "incomplete", "bad")
    levels = {Verdict.HOLDS: "good", Verdict.UNKNOWN: "warn", Verdict.BROKEN: "bad"}
    return Fact("audit", str(audit_result.verdict), levels[audit_result.verdict])


@dataclass(frozen=True)
class ReasonRows:
    """The dead letters of one reason by exchange, and the newest one of all exchanges."""

    reason: str
    rows: Mapping[str, int]
    newest: DeadLetterReason


def _reason_rows(figures: Figures) -> list[ReasonRows]:
    reasons: dict[str, list[DeadLetterReason]] = {}
    for each in available(figures.reasons) or []:
        reasons.setdefault(each.reason, []).append(each)
    found = [
        ReasonRows(reason, {each.exchange: each.rows for each in some}, max(some, key=lambda each: each.newest_us))
        for reason, some in reasons.items()
    ]
    return sorted(found, key=lambda each: (-sum(each.rows.values()), each.reason))


def _findings(audit_result: AuditReport | Unavailable | None) -> list[Finding]:
    if not isinstance(audit_result, AuditReport):
        return []
    return sorted(audit_result.findings, key=lambda finding: list(Severity).index(finding.severity))


def _charts(figures: Figures) -> dict[str, Any]:
    """Return the charts that have data, by section; those of the markets as a list."""
    found: dict[str, Any] = {}
    exchanges = [each.name for each in figures.exchanges]
    for name, title, figure in (
        ("ingested", "Messages ingested", figures.ingested),
        ("traded", "Trades by their own time", figures.traded),
    ):
        if counts := available(figure):
            found[name] = charts.columns(f"chart-{name}", title, counts.axis, counts.rows)
    if freshness := available(figures.freshness):
        found["freshness"] = _freshness(freshness, exchanges)
    if letters := _reason_rows(figures):
        rows = [Bar(row.reason, {exchanges.index(name): n for name, n in row.rows.items()}) for row in letters]
        found["reasons"] = charts.bars("chart-reasons", "Dead letters by reason", rows[:MAX_BARS], exchanges)
    found["markets"] = [
        charts.candles(f"chart-market-{i}", f"{market.symbol} at {market.exchange}", market.axis, market.candles)
        for i, market in enumerate(available(figures.markets) or [])
    ]
    found["files"] = {
        name: charts.histogram(f"chart-{name}", f"File sizes of {name}", files.histogram, files.target_bytes)
        for name, figure in figures.files.items()
        if (files := available(figure)) and files.files
    }
    return found


def _freshness(freshness: Freshness, exchanges: Sequence[str]) -> Markup:
    """Draw the delay until Gold's commit of each exchange: the median, and dashed the p99."""
    series = []
    for number, exchange in enumerate(exchanges):
        steps = freshness.steps.get((exchange, "gold"), {})
        medians = {step: delays.median / 1000 for step, delays in steps.items()}
        p99s = {step: delays.p99 / 1000 for step, delays in steps.items()}
        series.append(Line(f"{exchange} median", number, medians))
        series.append(Line(f"{exchange} p99", number, p99s, dashed=True))
    return charts.lines("chart-freshness", "From Kafka's time to Gold's commit", freshness.axis, series)
