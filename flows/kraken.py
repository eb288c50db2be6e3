"""Kraken: `python -m bytewax.run flows.kraken`."""

from k2flow.exchange import Exchange
from k2flow.flow import build

EXCHANGE = Exchange(
    name="kraken",
    code="KRAKEN",
    declared={
        "topic": "market.crypto.trades.kraken",
        "partitions": 2,
        "trigger_seconds": 30,
        "processes": 1,
        "bronze_retention_days": 14,
        "bronze_file_size_mb": 64,
    },
    dense_trade_ids=True,
)

flow = build(EXCHANGE)
