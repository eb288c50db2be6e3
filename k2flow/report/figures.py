"""The figures of a report, as plain values. Times named `_us` are us since 1970 (UTC).

A figure that could not be determined is `Unavailable`; a figure without data is None.
"""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import TypeVar

from k2flow.errors import one_line
from k2flow.exchange import Exchange
from k2flow.gaps.find import Gap, SymbolGaps
from k2flow.report.axes import Axis
from k2flow.status.model import Status

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True)
class Unavailable:
    """Why a figure could not be determined."""

    text: str


def attempt(compute: Callable[[], T]) -> T | Unavailable:
    """Return the result of `compute`, or its error as `Unavailable`: no figure hides the others."""
    try:
        return compute()
    except Exception as error:
        log.debug("a figure of the report", exc_info=True)
        return Unavailable(one_line(error))


def available(figure: T | Unavailable) -> T | None:
    """Return a figure, or None if it is `Unavailable`."""
    return None if isinstance(figure, Unavailable) else figure


@dataclass(frozen=True)
class RowCounts:
    """The number of rows in each step of a time axis, by exchange; `outside` counts rows before and after it."""

    axis: Axis
    rows: Mapping[str, Sequence[int]]
    outside: int


@dataclass(frozen=True)
class Delays:
    """The delays of `messages` messages from Kafka's time to a commit, in ms; median and p99 to three digits."""

    messages: int
    median: int
    p99: int
    longest: int


@dataclass(frozen=True)
class Freshness:
    """Delays by (exchange, layer): of all known commits, and of each step of `axis` that has commits."""

    axis: Axis
    total: Mapping[tuple[str, str], Delays]
    steps: Mapping[tuple[str, str], Mapping[int, Delays]]


@dataclass(frozen=True)
class DeadLetterReason:
    """The dead letters of one exchange and reason; `newest_us` and `detail` (its start) are of the newest."""

    exchange: str
    reason: str
    rows: int
    newest_us: int
    detail: str


@dataclass(frozen=True)
class Candle:
    """The trades of one step of time, exact."""

    open: Decimal
    high: Decimal
    low: Decimal
    close: Decimal
    volume: Decimal
    trades: int


@dataclass(frozen=True)
class MarketCandles:
    """One symbol at one exchange: a candle for each step of `axis` that has trades. `outside` is as in RowCounts."""

    exchange: str
    symbol: str
    trades: int
    axis: Axis
    candles: Mapping[int, Candle]
    outside: int


@dataclass(frozen=True)
class ExchangeGaps:
    """The holes in one exchange's trade ids: by symbol, the largest ones, and the trades whose ids do not parse."""

    exchange: str
    symbols: Mapping[str, SymbolGaps]
    largest: Sequence[Gap]
    unparsed: int

    @property
    def holed(self) -> dict[str, SymbolGaps]:
        """The symbols with holes, those that miss most first."""
        holed = [(name, its) for name, its in self.symbols.items() if its.holes]
        return dict(sorted(holed, key=lambda each: (-each[1].missing, each[0])))


@dataclass(frozen=True, kw_only=True)
class FileStats:
    """A table's snapshot and data files; `histogram` counts by n the files of 2^n up to 2^(n+1) bytes.

    `small`, `median_bytes` and `histogram` are of the files of the report's days.
    """

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


@dataclass(frozen=True, kw_only=True)
class Figures:
    """All figures of a report except the audit.

    `rows` are by exchange and layer, `files` by table; a missing table is None. `symbols` are the requested ones.
    The figures are of the time from `since_us` on; None: of all time.
    """

    created_us: int
    since_us: int | None = None
    catalog: Sequence[tuple[str, str]]
    exchanges: Sequence[Exchange]
    symbols: Sequence[str]
    status: Status | Unavailable
    rows: Mapping[str, Mapping[str, int | None]] | Unavailable
    ingested: RowCounts | Unavailable | None
    traded: RowCounts | Unavailable | None
    freshness: Freshness | Unavailable | None
    reasons: Sequence[DeadLetterReason] | Unavailable
    markets: Sequence[MarketCandles] | Unavailable
    gaps: Sequence[ExchangeGaps] | Unavailable
    files: Mapping[str, FileStats | Unavailable | None]

    def missing(self, layer: str) -> list[str]:
        """Return the names of a layer's missing tables."""
        names = (own.table(each.name) for each in self.exchanges for own in each.layers if own.name == layer)
        return [name for name in dict.fromkeys(names) if self.files[name] is None]
