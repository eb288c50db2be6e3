"""The stream of messages: the market's trades, mixed with bad ones and duplicates."""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from k2flow.sandbox.producer.defects import ValidMessage, pick_defect
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.market import HOUR_US, Market
from k2flow.sandbox.producer.options import ProduceOptions
from k2flow.sandbox.producer.trades import Bools, Ints, Trades

CHUNK = 20_000
FULL_SPEED_RATE = 100_000.0
"""Messages per second of Kafka time, if they are sent as fast as possible."""
_NULL_KEY_SHARE = 0.01
_COPY_DISTANCE = 2_000
"""A copy comes at most this many valid trades after its original: soon, even at a slow rate."""
_SHIFTS_US = ((-600_000_000, 45_000_000), (-HOUR_US - 1_800_000_000, -HOUR_US), (-6 * HOUR_US, -2 * HOUR_US))
_SHIFT_SHARES = (0.6, 0.35, 0.05)


@dataclass(frozen=True)
class Messages:
    """n messages in the order of sending; the i-th goes to partition route[i] % partitions."""

    values: list[bytes | None]
    keys: list[bytes | None]
    time_us: Ints
    route: Ints


@dataclass
class StreamCounts:
    """Counts of the messages so far: valid trades, copies of them, and bad ones by reason code."""

    originals: int
    duplicates_exact: int
    duplicates_shifted: int
    bad: Counter[str]


@dataclass(frozen=True)
class _DraftMessages:
    """Trades to send or to copy, each with its route, whether it has a key, and whether it is late."""

    trades: Trades
    keyed: Bools
    route: Ints
    late: Bools

    def take(self, rows: Ints) -> "_DraftMessages":
        return _DraftMessages(self.trades.take(rows), self.keyed[rows], self.route[rows], self.late[rows])

    def after(self, earlier: "_DraftMessages") -> "_DraftMessages":
        return _DraftMessages(
            self.trades.after(earlier.trades),
            np.concatenate([earlier.keyed, self.keyed]),
            np.concatenate([earlier.route, self.route]),
            np.concatenate([earlier.late, self.late]),
        )


class Stream:
    """The messages of one run, determined by the options and the start time. `counts` is complete after all chunks."""

    def __init__(self, exchange: str, options: ProduceOptions, start_us: int) -> None:
        self._exchange = exchange
        self._options = options
        self._start_us = start_us
        self._rng = np.random.Generator(np.random.PCG64([options.seed, start_us]))
        self._market = Market(exchange, self._rng, start_us)
        self._route_of = np.array([zlib.crc32(symbol.encode()) for symbol in self._market.symbols], np.int64)
        self.counts = StreamCounts(0, 0, 0, Counter())

    def chunks(self) -> Iterator[Messages]:
        """Yield all messages, some thousand at a time. May be called once."""
        over, count = self._options.over_seconds, self._options.count
        pace_us = 1e6 * over / count if over else 1e6 / (self._options.rate or FULL_SPEED_RATE)
        earlier = self._drafts(np.zeros(0, np.int64), 0)
        for first in range(0, count, CHUNK):
            n = min(CHUNK, count - first)
            arrival = self._market.arrivals(n, self._start_us + first * pace_us, n * pace_us)
            fresh = self._drafts(arrival, first)
            bad, copies = self._choose_rows(first, n)
            good = np.setdiff1d(np.arange(n), np.concatenate([bad, copies]))
            drafts = self._with_copies(earlier, fresh, arrival, good, copies)
            self.counts.originals += n - len(bad) - len(copies)
            yield self._messages(drafts, arrival, bad)
            earlier = fresh.take(good[-_COPY_DISTANCE:])

    def _drafts(self, arrival: Ints, first: int) -> _DraftMessages:
        trades, late = self._market.trades(arrival)
        keyed = self._rng.random(len(arrival)) >= _NULL_KEY_SHARE
        running = np.arange(first, first + len(arrival))
        return _DraftMessages(trades, keyed, np.where(keyed, self._route_of[trades.symbol.codes], running), late)

    def _choose_rows(self, first: int, n: int) -> tuple[Ints, Ints]:
        """Choose the rows of a chunk for bad messages and copies, by their shares of the whole run.

        The very first message cannot be a copy.
        """
        bad, copies = (
            round((first + n) * share) - round(first * share) for share in (self._options.bad, self._options.duplicates)
        )
        chosen = self._rng.permutation(np.arange(1 if first == 0 else 0, n))[: bad + copies]
        return np.sort(chosen[:bad]), np.sort(chosen[bad:])

    def _with_copies(
        self, earlier: _DraftMessages, fresh: _DraftMessages, arrival: Ints, good: Ints, copies: Ints
    ) -> _DraftMessages:
        """Replace the rows `copies` of `fresh` by copies of earlier valid trades, half of them shifted in time."""
        n, before = len(copies), len(earlier.route)
        candidates = np.concatenate([np.arange(before), before + good])
        available = before + np.searchsorted(good, copies)
        near = self._rng.random(n) ** 2  # most copies come soon
        distance = 1 + (near * np.minimum(available, _COPY_DISTANCE)).astype(np.int64)
        source = before + np.arange(len(fresh.route))
        source[copies] = candidates[available - distance]
        drafts = fresh.after(earlier).take(source)
        low, high = np.array(_SHIFTS_US)[self._rng.choice(len(_SHIFTS_US), n, p=_SHIFT_SHARES)].T
        shift = self._rng.integers(low, high)
        # A late trade's shifted copy could lie outside Gold's deduplication window.
        shift[(self._rng.random(n) < 0.5) | drafts.late[copies]] = 0
        if self._options.over_seconds:  # the spread ends now, and no trade may be newer
            shift = np.minimum(shift, arrival[copies] // 1000 * 1000 - drafts.trades.timestamp[copies])
        drafts.trades.timestamp[copies] += shift
        self.counts.duplicates_exact += int((shift == 0).sum())
        self.counts.duplicates_shifted += int((shift != 0).sum())
        return drafts

    def _messages(self, drafts: _DraftMessages, arrival: Ints, bad: Ints) -> Messages:
        encoded = encode(drafts.trades, self._options.schema_id)
        values: list[bytes | None] = [*encoded.values()]
        for i in bad.tolist():
            reason, make = pick_defect(self.counts.bad.total())
            kafka_us = int(arrival[i]) // 1000 * 1000
            values[i] = make(ValidMessage(self._exchange, self._options.schema_id, kafka_us, encoded.row(i)))
            self.counts.bad[reason.code] += 1
        names = [symbol.encode() for symbol in drafts.trades.symbol.values]
        keys = [
            names[code] if keyed else None
            for code, keyed in zip(drafts.trades.symbol.codes.tolist(), drafts.keyed.tolist(), strict=True)
        ]
        return Messages(values, keys, arrival, drafts.route)
