"""Sends recorded trades from a CSV file to Kafka, shifted in time so that the newest happened just now."""

import csv
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal, InvalidOperation
from fractions import Fraction
from pathlib import Path

import numpy as np
import pyarrow as pa

from k2flow.errors import ProduceError
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.manifest import Manifest
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import CHUNK, Messages
from k2flow.sandbox.producer.trades import UNIT, DictionaryColumn, Trades

COLUMNS = ("exchange", "symbol", "currency", "trade_id", "time_ms", "price", "quantity", "side", "kind")
MINUTE_MS = 60_000
_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")  # for identifiers, RFC 4122
_MAX_TIME_MS = 253_402_300_799_999  # the end of the year 9999
_DIGITS, _DECIMALS = 18, 8


@dataclass(frozen=True)
class Target:
    """The destination of one exchange's trades: the value of TradeV2's field `exchange`, and the Kafka topic."""

    code: str
    topic: str


@dataclass(frozen=True)
class RecordedTrade:
    """One line of the file. `time_ms` is since 1970; amounts are integers in units of 1e-8."""

    symbol: str
    currency: str
    trade_id: str
    time_ms: int
    price: int
    quantity: int
    buy: bool
    kind: str


def replay(
    csv_path: Path,
    targets: Mapping[str, Target],
    kafka_config: Mapping[str, str],
    schema_id: int = 1,
    end: datetime | None = None,
    progress: Callable[[int], None] | None = None,
) -> dict[str, Manifest]:
    """Send the trades of the exchanges in `targets`, named as in the file (`kraken`); skip other exchanges.

    The trades of each (exchange, symbol, kind) shift by a whole number of minutes: minutes stay minutes, and the newest
    trade lies in the last minute before `end` (default: now). The Kafka timestamp is the shifted time. A message id
    depends on (exchange, symbol, kind, trade_id) alone, so that a second replay sends duplicates.

    Returns:
        The manifest of each exchange, when all its messages are acknowledged.

    Raises:
        ProduceError: a line is invalid (then nothing is sent), or messages were not delivered.
        KafkaError: no broker answers, or a topic does not exist.
    """
    end_ms = int((end or datetime.now(UTC)).timestamp() * 1000)
    found = read_trades(csv_path, targets.keys())
    if not found:
        raise ProduceError(f"{csv_path} has no trade of {', '.join(targets) or 'any exchange'}: name another file")
    senders = {name: Sender(kafka_config, targets[name].topic) for name in found}
    return {
        name: _send(senders[name], name, targets[name], shift_to_end(trades, end_ms), schema_id, progress)
        for name, trades in found.items()
    }


def read_trades(csv_path: Path, exchanges: Collection[str]) -> dict[str, list[RecordedTrade]]:
    """Return the trades of these exchanges, in the order of the file.

    Raises:
        ProduceError: the file is unreadable, or a line is invalid; the message names the line.
    """
    found: dict[str, list[RecordedTrade]] = defaultdict(list)
    try:
        with csv_path.open(newline="", encoding="utf-8") as file:
            rows = csv.DictReader(file, restval="")
            missing = [name for name in COLUMNS if name not in (rows.fieldnames or ())]
            if missing:
                raise ProduceError(f"{csv_path}, line 1: no column {', '.join(missing)}")
            for row in rows:
                try:
                    trade = _recorded(row)
                except ValueError as error:
                    raise ProduceError(f"{csv_path}, line {rows.line_num}: {error}") from None
                if row["exchange"] in exchanges:
                    found[row["exchange"]].append(trade)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ProduceError(f"{csv_path} cannot be read: {error}") from error
    return dict(found)


def _recorded(row: Mapping[str, str]) -> RecordedTrade:
    """Parse a line. Raises ValueError, which names the column."""
    for name in COLUMNS:
        if not row[name].strip():
            raise ValueError(f"{name} is empty")
    if row["side"] not in ("BUY", "SELL"):
        raise ValueError(f"side is {row['side']!r}, not BUY or SELL")
    try:
        time_ms = int(row["time_ms"])
    except ValueError:
        time_ms = -1
    if not 0 <= time_ms <= _MAX_TIME_MS:
        raise ValueError(f"time_ms is {row['time_ms']!r}, not milliseconds since 1970")
    return RecordedTrade(
        row["symbol"],
        row["currency"],
        row["trade_id"],
        time_ms,
        _units("price", row["price"]),
        _units("quantity", row["quantity"]),
        row["side"] == "BUY",
        row["kind"],
    )


