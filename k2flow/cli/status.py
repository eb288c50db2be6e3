"""`k2flow status`."""

import os
import signal
import sys
import time
from collections.abc import Callable, Sequence

import typer
from rich.console import Group, RenderableType
from rich.live import Live
from rich.text import Text

from k2flow.cli.output import console, print_json
from k2flow.cli.status_view import ERROR_STYLE, render
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import CatalogError, K2flowError
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.observability.logs import set_up_logging
from k2flow.status.collector import StatusCollector
from k2flow.status.model import VERSION, Status, iso
from k2flow.timeouts import DeadlinePassedError, run_with_timeout

COLLECT_SECONDS = 60
"""Time limit of one collection. PyIceberg's clients wait forever for a frozen server."""
DEFAULT_INTERVAL_SECONDS = 2.0
SHORTEST_INTERVAL_SECONDS = 0.2


def show_status(exchanges: Sequence[str] | None, watch: bool, interval: float | None, as_json: bool) -> None:
    """Print the status once, or with `watch` every `interval` seconds until SIGINT or SIGTERM."""
    settings = load_settings(exchange_names())
    set_up_logging("CRITICAL")  # the status has librdkafka's messages about a broker that is down
    if interval is not None and not watch:
        raise typer.BadParameter("--every is the interval of --watch: add --watch")
    found = [find_exchange(name) for name in dict.fromkeys(exchanges or exchange_names())]
    collector = TimeLimitedCollector(settings, found)
    if watch:
        _watch(collector, max(SHORTEST_INTERVAL_SECONDS, interval or DEFAULT_INTERVAL_SECONDS), as_json)
    elif as_json:
        print_json(collector.collect().to_dict(), indent=2)
    else:
        console().print(render(collector.collect()))


class TimeLimitedCollector:
    """A StatusCollector in a thread of its own: Ctrl-C works at once, and no server blocks it forever."""

    def __init__(self, settings: Settings, exchanges: Sequence[Exchange]) -> None:
        self._settings = settings
        self._exchanges = exchanges
        self._collector: StatusCollector | None = None

    def collect(self) -> Status:
        """Collect the status within COLLECT_SECONDS. After an error the next call opens the catalog again.

        Raises:
            CatalogError: The catalog or its storage does not answer in time.
            K2flowError: Any error of `StatusCollector.collect`.
        """
        previous, self._collector = self._collector, None

        def run() -> tuple[StatusCollector, Status]:
            collector = previous or StatusCollector(open_catalog(self._settings), self._settings, self._exchanges)
            return collector, collector.collect()

        try:
            self._collector, status = run_with_timeout(COLLECT_SECONDS, run)
        except DeadlinePassedError as error:
            raise CatalogError(
                f"the catalog or its storage has not answered for {COLLECT_SECONDS} s: try again when it does"
            ) from error
        return status


def _watch(collector: TimeLimitedCollector, interval: float, as_json: bool) -> None:
    """Show the status again and again, in place if the terminal can, until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install_metadata_cache()
    out = console()
    try:
        if as_json:
            _refresh(collector, interval, lambda status: print_json(status.to_dict()), _print_json_error)
        elif not out.is_terminal or out.is_dumb_terminal:
            _refresh(collector, interval, lambda status: out.print(render(status)), out.print)
        else:
            with Live(console=out, auto_refresh=False) as live:
                screen = _Screen(live)
                _refresh(collector, interval, screen.show, screen.show_error)
    except KeyboardInterrupt:
        # The collector's thread may wait for a server, and Python would wait for it.
        sys.stdout.flush()
        os._exit(0)


def _refresh(
    collector: TimeLimitedCollector,
    interval: float,
    show: Callable[[Status], object],
    show_error: Callable[[str], object],
) -> None:
    """Show each status, or the error of its collection. Raises the error if there has been no status yet."""
    shown = False
    while True:
        began = time.monotonic()
        try:
            show(collector.collect())
            shown = True
        except K2flowError as error:
            if not shown:
                raise
            show_error(str(error))
        time.sleep(max(0.0, interval - (time.monotonic() - began)))


class _Screen:
    """The last status on a terminal, with the error of the last refresh below it."""

    def __init__(self, live: Live) -> None:
        self._live = live
        self._last: RenderableType = ""

    def show(self, status: Status) -> None:
        self._last = render(status)
        self._live.update(self._last, refresh=True)

    def show_error(self, text: str) -> None:
        self._live.update(Group(self._last, Text(text, ERROR_STYLE)), refresh=True)


def _print_json_error(text: str) -> None:
    print_json({"version": VERSION, "at": iso(time.time_ns() // 1_000_000), "error": text})
