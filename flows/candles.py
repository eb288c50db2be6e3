"""One-minute candles of all exchanges: `python -m bytewax.run flows.candles`."""

from k2flow.flow.candles import build_candles

flow = build_candles()
