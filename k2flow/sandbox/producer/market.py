"""A simulated market: its trading pairs, and the arrival times, prices, quantities and delays of its trades."""

import itertools
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.sandbox.producer.trades import MESSAGE_ID, SIDES, UNIT, VENDOR_DATA, Bools, Ints, repeated

MINUTE_US = 60_000_000
HOUR_US = 60 * MINUTE_US
DAY_US = 24 * HOUR_US
_DAYS_LATE = 0.02  # of the late ones
_MAX_LATE_US = 12 * HOUR_US
_MAX_DAYS_LATE_US = 7 * DAY_US
_BURST_TRADES = 40
_MAX_USD = 2_000_000.0
_CONDITIONS = pa.array([[], ["MAKER"], ["TAKER", "IOC"], ["BLOCK"], ["LIQUIDATION"], ["BLOCK", "OTC", "LATE"]])
_CONDITION_SHARES = (0.9, 0.04, 0.03, 0.01, 0.015, 0.005)
_TRADE_DATA = [
    {"event_type": event, "is_buyer_maker": maker, "match_engine": f"m{engine}", "order_type": order}
    for event, maker, engine, order in itertools.product(
        ("trade", "aggTrade"), ("true", "false"), range(4), ("market", "limit", "stop")
    )
]
_VENDOR_DATA = pa.array([None, *_TRADE_DATA, {"note": "öffnende Auktion ≥ 1 lot"}, {}], VENDOR_DATA)
_VENDOR_DATA_SHARE = 0.3
_USD = {
    "BTC": 64_000.0, "ETH": 3_100.0, "SOL": 145.0, "XRP": 0.58, "BNB": 580.0, "DOGE": 0.16, "ADA": 0.46,
    "AVAX": 36.0, "LINK": 15.2, "SUI": 1.1, "TRX": 0.12, "DOT": 6.8, "LTC": 83.0, "NEAR": 6.9, "BCH": 470.0,
    "UNI": 9.8, "ATOM": 8.4, "ETC": 27.0, "FIL": 5.9, "APT": 8.9, "ARB": 1.05, "OP": 2.6, "INJ": 24.0,
    "AAVE": 95.0, "MKR": 2_700.0, "XLM": 0.11, "HBAR": 0.098, "ICP": 12.4, "RUNE": 5.9, "TIA": 9.5,
    "SEI": 0.52, "ALGO": 0.18, "EGLD": 40.0, "GRT": 0.29, "SAND": 0.44, "LDO": 2.1, "CRV": 0.43, "ENS": 24.5,
}  # fmt: skip
_PER_USD = {"USD": 1.0, "USDT": 1.0, "USDC": 1.0, "FDUSD": 1.0, "EUR": 0.92, "BTC": 1 / 64_000.0, "ETH": 1 / 3_100.0}


@dataclass(frozen=True)
class Listing:
    """A trading pair. Its price starts at `price`, in `currency`; `usd` is the same in US dollars."""

    symbol: str
    currency: str
    price: float
    usd: float


def _listings(exchange: str) -> tuple[Listing, ...]:
    """Return the pairs of an exchange (its code), the busiest first; an unknown exchange trades in USD."""
    if exchange == "BINANCE":
        pairs = [(base, "USDT") for base in _USD]
        pairs[4:4] = [("BTC", "FDUSD"), ("BTC", "USDC")]
        pairs[12:12] = [("ETH", "BTC"), ("ETH", "USDC"), ("SOL", "USDC"), ("BNB", "BTC"), ("SOL", "ETH")]
    elif exchange == "KRAKEN":
        pairs = [(base, "USD") for base in _USD if base != "BNB"]
        pairs[2:2] = [("BTC", "EUR"), ("ETH", "EUR")]
        pairs[7:7] = [("SOL", "EUR"), ("XRP", "EUR"), ("ETH", "BTC"), ("BTC", "USDT")]
    else:
        pairs = [(base, "USD") for base in _USD]
    return tuple(
        Listing(f"{base}{currency}", currency, _USD[base] * _PER_USD[currency], _USD[base]) for base, currency in pairs
    )


