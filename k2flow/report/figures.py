"""What a report tells. Times named `_us` are us since 1970 (UTC).

What cannot be told is a Problem in the place of what was to be told, and what there is nothing of yet is None.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from k2flow.errors import K2flowError
from k2flow.exchange import Exchange
from k2flow.report.axes import Axis
from k2flow.status.model import Status

T = TypeVar("T")


@dataclass(frozen=True)
class Problem:
    """Why something is not told, in words."""

    text: str


def attempt(look: Callable[[], T]) -> T | Problem:
    """What `look` returns, or its K2flowError as a Problem."""
    try:
        return look()
    except K2flowError as error:
        return Problem(str(error))


@dataclass(frozen=True)
class Counts:
    """How many rows there are in each step of a time axis, by exchange; `left_out` are those before and after it."""

    axis: Axis
    rows: Mapping[str, Sequence[int]]
    left_out: int


@dataclass(frozen=True)
class Delays:
    """How long `messages` messages took from Kafka's time until a commit, in ms: half of them `median` or less, 99 of
    100 `p99` or less (both to three digits), none more than `most`."""

    messages: int
    median: int
    p99: int
    most: int


@dataclass(frozen=True)
class Freshness:
    """Delays by (exchange, layer): of all commits that are known, and of those of each step of `axis` that has any."""

    axis: Axis
    total: Mapping[tuple[str, str], Delays]
    steps: Mapping[tuple[str, str], Mapping[int, Delays]]


@dataclass(frozen=True)
class Reason:
    """The dead letters of one exchange and reason; of the newest one when it failed and how its detail begins."""

    exchange: str
    reason: str
    rows: int
    newest_us: int
    detail: str


@dataclass(frozen=True)
class Candle:
    """The trades of one step of time; all digits are kept."""

    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    trades: int


@dataclass(frozen=True)
class Market:
    """One symbol at one exchange: a candle for each step of `axis` that has trades. `left_out` is as in Counts."""

    exchange: str
    symbol: str
    trades: int
    axis: Axis
    candles: Mapping[int, Candle]
    left_out: int


@dataclass(frozen=True)
class TableFiles:
    """A table's snapshot, and its data files; `histogram` counts those of 2^n bytes up to twice that, by n."""

    snapshot_id: int | None
    committed_us: int | None
    rows: int
    files: int
    small: int
    bytes: int
    median_bytes: int
    target_bytes: int
    snapshots: int
    histogram: Mapping[int, int]


@dataclass(frozen=True)
class Figures:
    """All that a report tells but the audit.

    `rows` are by exchange and layer, None for a missing table; `files` by table, None for a missing one. `symbols` are
    those that were asked for.
    """

    made_us: int
    catalog: Sequence[tuple[str, str]]
    exchanges: Sequence[Exchange]
    symbols: Sequence[str]
    status: Status | Problem
    rows: Mapping[str, Mapping[str, int | None]] | Problem
    taken_in: Counts | Problem | None
    traded: Counts | Problem | None
    freshness: Freshness | Problem | None
    reasons: Sequence[Reason] | Problem
    markets: Sequence[Market] | Problem
    files: Mapping[str, TableFiles | Problem | None]

    def missing(self, layer: str) -> list[str]:
        """The tables of a layer that there are not."""
        tables = ((each.name, own) for each in self.exchanges for own in each.layers if own.name == layer)
        names = dict.fromkeys(own.table(exchange) for exchange, own in tables)
        return [name for name in names if self.files[name] is None]