def _units(name: str, text: str) -> int:
    """Parse a positive decimal(18, 8) into its unscaled integer, without rounding. Raises ValueError."""
    try:
        amount = Decimal(text)
    except InvalidOperation:
        amount = Decimal("NaN")
    if amount.is_finite() and amount > 0 and -_DECIMALS <= amount.adjusted() < _DIGITS - _DECIMALS:
        units = Fraction(amount) * UNIT  # exact, unlike Decimal's product
        if units.denominator == 1:
            return int(units)
    raise ValueError(f"{name} is {text!r}, not a positive number with 10 digits before the point and 8 after")


def shift_to_end(trades: Sequence[RecordedTrade], end_ms: int) -> list[RecordedTrade]:
    """Return one exchange's trades by time, each (symbol, kind) shifted to end in the minute before `end_ms`."""
    newest: dict[tuple[str, str], int] = defaultdict(int)
    for trade in trades:
        group = (trade.symbol, trade.kind)
        newest[group] = max(newest[group], trade.time_ms)
    shift = {group: (end_ms - last) // MINUTE_MS * MINUTE_MS for group, last in newest.items()}
    now = [replace(trade, time_ms=trade.time_ms + shift[trade.symbol, trade.kind]) for trade in trades]
    return sorted(now, key=lambda trade: trade.time_ms)


def message_id(exchange: str, trade: RecordedTrade) -> uuid.UUID:
    """Return the message id of a recorded trade, the same in every replay."""
    return uuid.uuid5(_NAMESPACE, "|".join((exchange, trade.symbol, trade.kind, trade.trade_id)))


def _send(
    sender: Sender,
    name: str,
    target: Target,
    trades: list[RecordedTrade],
    schema_id: int,
    progress: Callable[[int], None] | None,
) -> Manifest:
    started, clock = datetime.now(UTC), time.monotonic()
    ids: set[uuid.UUID] = set()
    for first in range(0, len(trades), CHUNK):
        part = trades[first : first + CHUNK]
        part_ids = [message_id(name, trade) for trade in part]
        ids.update(part_ids)
        columns = _columns(target.code, part, part_ids)
        keys = [trade.symbol.encode() for trade in part]
        route = np.array([zlib.crc32(key) for key in keys], np.int64)
        sender.send(
            Messages([*encode(columns, schema_id).values()], [*keys], columns.timestamp, route),
            progress=progress,
        )
    return Manifest(
        exchange=target.code,
        topic=target.topic,
        schema_id=schema_id,
        seed=None,
        partitions=sender.finish(),
        started=started.isoformat(),
        ended=datetime.now(UTC).isoformat(),
        seconds=round(time.monotonic() - clock, 3),
        originals=len(ids),
        duplicates_exact=len(trades) - len(ids),
        duplicates_shifted=0,
        bad={},
    )


def _columns(code: str, trades: Sequence[RecordedTrade], ids: Sequence[uuid.UUID]) -> Trades:
    n = len(trades)
    time_us = np.array([trade.time_ms for trade in trades], np.int64) * 1000
    none = np.full(n, -1)
    kinds = _dictionary([trade.kind for trade in trades])
    return Trades(
        exchange=code,
        message_id=np.frombuffer(b"".join(one.bytes for one in ids), np.uint8).reshape(n, 16),
        trade_id=pa.array([f"{code}-{trade.trade_id}" for trade in trades], pa.string()),
        symbol=_dictionary([trade.symbol for trade in trades]),
        timestamp=time_us,
        price=np.array([trade.price for trade in trades], np.int64),
        quantity=np.array([trade.quantity for trade in trades], np.int64),
        currency=_dictionary([trade.currency for trade in trades]),
        buy=np.array([trade.buy for trade in trades], bool),
        conditions=DictionaryColumn(((),), np.zeros(n, np.int64)),
        source_sequence=none,
        ingestion_timestamp=time_us,
        platform_sequence=none,
        vendor_data=DictionaryColumn([{"kind": kind} for kind in kinds.values], kinds.codes),
    )


def _dictionary(texts: Sequence[str]) -> DictionaryColumn[str]:
    position: dict[str, int] = {}
    codes = [position.setdefault(text, len(position)) for text in texts]
    return DictionaryColumn(tuple(position), np.array(codes, np.int64))
