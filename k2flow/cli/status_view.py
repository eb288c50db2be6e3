"""The tables of `k2flow status`."""

from datetime import timedelta
from itertools import islice

from humanize import naturalsize, naturaltime, precisedelta
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from k2flow.status.model import (
    DeadLetters,
    ExchangeStatus,
    FlowState,
    LayerStatus,
    Level,
    MaintenanceDue,
    Status,
    TableStatus,
    moment,
)

TOP_REASONS = 5
SHORT_LAG_SECONDS = 120
STYLES = {Level.OK: "", Level.LATE: "yellow", Level.STALE: "bold red", Level.UNKNOWN: "dim"}
ERROR_STYLE = STYLES[Level.STALE]
STATES = {
    FlowState.NEVER: "no flow has started yet",
    FlowState.RUNS: "runs: {}",
    FlowState.PARTLY: "runs only in part: {}",
    FlowState.STOPPED: "stopped: was {}",
    FlowState.ELSEWHERE: "started as {}; this machine cannot see whether it runs",
}


def render(status: Status) -> RenderableType:
    """Return the status of all exchanges and tables."""
    parts: list[RenderableType] = []
    for name, exchange in status.exchanges.items():
        parts += [*_exchange(name, exchange, status.at), ""]
    parts.append(_tables(status))
    parts.append(Text(f"as of {moment(status.at)} UTC, collected in {status.took_seconds:.1f} s", "dim"))
    return Group(*parts)


def _exchange(name: str, exchange: ExchangeStatus, now: int) -> list[RenderableType]:
    flow = exchange.flow
    state = STATES[flow.state].format(" and ".join(map(str, flow.writers)))
    epoch = f", epoch {flow.epoch}" if flow.epoch else ""
    parts: list[RenderableType] = [Text.assemble((name, "bold"), f": {state}{epoch}; topic {exchange.topic}")]
    if any(exchange.layers.values()):
        parts.append(_layers(exchange, now))
    if exchange.dead_letters:
        parts.append(_dead_letters(exchange.dead_letters))
    if exchange.replacement:
        how = "committed, not yet published to all tables" if exchange.replacement.committed else "staged, or aborted"
        parts.append(Text(f"rows are being replaced ({how}): {exchange.replacement.what}", "yellow"))
    problems = [exchange.kafka_problem, *exchange.problems]
    parts += [Text(f"problem: {problem}", "bold red") for problem in problems if problem]
    return parts


def _layers(exchange: ExchangeStatus, now: int) -> Table:
    table = Table("layer")
    for column in ("lag", "behind", "messages", "messages/s", "rows/s", "last commit"):
        table.add_column(column, justify="right")
    for name, layer in exchange.layers.items():
        if layer is None:
            table.add_row(name, Text("no table", "dim"))
            continue
        style = STYLES[layer.level]
        table.add_row(
            name,
            Text("unknown" if layer.lag is None else f"{layer.lag:,}", style),
            Text(_behind(layer), style),
            f"{layer.messages:,}",
            *(
                "unknown" if rate is None else f"{rate:,.1f}"
                for rate in (layer.messages_per_second, layer.rows_per_second)
            ),
            _when(layer.committed_at, now),
        )
    return table


def _behind(layer: LayerStatus) -> str:
    """Return the age of the oldest missing message, to 0.1 s while it is short, then to the minute; and the level."""
    if layer.lag_seconds is None:
        return "unknown"
    if layer.lag_seconds < SHORT_LAG_SECONDS:
        age = f"{layer.lag_seconds:.1f} s"
    else:
        age = precisedelta(timedelta(seconds=layer.lag_seconds), minimum_unit="minutes", format="%.0f")
    return age if layer.level is Level.OK else f"{age}, {layer.level}"


def _dead_letters(letters: DeadLetters) -> Text:
    text = f"dead letters: {_share(letters.share)} of all messages, {_share(letters.hour_share)} in the last hour"
    if letters.reasons:
        top = ", ".join(f"{reason} {count:,}" for reason, count in islice(letters.reasons.items(), TOP_REASONS))
        text += f"; reasons of the newest {letters.letters_read:,} of the last day: {top}"
    return Text(text)


def _tables(status: Status) -> Table:
    table = Table("table")
    for column in ("rows", "files", "small", "bytes", "last commit"):
        table.add_column(column, justify="right")
    table.add_column("maintenance")
    for name, each in status.tables.items():
        if each is None:
            table.add_row(name, Text("no table", "dim"))
            continue
        numbers = (f"{each.rows:,}", f"{each.files:,}", f"{each.small_files:,}", naturalsize(each.bytes))
        table.add_row(name, *numbers, _when(each.committed_at, status.at), _maintenance(each, status.at))
    return table


def _maintenance(table: TableStatus, now: int) -> str:
    parts = [f"due: {', '.join(map(_due, table.due)) or 'nothing'}"]
    if table.maintained:
        parts.append(f"done: {', '.join(f'{each.what} {_ago(each.at, now)}' for each in table.maintained)}")
    if table.leader:
        parts.append(f"lease: {table.leader}")
    return "; ".join(parts)


def _due(action: MaintenanceDue) -> str:
    into = f" into {action.added:,}" if action.added else ""
    return f"{action.what} of {action.removed:,}{into}"


def _share(share: float | None) -> str:
    return "none" if share is None else f"{share:.2%}"


def _when(at: int | None, now: int) -> str:
    return "never" if at is None else f"{moment(at)}, {_ago(at, now)}"


def _ago(at: int, now: int) -> str:
    return naturaltime(timedelta(milliseconds=max(0, now - at)))
