"""The options of the producer, and the stream of messages: the market's trades, mixed with bad ones and copies."""

import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.errors import ProduceError
from k2flow.sandbox.producer.defects import NO_TIME_US, ValidMessage, kafka_time_of, pick_defect
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.market import HOUR_US, Market, message_ids
from k2flow.sandbox.producer.trades import Ints

CHUNK = 20_000
MAX_OVER_SECONDS = 12 * 3600
"""Copies are up to six hours older than their original: together still within the deduplication window of Gold."""
FULL_SPEED_RATE = 100_000.0  # messages per second of Kafka time, if they are sent as fast as possible
_NULL_KEY_SHARE = 0.01
_COPY_DISTANCE = 2_000  # a copy comes at most this many valid trades after its original: soon, even at a slow rate
_SHIFTS_US = ((-600_000_000, 45_000_000), (-HOUR_US - 1_800_000_000, -HOUR_US), (-6 * HOUR_US, -2 * HOUR_US))
_SHIFT_SHARES = (0.6, 0.35, 0.05)
_MAX_HANDLERS = 16
_MAX_HANDLER_DELAY_US = 2_000_000


@dataclass(frozen=True, kw_only=True)
class ProduceOptions:
    """How many messages to produce, how fast, and with how many defects.

    `rate` is in messages per second; 0: as fast as possible. `bad`, `duplicates` and `loss` are shares of `count`,
    together at most 0.9. Messages that are lost are not sent. `late` is the share of trades that come minutes,
    hours or days late. Each of `handlers` feed handlers has `count` messages of the same trades, at `rate`. Their
    message ids, delays, bad ones, duplicates and losses are their own. `start` is the Kafka timestamp of the first
    message; default: now, or `over_seconds` before now. With `over_seconds` the messages are sent as fast as
    possible, and their timestamps spread over that time. The same options with the same `start` give the same
    messages, byte for byte, in the same partitions. Another `start` gives other message ids too. Raises
    ProduceError if a value makes no sense.
    """

    count: int
    rate: float = 0.0
    bad: float = 0.0
    duplicates: float = 0.0
    loss: float = 0.0
    late: float = 0.001
    handlers: int = 1
    seed: int = 0
    start: datetime | None = None
    over_seconds: float | None = None
    schema_id: int = 1

    def __post_init__(self) -> None:
        checks = {
            "count must be 1 or more": self.count >= 1,
            "rate must be 0 (as fast as possible) or more": self.rate >= 0,
            "bad, duplicates and loss must be 0 or more, and together at most 0.9": (
                min(self.bad, self.duplicates, self.loss) >= 0 and self.bad + self.duplicates + self.loss <= 0.9
            ),
            "late must be from 0 to 1": 0 <= self.late <= 1,
            f"handlers must be from 1 to {_MAX_HANDLERS}": 1 <= self.handlers <= _MAX_HANDLERS,
            "seed must be 0 or more": self.seed >= 0,
            "start needs a time zone": self.start is None or self.start.tzinfo is not None,
            "over must be more than 0 and at most 12 hours": (
                self.over_seconds is None or 0 < self.over_seconds <= MAX_OVER_SECONDS
            ),
            "over spreads messages that are sent at once: omit rate, or over": not (self.over_seconds and self.rate),
            "schema_id must be from 0 to 4294967295": 0 <= self.schema_id < 2**32,
        }
        for rule, holds in checks.items():
            if not holds:
                raise ProduceError(rule)

    @property
    def messages(self) -> int:
        """How many messages are sent."""
        return self.handlers * (self.count - round(self.count * self.loss))

    def start_us(self) -> int:
        """Return the Kafka timestamp of the first message, in microseconds since 1970: a whole millisecond."""
        start = self.start or datetime.now(UTC) - timedelta(seconds=self.over_seconds or 0)
        return round(start.timestamp() * 1000) * 1000


@dataclass(frozen=True)
class Messages:
    """n messages in the order of sending; the i-th goes to partition route[i] % partitions.

    `time_us` is Kafka's time of each, NO_TIME_US for a message without one.
    """

    values: list[bytes | None]
    keys: list[bytes | None]
    time_us: Ints
    route: Ints

    def take(self, rows: Ints) -> "Messages":
        """Return these messages, in this order."""
        chosen = rows.tolist()
        return Messages(
            [self.values[i] for i in chosen], [self.keys[i] for i in chosen], self.time_us[rows], self.route[rows]
        )


