"""Binance: `python -m bytewax.run flows.binance`."""

from k2flow.exchange import Exchange
from k2flow.flow import build

EXCHANGE = Exchange(
    name="binance",
    code="BINANCE",
    declared={
        "topic": "market.crypto.trades.binance",
        "partitions": 6,
        "trigger_seconds": 10,
        "processes": 3,
        "bronze_retention_days": 7,
        "bronze_file_size_mb": 128,
    },
    dense_trade_ids=True,
)

flow = build(EXCHANGE)
