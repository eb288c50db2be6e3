"""`k2flow status`."""

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

import typer
from rich.console import Console, Group, RenderableType
from rich.filesize import decimal
from rich.live import Live
from rich.table import Table as RichTable
from rich.text import Text

from k2flow.cli.repeated import duration
from k2flow.compat.table_metadata import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import CatalogError, K2flowError
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.maintain.run import Action
from k2flow.observability.logs import set_up_logging
from k2flow.status import report
from k2flow.status.collector import StatusCollector
from k2flow.status.report import Level, State, Status, iso, moment
from k2flow.timeouts import DeadlinePassedError, within

LOOK_SECONDS = 60
"""How long one look may take. PyIceberg's clients wait for ever for a server that is frozen."""
SHORTEST_PAUSE = 0.2
PIPE_WIDTH = 200
TOP_REASONS = 5
STYLES = {Level.OK: "", Level.LATE: "yellow", Level.STALE: "bold red", Level.UNKNOWN: "dim"}
STATES = {
    State.NEVER: "no flow has begun yet",
    State.RUNS: "runs: {}",
    State.PARTLY: "runs only in part, of {}",
    State.STOPPED: "stopped: was {}",
    State.ELSEWHERE: "began as {}; whether it runs cannot be told from this machine",
}


def status_command(
    exchanges: Annotated[
        list[str] | None, typer.Argument(metavar="[EXCHANGE]...", help="All if none is named.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Look again and again, until Ctrl-C.")] = False,
    every: Annotated[str | None, typer.Option(help="With --watch: how often, as in 5s; default 2s.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object; with --watch one a line, for each look.")
    ] = False,
) -> None:
    """How the flows do, from Kafka and the tables alone: how far each layer is behind, how fast it goes, dead letters,
    files, and what maintenance has to do. Exit code 0 whatever there is to see, 1 if the tables could not be looked at.
    """
    settings = load_settings(exchange_names())
    set_up_logging("CRITICAL")  # what librdkafka says of a broker that is down is in the status
    if every and not watch:
        raise typer.BadParameter("--every is how often --watch looks: add --watch")
    pause = max(SHORTEST_PAUSE, duration(every or "2s"))
    looker = Looker(settings, [find_exchange(name) for name in dict.fromkeys(exchanges or exchange_names())])
    if watch:
        _watch(looker, pause, as_json)
    elif as_json:
        print(json.dumps(looker.look().to_dict(), indent=2))
    else:
        _console().print(shown(looker.look()))


class Looker:
    """Looks in a thread of its own, so that Ctrl-C is heeded at once, and no server holds it up for ever."""

    def __init__(self, settings: Settings, exchanges: Sequence[Exchange]) -> None:
        self._settings = settings
        self._exchanges = exchanges
        self._observer: StatusCollector | None = None

    def look(self) -> Status:
        """Raises CatalogError, and what else `StatusCollector.look` raises; the catalog is opened anew after that."""
        before, self._observer = self._observer, None

        def run() -> tuple[StatusCollector, Status]:
            observer = before or StatusCollector(open_catalog(self._settings), self._settings, self._exchanges)
            return observer, observer.look()

        try:
            self._observer, found = within(LOOK_SECONDS, run)
        except DeadlinePassedError as error:
            raise CatalogError(
                f"the catalog or its storage has not answered for {LOOK_SECONDS} s: try again when it does"
            ) from error
        return found


