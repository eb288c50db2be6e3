"""Trades as columns, before they are encoded."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import numpy as np
import numpy.typing as npt
import pyarrow as pa

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]
Bytes = npt.NDArray[np.uint8]
Value = TypeVar("Value")

UNIT = 100_000_000
"""Prices and quantities are integers in units of 1e-8."""


@dataclass(frozen=True)
class DictionaryColumn(Generic[Value]):
    """A dictionary-encoded column: row i holds `values[codes[i]]`."""

    values: Sequence[Value]
    codes: Ints

    def take(self, rows: Ints) -> "DictionaryColumn[Value]":
        """Return these rows, in this order."""
        return DictionaryColumn(self.values, self.codes[rows])

    def after(self, earlier: "DictionaryColumn[Value]") -> "DictionaryColumn[Value]":
        """Return `earlier`, which has the same values, followed by this column."""
        return DictionaryColumn(self.values, np.concatenate([earlier.codes, self.codes]))


@dataclass(frozen=True)
class Trades:
    """n valid trades of one exchange; times are microseconds since 1970, amounts integers in units of 1e-8.

    `message_id` (n, 16) holds the bytes of UUIDs; `buy` is the side of the aggressor; `platform_sequence` and
    `source_sequence` are null where negative, `vendor_data` where None.
    """

    exchange: str
    message_id: Bytes
    trade_id: pa.StringArray
    symbol: DictionaryColumn[str]
    timestamp: Ints
    price: Ints
    quantity: Ints
    currency: DictionaryColumn[str]
    buy: Bools
    conditions: DictionaryColumn[tuple[str, ...]]
    source_sequence: Ints
    ingestion_timestamp: Ints
    platform_sequence: Ints
    vendor_data: DictionaryColumn[Mapping[str, str] | None]

    def __len__(self) -> int:
        return len(self.timestamp)

    def after(self, earlier: "Trades") -> "Trades":
        """Return `earlier`, trades of the same market, followed by these."""
        return Trades(
            self.exchange,
            np.concatenate([earlier.message_id, self.message_id]),
            pa.concat_arrays([earlier.trade_id, self.trade_id]),
            self.symbol.after(earlier.symbol),
            np.concatenate([earlier.timestamp, self.timestamp]),
            np.concatenate([earlier.price, self.price]),
            np.concatenate([earlier.quantity, self.quantity]),
            self.currency.after(earlier.currency),
            np.concatenate([earlier.buy, self.buy]),
            self.conditions.after(earlier.conditions),
            np.concatenate([earlier.source_sequence, self.source_sequence]),
            np.concatenate([earlier.ingestion_timestamp, self.ingestion_timestamp]),
            np.concatenate([earlier.platform_sequence, self.platform_sequence]),
            self.vendor_data.after(earlier.vendor_data),
        )

    def take(self, rows: Ints) -> "Trades":
        """Return the trades of these rows, in this order."""
        return Trades(
            self.exchange,
            self.message_id[rows],
            self.trade_id.take(pa.array(rows)),
            self.symbol.take(rows),
            self.timestamp[rows],
            self.price[rows],
            self.quantity[rows],
            self.currency.take(rows),
            self.buy[rows],
            self.conditions.take(rows),
            self.source_sequence[rows],
            self.ingestion_timestamp[rows],
            self.platform_sequence[rows],
            self.vendor_data.take(rows),
        )
