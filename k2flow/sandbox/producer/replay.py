"""Sends recorded trades from a CSV file to Kafka, shifted in time so that the newest happened just now."""

import csv
import time
import uuid
import zlib
from collections import defaultdict
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pyarrow as pa
from pydantic import Field, TypeAdapter, ValidationError

from k2flow.errors import ProduceError
from k2flow.exchange import DEDUP_KEY
from k2flow.sandbox.producer.encode import encode
from k2flow.sandbox.producer.manifest import Manifest
from k2flow.sandbox.producer.send import Sender
from k2flow.sandbox.producer.stream import CHUNK, Messages
from k2flow.sandbox.producer.trades import MESSAGE_ID, VENDOR_DATA, repeated

COLUMNS = ("exchange", "symbol", "currency", "trade_id", "time_ms", "price", "quantity", "side", "kind")
MINUTE_MS = 60_000
_NAMESPACE = uuid.UUID("6ba7b812-9dad-11d1-80b4-00c04fd430c8")  # for identifiers, RFC 4122
_MAX_TIME_MS = 253_402_300_799_999  # the end of the year 9999
_DECIMALS = 8
Amount = Annotated[Decimal, Field(gt=0, max_digits=18, decimal_places=_DECIMALS)]


@dataclass(frozen=True)
class Target:
    """The destination of one exchange's trades: the value of TradeV2's field `exchange`, the topic, and Gold's key."""

    code: str
    topic: str
    dedup_key: tuple[str, ...] = DEDUP_KEY


@dataclass(frozen=True)
class RecordedTrade:
    """One line of the file. `time_ms` is since 1970."""

    symbol: str
    currency: str
    trade_id: str
    time_ms: Annotated[int, Field(ge=0, le=_MAX_TIME_MS)]
    price: Amount
    quantity: Amount
    side: Literal["BUY", "SELL"]
    kind: str


_TRADE = TypeAdapter(RecordedTrade)


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

    Return each exchange's manifest when all its messages are acknowledged. Raises ProduceError if a line is invalid
    (then nothing is sent) or messages were not delivered. Raises KafkaError if no broker answers or a topic is missing.
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

    Raises ProduceError if the file is unreadable, or a line is invalid; the message names the line.
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
    try:
        return _TRADE.validate_python(row)
    except ValidationError as error:
        first = error.errors()[0]
        raise ValueError(f"{first['loc'][0]} is {first['input']!r}: {first['msg']}") from None


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
    numbers: set[tuple[str, str]] = set()
    for first in range(0, len(trades), CHUNK):
        part = trades[first : first + CHUNK]
        part_ids = [message_id(name, trade) for trade in part]
        ids.update(part_ids)
        numbers.update((trade.symbol, trade.trade_id) for trade in part)
        values = encode(_columns(target.code, part, part_ids), schema_id).values()
        keys = [trade.symbol.encode() for trade in part]
        time_us = np.array([trade.time_ms for trade in part], np.int64) * 1000
        route = np.array([zlib.crc32(key) for key in keys], np.int64)
        sender.send(Messages([*values], [*keys], time_us, route), progress=progress)
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
        trades=len(numbers),
        dedup_key=target.dedup_key,
    )


def _columns(code: str, trades: Sequence[RecordedTrade], ids: Sequence[uuid.UUID]) -> pa.RecordBatch:
    n = len(trades)
    time_us = pa.array([trade.time_ms * 1000 for trade in trades])
    kinds = pa.array([trade.kind for trade in trades]).dictionary_encode()
    vendor_data = pa.array([{"kind": kind} for kind in kinds.dictionary.to_pylist()], VENDOR_DATA)
    columns = {
        "message_id": pa.array([one.bytes for one in ids], MESSAGE_ID),
        "trade_id": pa.array([f"{code}-{trade.trade_id}" for trade in trades]),
        "exchange": repeated(code, n),
        "symbol": pa.array([trade.symbol for trade in trades]).dictionary_encode(),
        "timestamp": time_us,
        "price": pa.array([_units(trade.price) for trade in trades]),
        "quantity": pa.array([_units(trade.quantity) for trade in trades]),
        "currency": pa.array([trade.currency for trade in trades]).dictionary_encode(),
        "side": pa.array([trade.side for trade in trades]).dictionary_encode(),
        "trade_conditions": repeated([], n),
        "source_sequence": pa.nulls(n, pa.int64()),
        "ingestion_timestamp": time_us,
        "platform_sequence": pa.nulls(n, pa.int64()),
        "vendor_data": pa.DictionaryArray.from_arrays(kinds.indices, vendor_data),
    }
    return pa.record_batch(columns)


def _units(amount: Decimal) -> int:
    """Return an amount as an integer in units of 1e-8."""
    return int(amount.scaleb(_DECIMALS))
