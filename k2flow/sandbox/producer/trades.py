"""Trades as an Arrow batch, before they are encoded.

Times are microseconds since 1970, prices and quantities integers in units of 1e-8. The columns are named as the fields
of TradeV2; `asset_class` is missing, because it is always `crypto`.

    message_id                              fixed_size_binary(16), the bytes of a UUID
    trade_id                                string
    exchange, symbol, currency, side        dictionary of strings
    trade_conditions                        dictionary of lists of strings
    vendor_data                             dictionary of maps or null
    source_sequence, platform_sequence      int64 or null
    timestamp, ingestion_timestamp, price, quantity     int64
"""

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
UNIT = 100_000_000  # the number of units in 1: prices and quantities are integers in units of 1e-8
MESSAGE_ID = pa.binary(16)
VENDOR_DATA = pa.map_(pa.string(), pa.string())
SIDES = pa.array(["SELL", "BUY"])


def repeated(value: str | list[str], n: int) -> pa.DictionaryArray:
    """Return a dictionary column of n times the same text or list of texts."""
    kind = pa.string() if isinstance(value, str) else pa.list_(pa.string())
    return pa.DictionaryArray.from_arrays(np.zeros(n, np.int64), pa.array([value], kind))