class Market:
    """One exchange's market. Each symbol's price walk continues from call to call; `rng` is the only randomness.

    `late` is the share of trades that come minutes, hours or days late.
    """

    def __init__(self, exchange: str, rng: np.random.Generator, start_us: int, late: float) -> None:
        self._exchange = exchange
        self._rng = rng
        self._late = late
        pairs = _listings(exchange)
        self.symbols = tuple(pair.symbol for pair in pairs)
        self._currencies = pa.array([pair.currency for pair in pairs]).dictionary_encode()
        count = len(pairs)
        weights = 1 / np.arange(1, count + 1)  # Zipf
        self._cumulative = np.cumsum(weights / weights.sum())
        start_price = np.array([pair.price for pair in pairs])
        self._log_price = np.log(start_price)
        self._volatility = rng.uniform(0.4e-4, 2e-4, count)
        self._tick = np.maximum(1, 10 ** np.floor(np.log10(start_price * UNIT) - 5)).astype(np.int64)
        self._usd_price = np.array([pair.usd for pair in pairs])
        self._lot = 10 ** np.clip(np.round(np.log10(UNIT / self._usd_price)), 0, 8).astype(np.int64)
        self._sequence = rng.integers(10**8, 10**9, count)
        self._trade_id_shift = start_us - 1 - self._sequence  # ids are consecutive, and a later run has later ones
        self._produced = 0

    def arrivals(self, count: int, start_us: float, span_us: float) -> Ints:
        """Return the Kafka times of `count` trades within `span_us` after `start_us`, ascending, in bursts."""
        runs = count // _BURST_TRADES + 1
        pace = self._rng.lognormal(0, 1, runs)
        run = np.cumsum(self._rng.random(count) < 1 / _BURST_TRADES) % runs
        gaps = self._rng.exponential(1, count) * pace[run]
        times: Ints = (start_us + np.cumsum(gaps) * (span_us / gaps.sum())).astype(np.int64)
        return times

    def trades(self, arrival_us: Ints) -> tuple[pa.RecordBatch, Bools]:
        """Return a valid trade for each arrival, see trades.py, and which are late, by minutes, hours or days."""
        n, rng = len(arrival_us), self._rng
        symbol = np.minimum(np.searchsorted(self._cumulative, rng.random(n)), len(self.symbols) - 1)
        buy = rng.random(n) < 0.5
        price, sequence = self._price_walk(symbol, buy)
        delay, late = self._delays(n)
        received = np.minimum(rng.lognormal(6.5, 0.6, n), 50_000).astype(np.int64)
        numbers = np.arange(self._produced, self._produced + n)
        self._produced += n
        vendor = np.where(rng.random(n) < _VENDOR_DATA_SHARE, rng.integers(1, len(_VENDOR_DATA), n), 0)
        coded = pa.DictionaryArray.from_arrays
        columns = {
            "message_id": message_ids(rng, n),
            "trade_id": _numbered(self._exchange, self._trade_id_shift[symbol] + sequence),
            "exchange": repeated(self._exchange, n),
            "symbol": coded(symbol, self.symbols),
            "timestamp": arrival_us // 1000 * 1000 - delay - received,
            "price": price,
            "quantity": self._quantities(symbol),
            "currency": self._currencies.take(symbol),
            "side": coded(buy.astype(np.int64), SIDES),
            "trade_conditions": coded(rng.choice(len(_CONDITIONS), n, p=_CONDITION_SHARES), _CONDITIONS),
            "source_sequence": sequence,
            "ingestion_timestamp": arrival_us // 1000 * 1000 - received,
            "platform_sequence": pa.array(numbers, mask=rng.random(n) < 0.1),
            "vendor_data": coded(vendor, _VENDOR_DATA),
        }
        return pa.record_batch(columns), late

    def _price_walk(self, symbol: Ints, buy: Bools) -> tuple[Ints, Ints]:
        """Return prices and sequence numbers of n trades; each symbol continues from its last ones."""
        order = np.argsort(symbol, kind="stable")
        sorted_symbol = symbol[order]
        first = np.searchsorted(sorted_symbol, np.arange(len(self.symbols)))
        trend = np.where(buy, 0.2, -0.2)  # buyers push the price up
        steps = (self._rng.standard_normal(len(symbol)) + trend)[order] * self._volatility[sorted_symbol]
        total = np.concatenate([[0.0], np.cumsum(steps)])
        log_price = self._log_price[sorted_symbol] + total[1:] - total[first[sorted_symbol]]
        number = np.arange(len(symbol)) - first[sorted_symbol] + 1
        tick = self._tick[sorted_symbol]
        units = np.maximum(np.round(np.exp(log_price) * UNIT / tick).astype(np.int64), 1) * tick
        price, sequence = np.empty(len(symbol), np.int64), np.empty(len(symbol), np.int64)
        price[order] = units
        sequence[order] = self._sequence[sorted_symbol] + number
        self._log_price[sorted_symbol] = log_price  # the last value of each symbol remains
        self._sequence += np.bincount(symbol, minlength=len(self.symbols))
        return price, sequence

    def _quantities(self, symbol: Ints) -> Ints:
        """Return sizes by value: lognormal, with a Pareto tail for one trade in fifty."""
        n = len(symbol)
        usd = self._rng.lognormal(5.5, 1.6, n)
        whales = self._rng.random(n) < 0.02
        usd[whales] *= 1 + self._rng.pareto(1.3, int(whales.sum()))
        amount = np.minimum(usd, _MAX_USD) / self._usd_price[symbol]
        lot = self._lot[symbol]  # worth about a dollar
        quantity: Ints = np.maximum(np.round(amount * UNIT / lot).astype(np.int64), 1) * lot
        return quantity

    def _delays(self, n: int) -> tuple[Ints, Bools]:
        """Return microseconds from trade to receipt: some ms, so that trades overtake each other; a few far more."""
        rng = self._rng
        delay = rng.lognormal(9, 0.8, n)  # median 8 ms
        straggling = rng.random(n) < 0.01
        delay[straggling] += rng.uniform(50_000, 1_500_000, int(straggling.sum()))
        fate = rng.random(n)
        days_late = fate < self._late * _DAYS_LATE
        late = fate < self._late
        spread = rng.random(int(late.sum()))
        delay[late] = MINUTE_US * (_MAX_LATE_US / MINUTE_US) ** spread
        delay[days_late] = rng.uniform(DAY_US, _MAX_DAYS_LATE_US, int(days_late.sum()))
        return delay.astype(np.int64), late


def message_ids(rng: np.random.Generator, n: int) -> pa.FixedSizeBinaryArray:
    """Return n random UUIDs of version 4."""
    ids = rng.integers(0, 256, (n, 16), np.uint8)
    ids[:, 6] = ids[:, 6] & 0x0F | 0x40
    ids[:, 8] = ids[:, 8] & 0x3F | 0x80
    return pa.Array.from_buffers(MESSAGE_ID, n, [None, pa.py_buffer(ids)])


def _numbered(exchange: str, numbers: Ints) -> pa.StringArray:
    return pc.binary_join_element_wise(pa.scalar(exchange), pa.array(numbers).cast(pa.string()), pa.scalar("-"))