@dataclass
class StreamCounts:
    """Counts of the messages so far: valid trades, copies of them, and bad ones by reason code.

    `originals` counts a trade for each handler that brings it, `trades` once.
    """

    originals: int = 0
    duplicates_exact: int = 0
    duplicates_shifted: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    trades: int = 0


@dataclass
class _Handler:
    """One feed handler: its randomness, and its last valid trades."""

    rng: np.random.Generator
    earlier: pa.RecordBatch


class MessageStream:
    """The messages of one run, determined by the options and the start time. `counts` is complete after all chunks."""

    def __init__(self, exchange: str, options: ProduceOptions, start_us: int) -> None:
        self._exchange = exchange
        self._options = options
        self._start_us = start_us
        self._rng = np.random.Generator(np.random.PCG64([options.seed, start_us]))
        self._market = Market(exchange, self._rng, start_us, options.late)
        self._route_of = np.array([zlib.crc32(symbol.encode()) for symbol in self._market.symbols], np.int64)
        self.counts = StreamCounts()

    def chunks(self) -> Iterator[Messages]:
        """Yield all messages, some thousand of each handler at a time. May be called once."""
        over, count, handlers = self._options.over_seconds, self._options.count, self._options.handlers
        pace_us = 1e6 * over / count if over else 1e6 / (self._options.rate or FULL_SPEED_RATE)
        seeds = [self._options.seed, self._start_us]
        rngs = [np.random.Generator(np.random.PCG64([*seeds, i])) for i in range(handlers)]
        none = self._drafts(np.zeros(0, np.int64), 0)
        known = [_Handler(rng, none) for rng in (rngs if handlers > 1 else [self._rng])]
        for first in range(0, count, CHUNK):
            n = min(CHUNK, count - first)
            arrival = self._market.arrivals(n, self._start_us + first * pace_us, n * pace_us)
            fresh = self._drafts(arrival, first)
            received = [(fresh, arrival)] if handlers == 1 else [self._received(each, fresh, arrival) for each in known]
            parts = [self._of_handler(each, *own, first) for each, own in zip(known, received, strict=True)]
            self.counts.trades += len(np.unique(np.concatenate([good for _, good in parts])))
            sent = [messages for messages, _ in parts]
            yield sent[0] if handlers == 1 else _merged(sent)

    def _received(self, handler: _Handler, fresh: pa.RecordBatch, arrival: Ints) -> tuple[pa.RecordBatch, Ints]:
        """Return a chunk's trades as a handler receives them, with its ids and times, and their arrivals."""
        n, rng = len(fresh), handler.rng
        delay = rng.lognormal(9.6, 0.8, n)  # median 15 ms
        straggling = rng.random(n) < 0.01
        delay[straggling] += rng.uniform(50_000, _MAX_HANDLER_DELAY_US, int(straggling.sum()))
        later = np.minimum(delay, _MAX_HANDLER_DELAY_US).astype(np.int64)
        if self._options.over_seconds:  # the spread ends now
            end = self._start_us + int(self._options.over_seconds * 1e6)
            later = np.clip(end - arrival, 0, later)
        columns = dict(zip(fresh.schema.names, fresh.columns, strict=True))
        columns["message_id"] = message_ids(rng, n)
        columns["ingestion_timestamp"] = pa.array(columns["ingestion_timestamp"].to_numpy() + later)
        return pa.record_batch(columns), arrival + later

    def _of_handler(self, handler: _Handler, fresh: pa.RecordBatch, arrival: Ints, first: int) -> tuple[Messages, Ints]:
        """Return one handler's messages of a chunk, and the rows of the trades that it brings."""
        n = len(fresh)
        bad, copies, lost = self._choose_rows(handler.rng, first, n)
        good = np.setdiff1d(np.arange(n), np.concatenate([bad, copies, lost]))
        drafts = self._with_copies(handler, fresh, arrival, good, copies)
        self.counts.originals += len(good)
        handler.earlier = fresh.take(good[-_COPY_DISTANCE:])
        messages = self._messages(drafts, arrival, bad)
        return (messages.take(np.setdiff1d(np.arange(n), lost)) if len(lost) else messages), good

    def _drafts(self, arrival: Ints, first: int) -> pa.RecordBatch:
        """Return a trade for each arrival, with further columns: `route`, `keyed` (has a key) and `late`."""
        trades, late = self._market.trades(arrival)
        keyed = self._rng.random(len(arrival)) >= _NULL_KEY_SHARE
        running = np.arange(first, first + len(arrival))
        route = np.where(keyed, self._route_of[trades["symbol"].indices], running)
        columns = zip(trades.column_names, trades.columns, strict=True)
        return pa.record_batch({**dict(columns), "route": route, "keyed": keyed, "late": late})

    def _choose_rows(self, rng: np.random.Generator, first: int, n: int) -> tuple[Ints, Ints, Ints]:
        """Choose a chunk's bad, copied and lost messages by their shares of the run; the very first one is good."""
        shares = (self._options.bad, self._options.duplicates, self._options.loss)
        ends = np.cumsum([round((first + n) * share) - round(first * share) for share in shares])
        chosen = rng.permutation(np.arange(1 if first == 0 else 0, n))[: ends[-1]]
        bad, copies, lost = (np.sort(part) for part in np.split(chosen, ends[:-1]))
        return bad, copies, lost

    def _with_copies(
        self, handler: _Handler, fresh: pa.RecordBatch, arrival: Ints, good: Ints, copies: Ints
    ) -> pa.RecordBatch:
        """Replace the rows `copies` of `fresh` by copies of earlier valid trades, half of them shifted in time."""
        earlier, rng = handler.earlier, handler.rng
        n, before = len(copies), len(earlier)
        candidates = np.concatenate([np.arange(before), before + good])
        available = before + np.searchsorted(good, copies)
        near = rng.random(n) ** 2  # most copies come soon
        distance = 1 + (near * np.minimum(available, _COPY_DISTANCE)).astype(np.int64)
        source = before + np.arange(len(fresh))
        source[copies] = candidates[available - distance]
        drafts = pa.concat_batches([earlier, fresh]).take(source)
        low, high = np.array(_SHIFTS_US)[rng.choice(len(_SHIFTS_US), n, p=_SHIFT_SHARES)].T
        shift = rng.integers(low, high)
        # A late trade's shifted copy could lie outside Gold's deduplication window.
        shift[(rng.random(n) < 0.5) | np.asarray(drafts["late"])[copies]] = 0
        time_us = np.array(drafts["timestamp"])
        if self._options.over_seconds:  # the spread ends now, and no trade may be newer
            shift = np.minimum(shift, arrival[copies] // 1000 * 1000 - time_us[copies])
        time_us[copies] += shift
        self.counts.duplicates_exact += int((shift == 0).sum())
        self.counts.duplicates_shifted += int((shift != 0).sum())
        return drafts.set_column(drafts.schema.get_field_index("timestamp"), "timestamp", pa.array(time_us))

    def _messages(self, drafts: pa.RecordBatch, arrival: Ints, bad: Ints) -> Messages:
        encoded = encode(drafts, self._options.schema_id)
        values: list[bytes | None] = [*encoded.values()]
        times = arrival.copy()
        for i in bad.tolist():
            reason, make = pick_defect(self.counts.bad.total())
            kafka_us = int(arrival[i]) // 1000 * 1000
            values[i] = make(ValidMessage(self._exchange, self._options.schema_id, kafka_us, encoded.row(i)))
            times[i] = kafka_time_of(reason, int(arrival[i]))
            self.counts.bad[reason.code] += 1
        symbols = drafts["symbol"].cast(pa.binary())
        return Messages(
            values, pc.if_else(drafts["keyed"], symbols, None).to_pylist(), times, drafts["route"].to_numpy()
        )


def _merged(parts: Sequence[Messages]) -> Messages:
    """Return the messages of several handlers in the order of their arrival."""
    together = Messages(
        [value for part in parts for value in part.values],
        [key for part in parts for key in part.keys],
        np.concatenate([part.time_us for part in parts]),
        np.concatenate([part.route for part in parts]),
    )
    arrivals = np.concatenate([_arrivals(part.time_us) for part in parts])
    return together.take(np.argsort(arrivals, kind="stable"))


def _arrivals(time_us: Ints) -> Ints:
    """Return Kafka's times, and for a message without one that of the message before."""
    return time_us[np.maximum.accumulate(np.where(time_us == NO_TIME_US, 0, np.arange(len(time_us))))]
