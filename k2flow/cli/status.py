"""`k2flow status`: the collection of the status, and its tables."""

import os
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import timedelta
from itertools import islice

import typer
from humanize import naturalsize, naturaltime, precisedelta
from rich.console import Group, RenderableType
from rich.live import Live
from rich.table import Column, Table
from rich.text import Text

from k2flow.cli.output import console, new_table, print_json, styled
from k2flow.compat.pyiceberg.metadata_cache import install_metadata_cache
from k2flow.config.settings import Settings, load_settings
from k2flow.errors import CatalogError, K2flowError
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.iceberg.catalog import open_catalog
from k2flow.layers import CANDLES, GOLD_TABLE
from k2flow.observability.logs import set_up_logging
from k2flow.process_exit import EXIT_FAILED
from k2flow.status import model
from k2flow.status.collector import StatusCollector
from k2flow.status.model import FlowState, Level, Status, moment
from k2flow.timeouts import DeadlinePassedError, run_with_timeout

COLLECT_SECONDS = 60  # time limit of one collection; PyIceberg's clients wait forever for a frozen server
DEFAULT_INTERVAL_SECONDS = 2.0
SHORTEST_INTERVAL_SECONDS = 0.2
TOP_REASONS = 5
SHORT_LAG_SECONDS = 120
LONGEST_AGE_MS = 1_000 * 365 * 86_400_000  # humanize fails at two thousand years
STYLES = {Level.OK: "", Level.LATE: "yellow", Level.STALE: "bold red", Level.UNKNOWN: "dim"}
ERROR_STYLE = STYLES[Level.STALE]
STATES = {
    FlowState.NEVER: "no flow has started yet",
    FlowState.RUNS: "runs: {}",
    FlowState.PARTLY: "runs only in part: {}",
    FlowState.STOPPED: "stopped: was {}",
    FlowState.ELSEWHERE: "started as {}; this machine cannot see whether it runs",
}


def show_status(flows: Sequence[str] | None, watch: bool, interval: float | None, as_json: bool) -> None:
    """Print the status of some flows, or of all.

    Print it once, or with `watch` every `interval` seconds until SIGINT or SIGTERM. The exit code is 1 if a table
    cannot be read.
    """
    settings = load_settings(exchange_names())
    set_up_logging("CRITICAL")  # the status has librdkafka's messages about a broker that is down
    if interval is not None and not watch:
        raise typer.BadParameter("--every is the interval of --watch: add --watch")
    names = dict.fromkeys(flows or [*exchange_names(), CANDLES.name])
    found = [find_exchange(name) for name in names if name != CANDLES.name]
    collector = TimeLimitedCollector(settings, found, CANDLES.name in names)
    if watch:
        _watch(collector, max(SHORTEST_INTERVAL_SECONDS, interval or DEFAULT_INTERVAL_SECONDS), as_json)
        return
    status = collector.collect()
    if as_json:
        print_json(status.to_dict(), indent=2)
    else:
        console().print(render(status))
    if status.errors:
        raise typer.Exit(EXIT_FAILED)


class TimeLimitedCollector:
    """A StatusCollector in a thread of its own: Ctrl-C works at once, and no server blocks it forever."""

    def __init__(self, settings: Settings, exchanges: Sequence[Exchange], candles: bool) -> None:
        self._settings = settings
        self._exchanges = exchanges
        self._candles = candles
        self._collector: StatusCollector | None = None

    def collect(self) -> Status:
        """Collect the status within COLLECT_SECONDS, or raise CatalogError.

        After an error, including those of `StatusCollector.collect`, the next call opens the catalog again.
        """
        previous, self._collector = self._collector, None

        def run() -> tuple[StatusCollector, Status]:
            collector = previous or StatusCollector(
                open_catalog(self._settings), self._settings, self._exchanges, self._candles
            )
            return collector, collector.collect()

        try:
            self._collector, status = run_with_timeout(COLLECT_SECONDS, run)
        except DeadlinePassedError as error:
            raise CatalogError(
                f"the catalog or its storage has not answered for {COLLECT_SECONDS} s: try again when it does"
            ) from error
        return status


