"""The stream of messages: the market's trades, with bad ones and duplicates among them."""

import zlib
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from k2flow.sandbox.producer.defects import Sound, defect
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.market import HOUR_US, Market
from k2flow.sandbox.producer.options import ProduceOptions
from k2flow.sandbox.producer.trades import Bools, Ints, Trades

CHUNK = 20_000
FULL_SPEED_RATE = 100_000.0
"""Messages a second of Kafka time when they are sent as fast as possible."""
_NULL_KEY_SHARE = 0.01
_COPY_DISTANCE = 2_000
"""A copy comes at most so many good trades after the original: soon, even at a slow rate."""
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
class Counts:
    """What the messages so far are: valid trades, copies of them, and bad ones by reason code."""

    originals: int
    duplicates_exact: int
    duplicates_shifted: int
    bad: Counter[str]


@dataclass(frozen=True)
class _Drafts:
    """Trades that are to be sent or copied: with the route of each, and whether it has a key and is late."""

    trades: Trades
    keyed: Bools
    route: Ints
    late: Bools

    def take(self, rows: Ints) -> "_Drafts":
        return _Drafts(self.trades.take(rows), self.keyed[rows], self.route[rows], self.late[rows])

    def after(self, earlier: "_Drafts") -> "_Drafts":
        return _Drafts(
            self.trades.after(earlier.trades),
            np.concatenate([earlier.keyed, self.keyed]),
            np.concatenate([earlier.route, self.route]),
            np.concatenate([earlier.late, self.late]),
        )


class Stream:
    """The messages of one run, random by seed and start time alone; `counts` is right once all were taken."""

    def __init__(self, exchange: str, options: ProduceOptions, start_us: int) -> None:
        self._exchange = exchange
        self._options = options
        self._start_us = start_us
        self._rng = np.random.Generator(np.random.PCG64([options.seed, start_us]))
        self._market = Market(exchange, self._rng, start_us)
        self._route_of = np.array([zlib.crc32(symbol.encode()) for symbol in self._market.symbols], np.int64)
        self.counts = Counts(0, 0, 0, Counter())

    def chunks(self) -> Iterator[Messages]:
        """All messages, some thousand at a time. May be called once."""
        pace_us = 1e6 / (self._options.rate or FULL_SPEED_RATE)
        earlier = self._drafts(np.zeros(0, np.int64), 0)
        for first in range(0, self._options.count, CHUNK):
            n = min(CHUNK, self._options.count - first)
            arrival = self._market.arrivals(n, self._start_us + first * pace_us, n * pace_us)
            fresh = self._drafts(arrival, first)
            bad, copies = self._places(first, n)
            good = np.setdiff1d(np.arange(n), np.concatenate([bad, copies]))
            drafts = self._with_copies(earlier, fresh, good, copies)
            self.counts.originals += n - len(bad) - len(copies)
            yield self._messages(drafts, arrival, bad)
            earlier = fresh.take(good[-_COPY_DISTANCE:])

    def _drafts(self, arrival: Ints, first: int) -> _Drafts:
        trades, late = self._market.trades(arrival)
        keyed = self._rng.random(len(arrival)) >= _NULL_KEY_SHARE
        running = np.arange(first, first + len(arrival))
        return _Drafts(trades, keyed, np.where(keyed, self._route_of[trades.symbol.codes], running), late)

    def _places(self, first: int, n: int) -> tuple[Ints, Ints]:
        """Where in a chunk bad messages and copies go: so many that the shares of the whole run come out.

        The first message of all has nothing before it to be a copy of.
        """
        bad, copies = (
            round((first + n) * share) - round(first * share) for share in (self._options.bad, self._options.duplicates)
        )
        chosen = self._rng.permutation(np.arange(1 if first == 0 else 0, n))[: bad + copies]
        return np.sort(chosen[:bad]), np.sort(chosen[bad:])

    def _with_copies(self, earlier: _Drafts, fresh: _Drafts, good: Ints, copies: Ints) -> _Drafts:
        """`fresh`, with a copy of an earlier good trade in each of `copies`; half of them shifted in time."""
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
        # A late trade's shifted copy could lie outside the hours in which Gold looks for copies.
        shift[(self._rng.random(n) < 0.5) | drafts.late[copies]] = 0
        drafts.trades.timestamp[copies] += shift
        self.counts.duplicates_exact += int((shift == 0).sum())
        self.counts.duplicates_shifted += int((shift != 0).sum())
        return drafts

    def _messages(self, drafts: _Drafts, arrival: Ints, bad: Ints) -> Messages:
        encoded = encode(drafts.trades, self._options.schema_id)
        values: list[bytes | None] = [*encoded.values()]
        for i in bad.tolist():
            reason, make = defect(self.counts.bad.total())
            kafka_us = int(arrival[i]) // 1000 * 1000
            values[i] = make(Sound(self._exchange, self._options.schema_id, kafka_us, encoded.row(i)))
            self.counts.bad[reason.code] += 1
        names = [symbol.encode() for symbol in drafts.trades.symbol.values]
        keys = [
            names[code] if keyed else None
            for code, keyed in zip(drafts.trades.symbol.codes.tolist(), drafts.keyed.tolist(), strict=True)
        ]
        return Messages(values, keys, arrival, drafts.route)
