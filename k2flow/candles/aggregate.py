"""Candles of trades, and of other candles of the same minutes. Pure functions.

The total order of the trades of a minute is `timestamp`, then the length of `trade_id`, then `trade_id`, then
`message_id`, each ascending. Open is the first, close the last. Sums are exact. A sum of more than 38 digits is null.

Only trades of equal time and trade id need their message ids. Those of Gold are read without them, and the table does
not keep those of opens and closes. So an open or close is ambiguous if another trade has the same time and trade id,
but another price: then the trades must be read again, with their message ids.
"""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from k2flow.candles.exact import LIMIT, Ints, from_decimals, sums, sums_of_products, to_decimals, unscaled
from k2flow.layers import CANDLES, GOLD, HOUR_US

MINUTE_US = 60_000_000
BUY = "BUY"
TRADES = pa.schema(
    [
        GOLD.arrow_schema.field(name)
        for name in ("exchange", "symbol", "timestamp", "trade_id", "message_id", "price", "quantity", "side")
    ]
)
"""The columns of Gold that candles are made of."""
MESSAGE_IDS = ("first_message_id", "last_message_id")
PARTIAL = pa.schema([*CANDLES.arrow_schema, *(pa.field(name, pa.string()) for name in MESSAGE_IDS)])
"""The schema of candles with the message ids of open and close, which are null if they are unknown."""
KEY = ("exchange", "symbol", "open_time")
SUMS = ("volume", "quote_volume", "buy_volume")
_SMALL = 1 << 16  # groups: numpy sorts 16-bit integers several times faster
Column: TypeAlias = Any
"""An Arrow array, or numpy integers; for decimals, their unscaled values."""


class Merged(NamedTuple):
    """Candles, a row for each key, and the minutes (us since 1970) whose open or close is ambiguous."""

    candles: pa.RecordBatch
    ambiguous: frozenset[int]


class _Groups(NamedTuple):
    """Rows by group. order: (n,), the rows, those of a group together; starts: (groups,), where each begins in it."""

    order: Ints
    starts: Ints

    @property
    def sizes(self) -> Ints:
        return np.diff(self.starts, append=len(self.order))

    @property
    def group_of(self) -> Ints:
        """The group of each place in the order: (n,)."""
        found: Ints = np.repeat(np.arange(len(self.starts)), self.sizes)
        return found


