"""The status of the candles flow: how far the candle table is behind Gold, from the metadata of both tables.

Lag in seconds is the age of Gold's oldest commit that the candles lack. If that snapshot has expired, it is the time
since the candles were last equal to Gold, which may be longer.
"""

from collections.abc import Sequence

from pyiceberg.table.metadata import TableMetadata

from k2flow.candles.updating import position_of
from k2flow.iceberg.ledger import Ledger
from k2flow.iceberg.snapshots import head_number
from k2flow.layers import CANDLES_TABLE
from k2flow.status.flows import level, rate, rows_of
from k2flow.status.model import CandlesStatus, FlowStatus


def candles_status(
    gold: TableMetadata | None,
    past: Sequence[Ledger],
    flow: FlowStatus,
    trigger_seconds: float,
    now_ms: int,
    problems: Sequence[str] = (),
) -> CandlesStatus:
    """Return the status of the candles; `past` are the ledgers of their table, oldest first, none without a table."""
    held, newest = _held(gold, past), head_number(gold) if gold else None
    seconds = _lag_seconds(gold, held, past, now_ms) if gold and past else None
    recent = rate(past, now_ms, trigger_seconds) if past else None
    return CandlesStatus(
        table=CANDLES_TABLE,
        trigger_seconds=trigger_seconds,
        flow=flow,
        level=level(seconds, trigger_seconds),
        sequence_number=held,
        gold_sequence_number=newest,
        lag=max(0, newest - (held or 0)) if past and newest is not None else None,
        lag_seconds=seconds,
        trades=rows_of(past[-1]) if past else 0,
        trades_per_second=recent.rows if recent else None,
        rate_over_seconds=recent.over_seconds if recent else None,
        committed_at=past[-1].committed_at or None if past else None,
        problems=tuple(problems),
    )


def _held(gold: TableMetadata | None, past: Sequence[Ledger]) -> int | None:
    """Return the sequence number of Gold that the candles are of; None before the first commit of this Gold."""
    position = position_of(past[-1]) if past else None
    if position is None or (gold and position.table_uuid != gold.table_uuid):
        return None
    return position.sequence_number


def _lag_seconds(gold: TableMetadata, held: int | None, past: Sequence[Ledger], now_ms: int) -> float:
    newest, first = head_number(gold), (held or 0) + 1
    if newest < first:
        return 0.0
    times = {
        s.sequence_number or 0: s.timestamp_ms for s in gold.snapshots if first <= (s.sequence_number or 0) <= newest
    }
    since = min(times.values(), default=now_ms)
    if first not in times and held is not None:
        since = min(since, *(each.committed_at for each in past if each.partitions == past[-1].partitions))
    return max(0.0, (now_ms - since) / 1000)