def _watch(looker: Looker, pause: float, as_json: bool) -> None:
    """Shows one look after the other, in place where the terminal can, until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install_metadata_cache()
    try:
        if as_json:
            _keep_looking(looker, pause, lambda found: print(json.dumps(found.to_dict()), flush=True), _say_as_json)
            return
        console = _console()
        if not console.is_terminal or console.is_dumb_terminal:
            _keep_looking(looker, pause, lambda found: console.print(shown(found)), console.print)
            return
        with Live(console=console, auto_refresh=False) as live:
            last: list[RenderableType] = []

            def show(found: Status) -> None:
                last[:] = [shown(found)]
                live.update(last[0], refresh=True)

            _keep_looking(
                looker,
                pause,
                show,
                lambda text: live.update(Group(*last, Text(text, STYLES[Level.STALE])), refresh=True),
            )
    except KeyboardInterrupt:
        # A look may be under way, in a thread that waits for a server and cannot be told to end.
        sys.stdout.flush()
        os._exit(0)


def _keep_looking(looker: Looker, pause: float, show: Callable[[Status], Any], say: Callable[[str], Any]) -> None:
    """Shows each look; what goes wrong with one is said, unless it is the first."""
    seen = False
    while True:
        began = time.monotonic()
        try:
            show(looker.look())
            seen = True
        except K2flowError as error:
            if not seen:
                raise
            say(str(error))
        time.sleep(max(0.0, pause - (time.monotonic() - began)))


def _say_as_json(text: str) -> None:
    print(json.dumps({"version": report.VERSION, "at": iso(time.time_ns() // 1_000_000), "error": text}), flush=True)


def shown(found: Status) -> RenderableType:
    """A status for people."""
    parts: list[RenderableType] = []
    for exchange in found.exchanges:
        parts += [*_exchange(exchange, found.at), ""]
    parts.append(_tables(found))
    parts.append(Text(f"as of {moment(found.at)} UTC, looked at in {found.took_seconds:.1f} s", "dim"))
    return Group(*parts)


def _exchange(exchange: report.Exchange, now: int) -> list[RenderableType]:
    flow = exchange.flow
    state = STATES[flow.state].format(" and ".join(map(str, flow.writers)))
    epoch = f", epoch {flow.epoch}" if flow.epoch else ""
    heading = Text.assemble((exchange.name, "bold"), f": {state}{epoch}; topic {exchange.topic}")
    parts: list[RenderableType] = [heading]
    if any(exchange.layers.values()):
        parts.append(_layers(exchange, now))
    if exchange.dead_letters:
        parts.append(_letters(exchange.dead_letters))
    if exchange.replacing:
        how = "decided, and not in all tables yet" if exchange.replacing.decided else "in preparation, or given up"
        parts.append(Text(f"rows are being replaced ({how}): {exchange.replacing.what}", "yellow"))
    troubles = [exchange.kafka.trouble, *exchange.troubles]
    parts += [Text(f"trouble: {trouble}", "bold red") for trouble in troubles if trouble]
    return parts


def _layers(exchange: report.Exchange, now: int) -> RichTable:
    table = RichTable("layer")
    for column in ("lag", "behind", "messages", "messages/s", "rows/s", "last commit"):
        table.add_column(column, justify="right")
    for name, layer in exchange.layers.items():
        if layer is None:
            table.add_row(name, Text("no table", "dim"))
            continue
        style = STYLES[layer.level]
        rates = (layer.rate.messages_per_second, layer.rate.rows_per_second) if layer.rate else (None, None)
        table.add_row(
            name,
            Text("unknown" if layer.lag is None else f"{layer.lag:,}", style),
            Text(_behind(layer), style),
            f"{layer.messages:,}",
            *("unknown" if rate is None else f"{rate:,.1f}" for rate in rates),
            _ago(layer.committed_at, now),
        )
    return table


def _behind(layer: report.Layer) -> str:
    if layer.seconds is None:
        return "unknown"
    return _span(layer.seconds) + ("" if layer.level is Level.OK else f", {layer.level}")


def _letters(letters: report.DeadLetters) -> Text:
    text = f"dead letters: {_share(letters.share)} of all, {_share(letters.hour_share)} in the last hour"
    if letters.reasons:
        most = ", ".join(f"{reason} {count:,}" for reason, count in letters.reasons[:TOP_REASONS])
        text += f"; of the last day's newest {letters.looked_at:,}: {most}"
    return Text(text)


def _tables(found: Status) -> RichTable:
    table = RichTable("table")
    for column in ("rows", "files", "small", "bytes", "last commit"):
        table.add_column(column, justify="right")
    table.add_column("maintenance")
    for name, each in found.tables.items():
        if each is None:
            table.add_row(name, Text("no table", "dim"))
            continue
        totals = each.totals
        numbers = (f"{totals.rows:,}", f"{totals.files:,}", f"{each.small_files:,}", decimal(totals.bytes))
        table.add_row(name, *numbers, _ago(totals.committed_at, found.at), _maintenance(each, found.at))
    return table


def _maintenance(table: report.Table, now: int) -> str:
    parts = [f"due: {', '.join(map(_due, table.due)) or 'nothing'}"]
    if table.maintained:
        done = (f"{each.what} {_span((now - each.at) / 1000)} ago" for each in table.maintained)
        parts.append(f"done: {', '.join(done)}")
    if table.leader:
        parts.append(f"led by {table.leader}")
    return "; ".join(parts)


def _due(action: Action) -> str:
    come = f" into {action.come:,}" if action.come else ""
    return f"{action.what} of {action.gone:,}{come}"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _ago(at: int | None, now: int) -> str:
    return "never" if at is None else f"{moment(at)}, {_span((now - at) / 1000)} ago"


def _span(seconds: float) -> str:
    """A time of about so many seconds, in the unit in which people would say it."""
    if seconds < 120:
        return f"{seconds:.1f} s" if 0 < seconds < 10 else f"{max(0.0, seconds):.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86_400:.1f} d"


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)