def _watch(collector: TimeLimitedCollector, interval: float, as_json: bool) -> None:
    """Show each status and each error of a refresh, in place if the terminal can, until SIGINT or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    install_metadata_cache()
    out, results = console(), _results(collector, interval)
    try:
        if as_json:
            for result in results:
                print_json(result.to_dict() if isinstance(result, Status) else _error_to_dict(result))
        elif not out.is_terminal or out.is_dumb_terminal:
            for result in results:
                out.print(render(result) if isinstance(result, Status) else str(result))
        else:
            with Live(console=out, auto_refresh=False) as live:
                last: RenderableType = ""
                for result in results:
                    if isinstance(result, Status):
                        last = render(result)
                        live.update(last, refresh=True)
                    else:  # below the last status
                        live.update(Group(last, styled(str(result), ERROR_STYLE)), refresh=True)
    except KeyboardInterrupt:
        # The collector's thread may wait for a server, and Python would wait for it.
        sys.stdout.flush()
        os._exit(0)


def _results(collector: TimeLimitedCollector, interval: float) -> Iterator[Status | K2flowError]:
    """Yield a status, or the error of its collection, every `interval` seconds. Raises an error before any status."""
    succeeded = False
    while True:
        began = time.monotonic()
        try:
            result: Status | K2flowError = collector.collect()
            succeeded = True
        except K2flowError as error:
            if not succeeded:
                raise
            result = error
        yield result
        time.sleep(max(0.0, interval - (time.monotonic() - began)))


def _error_to_dict(error: K2flowError) -> dict[str, object]:
    return {"version": model.VERSION, "at": model.iso(time.time_ns() // 1_000_000), "error": str(error)}


def render(status: Status) -> RenderableType:
    """Return the status of all exchanges and tables."""
    parts: list[RenderableType] = []
    for name, exchange in status.exchanges.items():
        parts += [*_exchange(name, exchange, status.at), ""]
    if status.candles:
        parts += [*_candles(status.candles, status.at), ""]
    parts.append(_tables(status))
    parts.append(Text(f"as of {moment(status.at)} UTC, collected in {status.took_seconds:.1f} s", "dim"))
    return Group(*parts)


def _exchange(name: str, exchange: model.ExchangeStatus, now: int) -> Iterator[RenderableType]:
    yield _flow(name, exchange.flow, f"topic {exchange.topic}")
    if any(exchange.layers.values()):
        yield _layers(exchange, now)
    if exchange.dead_letters:
        yield _dead_letters(exchange.dead_letters)
    if exchange.window:
        yield _window(exchange.window, now)
    if exchange.replacement:
        how = "committed, not yet published to all tables" if exchange.replacement.committed else "staged, or aborted"
        yield styled(f"rows are being replaced ({how}): {exchange.replacement.what}", "yellow")
    for each in exchange.open_transactions:
        hidden, ends = each.log_end - each.stable_end, f"{each.log_end:,}, readable up to {each.stable_end:,}"
        text = f"partition {each.partition}: an open transaction hides {hidden:,} messages: the log ends at {ends}"
        yield styled(text, "yellow")
    yield from _problems([exchange.kafka_problem] if exchange.kafka_problem else [])
    yield from _problems(exchange.problems)


def _candles(candles: model.CandlesStatus, now: int) -> Iterator[RenderableType]:
    yield _flow(CANDLES.name, candles.flow, f"from {GOLD_TABLE}")
    if candles.flow.state is not FlowState.NEVER:
        yield _candles_table(candles, now)
    yield from _problems(candles.problems)


def _candles_table(candles: model.CandlesStatus, now: int) -> Table:
    table = new_table(
        "layer", *_right_aligned("lag", "behind", "sequence number", "of Gold", "trades", "trades/s", "last commit")
    )
    lag = [Text(text, STYLES[candles.level]) for text in (_count(candles.lag), _behind(candles))]
    numbers = (_count(candles.sequence_number), _count(candles.gold_sequence_number), f"{candles.trades:,}")
    rate = "unknown" if candles.trades_per_second is None else f"{candles.trades_per_second:,.1f}"
    table.add_row(CANDLES.name, *lag, *numbers, rate, _when(candles.committed_at, now))
    return table


def _flow(name: str, flow: model.FlowStatus, source: str) -> Text:
    state = STATES[flow.state].format(" and ".join(map(str, flow.writers)))
    epoch = f", epoch {flow.epoch}" if flow.epoch else ""
    return Text.assemble((name, "bold"), styled(f": {state}{epoch}; {source}"))


def _problems(problems: Sequence[str]) -> Iterator[Text]:
    return (styled(f"problem: {problem}", "bold red") for problem in problems)


def _count(number: int | None) -> str:
    return "unknown" if number is None else f"{number:,}"


def _layers(exchange: model.ExchangeStatus, now: int) -> Table:
    table = new_table("layer", *_right_aligned("lag", "behind", "messages", "messages/s", "rows/s", "last commit"))
    for name, layer in exchange.layers.items():
        if layer is None:
            table.add_row(name, Text("no table", "dim"))
            continue
        behind = [Text(text, STYLES[layer.level]) for text in (_count(layer.lag), _behind(layer))]
        per_second = (layer.messages_per_second, layer.rows_per_second)
        rates = ["unknown" if rate is None else f"{rate:,.1f}" for rate in per_second]
        table.add_row(name, *behind, f"{layer.messages:,}", *rates, _when(layer.committed_at, now))
    return table


def _behind(layer: model.LayerStatus | model.CandlesStatus) -> str:
    """Return the age of the oldest missing message or commit, and the level.

    The age is to 0.1 s while it is short, then to the minute.
    """
    if layer.lag_seconds is None:
        return "unknown"
    if layer.lag_seconds < SHORT_LAG_SECONDS:
        age = f"{layer.lag_seconds:.1f} s"
    else:
        age = precisedelta(_age(layer.lag_seconds * 1000), minimum_unit="minutes", format="%.0f")
    return age if layer.level is Level.OK else f"{age}, {layer.level}"


def _dead_letters(letters: model.DeadLetters) -> Text:
    text = f"dead letters: {_share(letters.share)} of all messages, {_share(letters.hour_share)} in the last hour"
    if letters.reasons:
        top = ", ".join(f"{reason} {count:,}" for reason, count in islice(letters.reasons.items(), TOP_REASONS))
        text += f"; reasons of the newest {letters.letters_read:,} of the last day: {top}"
    return styled(text)


def _window(window: model.WindowStatus, now: int) -> Text:
    whose = "" if window.workers_here == window.workers else f", {window.workers_here} of {window.workers} workers"
    memory, disk = naturalsize(window.memory_bytes), naturalsize(window.disk_bytes)
    return styled(
        f"deduplication window{whose}: {window.ids:,} ids of {window.hours:,} hours, {memory} in memory; "
        f"{window.disk_ids:,} of them on disk, {disk}, with {window.disk_hits:,} hits; {_ago(window.at, now)}"
    )


def _tables(status: Status) -> Table:
    table = new_table("table", *_right_aligned("rows", "files", "small", "bytes", "last commit"), "maintenance")
    for name, each in status.tables.items():
        if each is None:
            table.add_row(name, Text("unreadable", ERROR_STYLE) if name in status.errors else Text("no table", "dim"))
            continue
        numbers = (f"{each.rows:,}", f"{each.files:,}", f"{each.small_files:,}", naturalsize(each.bytes))
        table.add_row(name, *numbers, _when(each.committed_at, status.at), _maintenance(each, status.at))
    return table


def _right_aligned(*names: str) -> list[Column]:
    return [Column(name, justify="right") for name in names]


def _maintenance(table: model.TableStatus, now: int) -> str:
    due = [f"{a.what} of {a.removed:,}{f' into {a.added:,}' if a.added else ''}" for a in table.due]
    parts = [f"due: {', '.join(due) or 'nothing'}"]
    if table.delete_files:
        parts.append(f"delete files of another engine: {table.delete_files:,}, whose rows are counted too")
    if table.maintained:
        parts.append(f"done: {', '.join(f'{each.what} {_ago(each.at, now)}' for each in table.maintained)}")
    if table.leader:
        parts.append(f"lease: {table.leader}")
    return "; ".join(parts)


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _when(at: int | None, now: int) -> str:
    return "never" if at is None else f"{moment(at)}, {_ago(at, now)}"


def _ago(at: int, now: int) -> str:
    return naturaltime(_age(now - at))


def _age(ms: float) -> timedelta:
    return timedelta(milliseconds=min(max(0, ms), LONGEST_AGE_MS))
