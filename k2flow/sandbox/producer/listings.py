"""The trading pairs of the simulated market."""

from dataclasses import dataclass

_USD = {
    "BTC": 64_000.0, "ETH": 3_100.0, "SOL": 145.0, "XRP": 0.58, "BNB": 580.0, "DOGE": 0.16, "ADA": 0.46,
    "AVAX": 36.0, "LINK": 15.2, "SUI": 1.1, "TRX": 0.12, "DOT": 6.8, "LTC": 83.0, "NEAR": 6.9, "BCH": 470.0,
    "UNI": 9.8, "ATOM": 8.4, "ETC": 27.0, "FIL": 5.9, "APT": 8.9, "ARB": 1.05, "OP": 2.6, "INJ": 24.0,
    "AAVE": 95.0, "MKR": 2_700.0, "XLM": 0.11, "HBAR": 0.098, "ICP": 12.4, "RUNE": 5.9, "TIA": 9.5,
    "SEI": 0.52, "ALGO": 0.18, "EGLD": 40.0, "GRT": 0.29, "SAND": 0.44, "LDO": 2.1, "CRV": 0.43, "ENS": 24.5,
}  # fmt: skip
_PER_USD = {
    "USD": 1.0,
    "USDT": 1.0,
    "USDC": 1.0,
    "FDUSD": 1.0,
    "EUR": 0.92,
    "BTC": 1 / 64_000.0,
    "ETH": 1 / 3_100.0,
}


@dataclass(frozen=True)
class Listing:
    """A trading pair. Its price starts at `price`, in `currency`; `usd` is the same in US dollars."""

    symbol: str
    currency: str
    price: float
    usd: float


def listings(exchange: str) -> tuple[Listing, ...]:
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
