"""The rules that a decoded trade must pass: a pure function of the message, never of the clock.

A rule that used the current time could put a replayed message into another table than the first time.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.exchange import Exchange
from k2flow.layers import FIRST_TRADE_US, MAX_TIME_US, MIN_TIME_US
from k2flow.trades.reasons import FIRST_EXCHANGE_RULE, Reason

FUTURE_US = 60 * 1_000_000
OLD_US = 365 * 86_400 * 1_000_000
KAFKA_TIME = "kafka_timestamp"  # in the columns of a RuleReport: the message's, not the trade's
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class RuleReport:
    """What a dead letter reports of a broken rule: the reason code, and the columns whose values show why."""

    reason: str
    columns: tuple[str, ...]


_COLUMNS: dict[Reason, tuple[str, ...]] = {
    Reason.MESSAGE_ID_REQUIRED: ("message_id",),
    Reason.SYMBOL_REQUIRED: ("symbol",),
    Reason.TRADE_ID_REQUIRED: ("trade_id",),
    Reason.CURRENCY_REQUIRED: ("currency",),
    Reason.PRICE_MUST_BE_POSITIVE: ("price",),
    Reason.QUANTITY_MUST_BE_POSITIVE: ("quantity",),
    Reason.INVALID_SIDE: ("side",),
    Reason.WRONG_EXCHANGE: ("exchange",),
    Reason.INVALID_ASSET_CLASS: ("asset_class",),
    Reason.TIMESTAMP_OUT_OF_RANGE: ("timestamp", "ingestion_timestamp"),
    Reason.TIMESTAMP_IN_FUTURE: ("timestamp", KAFKA_TIME),
    Reason.TIMESTAMP_TOO_OLD: ("timestamp", KAFKA_TIME),
    Reason.TIMESTAMP_IMPLAUSIBLE: ("timestamp", "ingestion_timestamp", KAFKA_TIME),
    Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE: ("ingestion_timestamp", KAFKA_TIME),
}


class Validator:
    """The rules of one exchange: the common ones, then its own."""

    def __init__(self, exchange: Exchange) -> None:
        self._exchange = exchange
        self._reports = {int(reason): RuleReport(reason.code, columns) for reason, columns in _COLUMNS.items()}
        for i, rule in enumerate(exchange.rules, FIRST_EXCHANGE_RULE):
            self._reports[i] = RuleReport(rule.reason, (rule.column,))

    def rule(self, number: int) -> RuleReport:
        """Return the report of a rule by its number. Raises KeyError for an unknown number."""
        return self._reports[number]

    def check(self, trades: pa.RecordBatch, kafka_time: pa.TimestampArray, reasons: npt.NDArray[np.uint8]) -> None:
        """Set the reason of each of n trades (the columns of TradeV2) to the number of the first rule that it breaks.

        A row whose reason is not 0 keeps it. Rules that compare with `kafka_time` (us UTC) do not apply if it is
        unusable: null, or before FIRST_TRADE_US. Then the time of the trade must agree with its time of ingestion.
        """
        for number, is_broken in self._rules(trades, kafka_time):
            broken = is_broken()
            if broken.any():
                reasons[broken & (reasons == 0)] = number

    def _rules(self, trades: pa.RecordBatch, kafka_time: pa.TimestampArray) -> Iterator[tuple[int, Callable[[], Mask]]]:
        def column(name: str) -> pa.Array:
            return trades.column(name)

        time = int64_times(column("timestamp"))
        received = int64_times(column("ingestion_timestamp"))
        yield Reason.MESSAGE_ID_REQUIRED, lambda: _blank(column("message_id"))
        yield Reason.SYMBOL_REQUIRED, lambda: _blank(column("symbol"))
        yield Reason.TRADE_ID_REQUIRED, lambda: _blank(column("trade_id"))
        yield Reason.CURRENCY_REQUIRED, lambda: _blank(column("currency"))
        yield Reason.PRICE_MUST_BE_POSITIVE, lambda: _unscaled(column("price")) <= 0
        yield Reason.QUANTITY_MUST_BE_POSITIVE, lambda: _unscaled(column("quantity")) <= 0
        yield Reason.INVALID_SIDE, lambda: _not_in(column("side"), "BUY", "SELL")
        yield Reason.WRONG_EXCHANGE, lambda: _not_in(column("exchange"), self._exchange.code)
        yield Reason.INVALID_ASSET_CLASS, lambda: _not_in(column("asset_class"), "crypto")
        yield Reason.TIMESTAMP_OUT_OF_RANGE, lambda: _outside(time) | _outside(received)
        kafka = int64_times(kafka_time)
        known = ~_nulls(kafka_time) & (kafka >= FIRST_TRADE_US)
        inside = ~_outside(time) & ~_outside(received)  # so that no difference overflows
        with np.errstate(over="ignore"):
            ahead = time - kafka
        yield Reason.TIMESTAMP_IN_FUTURE, lambda: known & inside & (ahead > FUTURE_US)
        yield Reason.TIMESTAMP_TOO_OLD, lambda: known & inside & (ahead < -OLD_US)
        yield Reason.TIMESTAMP_IMPLAUSIBLE, lambda: ~known & inside & ((time < FIRST_TRADE_US) | _apart(time, received))
        yield Reason.INGESTION_TIMESTAMP_IMPLAUSIBLE, lambda: known & inside & _apart(received, kafka)
        for i, rule in enumerate(self._exchange.rules, FIRST_EXCHANGE_RULE):
            yield i, lambda rule=rule: ~rule.valid(trades).fill_null(False).to_numpy(zero_copy_only=False)  # type: ignore[misc]


def int64_times(times: pa.TimestampArray) -> npt.NDArray[np.int64]:
    """Return microseconds since 1970, null as 0."""
    numbers = times.cast(pa.int64())
    result: npt.NDArray[np.int64] = (numbers.fill_null(0) if numbers.null_count else numbers).to_numpy()
    return result


def _nulls(column: pa.Array) -> Mask:
    if column.null_count == 0:
        return np.zeros(len(column), bool)
    mask: Mask = column.is_null().to_numpy(zero_copy_only=False)
    return mask


def _outside(time_us: npt.NDArray[np.int64]) -> Mask:
    outside: Mask = (time_us < MIN_TIME_US) | (time_us > MAX_TIME_US)
    return outside


def _apart(one: npt.NDArray[np.int64], other: npt.NDArray[np.int64]) -> Mask:
    """Return which times are more than 365 days from each other, either way."""
    with np.errstate(over="ignore"):
        apart: Mask = np.abs(one - other) > OLD_US
    return apart


def _unscaled(amounts: pa.Decimal128Array) -> npt.NDArray[np.int64]:
    """Return the integers behind decimal128(18, 8): 18 digits fit into the low word of two; null as 0."""
    words = np.frombuffer(amounts.buffers()[1], np.int64, 2 * (amounts.offset + len(amounts)))
    low = words[2 * amounts.offset :: 2]
    result: npt.NDArray[np.int64] = np.where(_nulls(amounts), 0, low) if amounts.null_count else low
    return result


def _not_in(column: pa.StringArray, *allowed: str) -> Mask:
    inside = pc.is_in(column, value_set=pa.array(allowed, pa.string()))
    mask: Mask = ~inside.to_numpy(zero_copy_only=False)
    return mask


def _blank(column: pa.StringArray) -> Mask:
    """Return which values are null, empty or only white space. A printable ASCII byte at the start settles most."""
    n = len(column)
    starts = np.frombuffer(column.buffers()[1], np.int32, n + 1 + column.offset)[column.offset :]
    data = np.frombuffer(column.buffers()[2] or b"\0", np.uint8)
    first = data[np.minimum(starts[:-1], len(data) - 1)]
    maybe: Mask = (starts[1:] == starts[:-1]) | (first <= 0x20) | (first >= 0x7F)
    if column.null_count:
        maybe |= _nulls(column)
    if not maybe.any():
        return maybe
    rows = np.flatnonzero(maybe)
    trimmed = pc.utf8_trim_whitespace(column.take(pa.array(rows)).fill_null(""))
    maybe[rows] = pc.equal(trimmed, "").to_numpy(zero_copy_only=False)
    return maybe
