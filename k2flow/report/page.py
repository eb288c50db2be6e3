"""The page: figures and an audit's result in the template, and the file that it becomes.

Whatever comes from messages is escaped by the template, and cleaned of what no document may hold; the page loads and
runs nothing, which its content security policy has the browser enforce.
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

from k2flow.audit import Finding, Report, Severity
from k2flow.audit.report import Verdict
from k2flow.errors import ReportError
from k2flow.layers import LAYERS
from k2flow.report import charts, words
from k2flow.report.charts import Bar, Line
from k2flow.report.figures import Figures, Freshness, Market, Problem, Reason
from k2flow.status.model import Level

Value = TypeVar("Value")

TEMPLATE = "report.html"
MOST_BARS = 20
"""So many reasons have a bar; the table has them all."""


def render(figures: Figures, audited: Report | Problem | None) -> str:
    """The whole page; `audited` is None where the audit was left out."""
    status = {} if isinstance(figures.status, Problem) else {each.name: each for each in figures.status.exchanges}
    template = _environment().get_template(TEMPLATE)
    return template.render(
        figures=figures,
        audited=audited,
        findings=_findings(audited),
        letters=_letters(figures),
        layers=[layer.name for layer in LAYERS],
        colours={each.name: charts.colour(i) for i, each in enumerate(figures.exchanges)},
        status=status,
        share=_share,
        summary=_summary(figures, audited),
        charts=_charts(figures),
    )


def check_writable(path: Path) -> None:
    """Raises ReportError where `write` could not write, so that nobody waits for a report in vain."""
    if path.is_dir():
        raise ReportError(f"{path} is a folder: name a file")
    try:
        with tempfile.TemporaryFile(dir=path.resolve().parent):
            pass
    except OSError as error:
        raise _unwritable(path, error) from error


def write(path: Path, text: str) -> None:
    """Puts `text` in place of what the file has, all of it or nothing. Raises ReportError."""
    target = path.resolve()  # a link stays one
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.write_text(text, "utf-8")
        beside.replace(target)
    except OSError as error:
        raise _unwritable(path, error) from error
    finally:
        with suppress(OSError):  # it is gone if all went well
            beside.unlink()


def _unwritable(path: Path, error: OSError) -> ReportError:
    return ReportError(f"{path} cannot be written: {error.strerror or error}; name another file")


def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("k2flow.report"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: words.clean(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for word in (words.count, words.span, words.moment, words.step, words.amount, words.binary):
        environment.filters[word.__name__] = word
    environment.tests["trouble"] = lambda value: isinstance(value, Problem)
    return environment


def _share(rows: Mapping[str, int | None]) -> str:
    """Of rows by layer the share of the messages that are dead letters."""
    letters, trades = rows.get("dlq"), rows.get("silver")
    if letters is None or trades is None:
        return "unknown"
    return f"{letters / (letters + trades):.2%}" if letters + trades else "none"


@dataclass(frozen=True)
class Fact:
    """One of the few things to see first; `level` is good, warn or bad, or nothing of these."""

    name: str
    value: str
    level: str = ""


def _summary(figures: Figures, audited: Report | Problem | None) -> list[Fact]:
    """What all exchanges come to."""
    rows = [] if isinstance(figures.rows, Problem) else list(figures.rows.values())
    names = [layer.name for layer in LAYERS]
    sums = {name: sum(known) if (known := _known(each[name] for each in rows)) else None for name in names}
    return [
        Fact("messages", words.count(sums["bronze"])),
        Fact("trades in Gold", words.count(sums["gold"])),
        Fact("dead letters", _share(sums)),
        _furthest(figures),
        _verdict(audited),
    ]


def _known(values: Iterable[Value | None]) -> list[Value]:
    return [value for value in values if value is not None]


def _furthest(figures: Figures) -> Fact:
    """How far the layer that is furthest behind is, if of all layers it is known."""
    if isinstance(figures.status, Problem):
        return Fact("furthest behind", "unknown")
    layers = _known(layer for each in figures.status.exchanges for layer in each.layers.values())
    seconds = _known(layer.seconds for layer in layers)
    if not layers or len(seconds) < len(layers):
        return Fact("furthest behind", "unknown")
    levels = {Level.OK: "good", Level.LATE: "warn", Level.STALE: "bad"}
    furthest = max(layers, key=lambda layer: layer.seconds or 0.0)
    return Fact("furthest behind", words.span(max(seconds)), levels.get(furthest.level, ""))


def _verdict(audited: Report | Problem | None) -> Fact:
    if audited is None:
        return Fact("audit", "left out")
    if isinstance(audited, Problem):
        return Fact("audit", "not possible", "bad")
    levels = {Verdict.HOLDS: "good", Verdict.UNKNOWN: "warn", Verdict.BROKEN: "bad"}
    return Fact("audit", str(audited.verdict), levels[audited.verdict])


@dataclass(frozen=True)
class Letters:
    """The dead letters of one reason, by exchange, and what is told of the newest one of all."""

    reason: str
    rows: Mapping[str, int]
    newest: Reason


def _letters(figures: Figures) -> list[Letters]:
    """By reason, most first."""
    reasons: dict[str, list[Reason]] = {}
    for each in [] if isinstance(figures.reasons, Problem) else figures.reasons:
        reasons.setdefault(each.reason, []).append(each)
    found = [
        Letters(reason, {each.exchange: each.rows for each in some}, max(some, key=lambda each: each.newest_us))
        for reason, some in reasons.items()
    ]
    return sorted(found, key=lambda each: (-sum(each.rows.values()), each.reason))


def _findings(audited: Report | Problem | None) -> list[Finding]:
    """What the audit found, the worst first."""
    if not isinstance(audited, Report):
        return []
    return sorted(audited.findings, key=lambda finding: list(Severity).index(finding.severity))


def _charts(figures: Figures) -> dict[str, Any]:
    """The charts that there is something to draw in, by the name of the section; a list of those of the markets."""
    found: dict[str, Any] = {}
    for name, title, counts in (
        ("taken_in", "Messages taken in", figures.taken_in),
        ("traded", "Trades by their own time", figures.traded),
    ):
        if counts and not isinstance(counts, Problem):
            found[name] = charts.columns(f"chart-{name}", title, counts.axis, counts.rows)
    if figures.freshness and not isinstance(figures.freshness, Problem):
        found["freshness"] = _freshness(figures.freshness, [each.name for each in figures.exchanges])
    if letters := _letters(figures):
        found["reasons"] = _reasons(letters, [each.name for each in figures.exchanges])
    if not isinstance(figures.markets, Problem):
        found["markets"] = [_market(i, market) for i, market in enumerate(figures.markets)]
    found["files"] = {
        name: charts.histogram(f"chart-{name}", f"File sizes of {name}", files.histogram, files.target_bytes)
        for name, files in figures.files.items()
        if files and not isinstance(files, Problem) and files.files
    }
    return found


def _freshness(freshness: Freshness, exchanges: Sequence[str]) -> Markup:
    """Until Gold's commit, of each exchange: the median, and dashed what 99 of 100 messages stay below."""
    series = []
    for number, exchange in enumerate(exchanges):
        steps = freshness.steps.get((exchange, "gold"), {})
        medians = {step: delays.median / 1000 for step, delays in steps.items()}
        highest = {step: delays.p99 / 1000 for step, delays in steps.items()}
        series += [
            Line(f"{exchange} median", number, medians),
            Line(f"{exchange} 99 of 100", number, highest, dashed=True),
        ]
    return charts.lines("chart-freshness", "From Kafka's time to Gold's commit", freshness.axis, series)


def _reasons(letters: Sequence[Letters], exchanges: Sequence[str]) -> Markup:
    rows = [
        Bar(each.reason, {number: each.rows[name] for number, name in enumerate(exchanges) if name in each.rows})
        for each in letters[:MOST_BARS]
    ]
    return charts.bars("chart-reasons", "Dead letters by reason", rows, exchanges)


def _market(number: int, market: Market) -> Markup:
    return charts.candles(
        f"chart-market-{number}", f"{market.symbol} at {market.exchange}", market.axis, market.candles
    )