def candles_of(trades: pa.RecordBatch) -> Merged:
    """Return the candles of n trades (TRADES, without nulls but those of unknown message ids), as PARTIAL."""
    if not trades.num_rows:
        return Merged(empty(), frozenset())
    times = _integers(trades.column("timestamp"))
    groups = _by_key(trades, times // MINUTE_US)
    order, starts = groups
    times = times[order]
    price, quantity = (unscaled(trades.column(name))[order] for name in ("price", "quantity"))
    bought = np.where(_booleans(pc.equal(trades.column("side"), BUY))[order], quantity, 0)
    columns: dict[str, Column] = {
        "open_time": times[starts] // MINUTE_US * MINUTE_US,
        "high": np.maximum.reduceat(price, starts).astype(object),
        "low": np.minimum.reduceat(price, starts).astype(object),
        "volume": sums(quantity, starts),
        "quote_volume": sums_of_products(price, quantity, starts),
        "buy_volume": sums(bought, starts),
        "trades": groups.sizes,
    }
    columns |= _taken(trades, order[starts], {"exchange": "exchange", "symbol": "symbol"})
    ambiguous: set[int] = set()
    for end, price_column in (("first", "open"), ("last", "close")):
        names = {price_column: "price", f"{end}_trade_id": "trade_id", f"{end}_trade_time": "timestamp"}
        rows, unclear = _at_end(trades, times, groups, last=end == "last")
        columns |= _taken(trades, rows, {**names, f"{end}_message_id": "message_id"})
        ambiguous.update((unclear // MINUTE_US * MINUTE_US).tolist())
    return Merged(_batch(columns), frozenset(ambiguous))


def merge(candles: pa.RecordBatch) -> Merged:
    """Merge candles (PARTIAL) of equal keys, whose trades are all different. Return them sorted by key."""
    candles = candles.take(pc.sort_indices(candles, [(name, "ascending") for name in KEY]))
    starts = _starts_of_sorted(candles)
    if len(starts) == candles.num_rows:
        return Merged(candles, frozenset())
    groups = _Groups(np.arange(candles.num_rows), starts)
    columns: dict[str, Column] = {
        "open_time": _integers(candles.column("open_time"))[starts],
        "high": np.maximum.reduceat(unscaled(candles.column("high")), starts).astype(object),
        "low": np.minimum.reduceat(unscaled(candles.column("low")), starts).astype(object),
        "trades": np.add.reduceat(_integers(candles.column("trades")), starts),
    }
    for name in SUMS:
        values = from_decimals(candles.column(name))
        values[_booleans(candles.column(name).is_null())] = LIMIT  # a sum that was too large stays so
        columns[name] = np.add.reduceat(values, starts)
    columns |= _taken(candles, starts, {"exchange": "exchange", "symbol": "symbol"})
    ambiguous: set[int] = set()
    for end, price in (("first", "open"), ("last", "close")):
        ids = (f"{end}_trade_time", f"{end}_trade_id", f"{end}_message_id")
        rows = _first_of_each(_order_table(candles, groups.group_of, ids), last=end == "last")
        columns |= _taken(candles, rows, {name: name for name in (price, *ids)})
        unclear = _ambiguous(candles, rows[groups.group_of], price, ids)
        ambiguous.update(_integers(candles.column("open_time"))[unclear].tolist())
    return Merged(_batch(columns), frozenset(ambiguous))


def of_table(candles: pa.RecordBatch) -> pa.RecordBatch:
    """Return candles of the table as PARTIAL: the message ids are unknown."""
    unknown = [pa.nulls(candles.num_rows, pa.string())] * len(MESSAGE_IDS)
    return pa.RecordBatch.from_arrays([*candles.columns, *unknown], schema=PARTIAL)


def empty() -> pa.RecordBatch:
    """Return no candles, as PARTIAL."""
    return pa.RecordBatch.from_arrays([pa.array([], field.type) for field in PARTIAL], schema=PARTIAL)


def _by_key(trades: pa.RecordBatch, minutes: Ints) -> _Groups:
    exchanges, symbols = (trades.column(name).dictionary_encode() for name in ("exchange", "symbol"))
    first, last = int(minutes.min()), int(minutes.max())
    span = last - first + 1
    pairs = _integers(exchanges.indices) * len(symbols.dictionary) + _integers(symbols.indices)
    keys = pairs * span + (minutes - first)
    if len(exchanges.dictionary) * len(symbols.dictionary) * span <= _SMALL:
        keys = keys.astype(np.uint16)
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    return _Groups(order, np.flatnonzero(np.append(True, ordered[1:] != ordered[:-1])))


def _at_end(trades: pa.RecordBatch, times: Ints, groups: _Groups, last: bool) -> tuple[Ints, Ints]:
    """Return the row of the first trade of each group, or of the last one, and the times of ambiguous ones.

    `times` are in the groups' order.
    """
    extreme = (np.maximum if last else np.minimum).reduceat(times, groups.starts)
    places = np.flatnonzero(times == np.repeat(extreme, groups.sizes))
    rows, group_of = groups.order[places], groups.group_of[places]
    if len(rows) == len(groups.starts):
        return rows, np.empty(0, np.int64)
    ids = ("timestamp", "trade_id", "message_id")
    tied = trades.select((*ids, "price")).take(pa.array(rows))
    chosen = _first_of_each(_order_table(tied, group_of, ids), last)
    return rows[chosen], times[places[_ambiguous(tied, chosen[group_of], "price", ids)]]


def _order_table(rows: pa.RecordBatch, group_of: Ints, ids: Sequence[str]) -> pa.RecordBatch:
    """Return the columns that put rows in order: group, then time, the id's length, the id, and the message id."""
    time, trade_id, message_id = (rows.column(name) for name in ids)
    columns = [pa.array(group_of), time, pc.utf8_length(trade_id), trade_id, message_id]
    return pa.RecordBatch.from_arrays(columns, names=["group", "time", "length", "id", "message"])


def _first_of_each(table: pa.RecordBatch, last: bool) -> Ints:
    """Return the row that is first in the order in each group, or last. Groups have numbers from 0 on."""
    order = pc.sort_indices(table, [(name, "ascending") for name in table.schema.names]).to_numpy().astype(np.int64)
    group = _integers(table.column("group"))[order]
    changes = np.flatnonzero(group[1:] != group[:-1])
    found: Ints = order[np.append(changes, len(order) - 1)] if last else order[np.append(0, changes + 1)]
    return found


def _ambiguous(rows: pa.RecordBatch, chosen: Ints, price: str, ids: Sequence[str]) -> npt.NDArray[np.bool_]:
    """Return whether each trade, or open or close, ties with the chosen one of its key, in an unknown order."""
    time, trade_id, message_id = (rows.column(name) for name in ids)
    same = pc.and_(pc.equal(time, time.take(pa.array(chosen))), pc.equal(trade_id, trade_id.take(pa.array(chosen))))
    other = pc.not_equal(rows.column(price), rows.column(price).take(pa.array(chosen)))
    unknown = _booleans(message_id.is_null())
    return _booleans(pc.and_(same, other)) & (unknown | unknown[chosen])


def _starts_of_sorted(candles: pa.RecordBatch) -> Ints:
    """Return the rows at which another key begins."""
    if not candles.num_rows:
        return np.empty(0, np.int64)
    names = [_integers(candles.column(name).dictionary_encode().indices) for name in ("exchange", "symbol")]
    keys = np.column_stack([*names, _integers(candles.column("open_time"))])
    return np.flatnonzero(np.append(True, (keys[1:] != keys[:-1]).any(axis=1)))


def _taken(rows: pa.RecordBatch, indices: Ints, names: Mapping[str, str]) -> dict[str, Column]:
    """Return columns of `rows` at some rows, by their new names."""
    return {name: rows.column(source).take(pa.array(indices)) for name, source in names.items()}


def _batch(columns: Mapping[str, Column]) -> pa.RecordBatch:
    """Return the columns as PARTIAL, with the partition that each candle belongs to."""
    hours: Ints = columns["open_time"] // HOUR_US
    partition = {"exchange_date": (hours // 24).astype(np.int32), "exchange_hour": (hours % 24).astype(np.int32)}
    every = {**columns, **partition}
    return pa.RecordBatch.from_arrays([_array(every[field.name], field.type) for field in PARTIAL], schema=PARTIAL)


def _array(column: Column, kind: pa.DataType) -> pa.Array:
    if isinstance(column, pa.Array):
        return column
    if pa.types.is_decimal(kind):
        return to_decimals(column, kind)
    return pa.array(column).cast(kind)


def _integers(column: pa.Array) -> Ints:
    values: Ints = column.cast(pa.int64()).to_numpy()
    return values


def _booleans(column: pa.Array) -> npt.NDArray[np.bool_]:
    values: npt.NDArray[np.bool_] = column.to_numpy(zero_copy_only=False)
    return values
