"""Candles are exactly those of an oracle in plain Python, whatever happens to Gold and to the flow."""

import random
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pyiceberg.catalog import Catalog

from k2flow.candles import updating
from k2flow.candles.aggregate import TRADES, candles_of, merge, of_table
from k2flow.errors import CommitError
from k2flow.flow.candles import CandlesProcess, CandlesSinkPartition
from k2flow.iceberg.catalog import load_table
from k2flow.layers import CANDLES, CANDLES_TABLE, GOLD_TABLE
from tests.candles import assert_candles_of, candles_of_rows, rows_by_key
from tests.property.test_changes import FIRST_HOUR, History

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
STEPS = 25
AMOUNTS = st.one_of(
    st.integers(1, 3), st.integers(1, 10**18 - 1), st.just(10**18 - 1)
).map(lambda unscaled: Decimal(unscaled).scaleb(-8))  # fmt: skip
TRADE = st.fixed_dictionaries(
    {
        "exchange": st.sampled_from(["BINANCE", "KRAKEN"]),
        "symbol": st.sampled_from(["BTCUSDT", "ETHUSDT"]),
        "timestamp": st.sampled_from([0, 1, 59, 60, 61, 3599]).map(lambda second: NOON + timedelta(seconds=second)),
        "trade_id": st.sampled_from(["9", "10", "x", "é", "zz", "09"]),
        "price": AMOUNTS,
        "quantity": AMOUNTS,
        "side": st.sampled_from(["BUY", "SELL", "SELL_SHORT"]),
    }
)


def batch_of(trades: list[dict[str, Any]]) -> pa.RecordBatch:
    return pa.RecordBatch.from_pylist([{name: trade[name] for name in TRADES.names} for trade in trades], TRADES)


@given(
    st.lists(TRADE, min_size=1, max_size=60), st.integers(0, 60), st.integers(0, 60), st.randoms(use_true_random=False)
)
def test_candles_of_trades_and_of_candles(
    trades: list[dict[str, Any]], cut: int, stored: int, chance: random.Random
) -> None:
    """Trades come in two parts. The first part is in the table already or not."""
    ids = [f"m{i}" for i in range(len(trades))]
    chance.shuffle(ids)
    rows = [{**trade, "message_id": message_id} for trade, message_id in zip(trades, ids, strict=True)]
    parts = candles_of(batch_of(rows[:cut])), candles_of(batch_of(rows[cut:]))
    assert not any(part.ambiguous for part in parts)
    first, second = (part.candles for part in parts)
    whole = merge(pa.concat_batches([first, second]))
    expected = candles_of_rows(rows)
    assert not whole.ambiguous
    assert rows_by_key(whole.candles.select(CANDLES.columns).to_pylist()) == expected
    of_both = merge(pa.concat_batches([of_table(first.select(CANDLES.columns)), second]))
    found = rows_by_key(of_both.candles.select(CANDLES.columns).to_pylist())
    ambiguous = {datetime.fromtimestamp(us / 1e6, UTC) for us in of_both.ambiguous}
    assert {k: v for k, v in found.items() if k[2] not in ambiguous} == {
        k: v for k, v in expected.items() if k[2] not in ambiguous
    }


@given(st.lists(TRADE, min_size=1, max_size=60), st.integers(0, 60))
def test_candles_of_trades_whose_message_ids_are_unknown(trades: list[dict[str, Any]], cut: int) -> None:
    """A candle that depends on the ids is ambiguous: their order is that of the trades here, or the opposite."""
    rows = [{**trade, "message_id": None} for trade in trades]
    parts = [candles_of(batch_of(some)) for some in (rows[:cut], rows[cut:])]
    candles, ambiguous = merge(pa.concat_batches([part.candles for part in parts]))
    unclear = {datetime.fromtimestamp(us / 1e6, UTC) for us in ambiguous.union(*(part.ambiguous for part in parts))}
    found = rows_by_key(candles.select(CANDLES.columns).to_pylist())
    for step in (1, -1):
        expected = candles_of_rows({**trade, "message_id": f"{i * step + 100:03}"} for i, trade in enumerate(trades))
        assert found.keys() == expected.keys()
        assert all(found[key] == candle for key, candle in expected.items() if key[2] not in unclear)


class TradeHistory(History):
    """A random history of Gold. Its rows are whole trades with few times and ids, ties are frequent."""

    def append(self) -> None:
        chance, n = self._chance, self._chance.randint(1, 6)
        exchange = chance.choice(("binance", "kraken"))
        hours = np.array([FIRST_HOUR + chance.randrange(2) for _ in range(n)])
        seconds = [int(hour) * 3600 + chance.choice((0, 59, 61)) for hour in hours]
        amounts = [Decimal(chance.choice((1, 2, 10**18 - 1))).scaleb(-8) for _ in range(2 * n)]
        self.gold.start(exchange, "accept")
        self.gold.add(
            exchange,
            hours,
            timestamp=pa.array([second * 10**6 for second in seconds]).cast(pa.timestamp("us", "UTC")),
            trade_id=pa.array([chance.choice(("9", "10", "a")) for _ in range(n)]),
            symbol=pa.array([chance.choice(("BTC", "BTC", "ETH")) for _ in range(n)]),
            price=pa.array(amounts[:n], pa.decimal128(18, 8)),
            quantity=pa.array(amounts[n:], pa.decimal128(18, 8)),
            side=pa.array([chance.choice(("BUY", "SELL")) for _ in range(n)]),
        )


class Flow:
    """The candles flow without Bytewax: each `step` is an epoch."""

    def __init__(self, catalog: Catalog) -> None:
        self.process = CandlesProcess()
        self.process.__dict__["catalog"] = catalog
        self.process.open(1)
        self.sink = CandlesSinkPartition(self.process)

    def step(self) -> bool:
        """Return whether there was an update."""
        update = self.process.update()
        self.sink.write_batch([update])
        self.sink.snapshot()
        return update is not None


@pytest.mark.parametrize("number", [0, 1, *(pytest.param(n, marks=pytest.mark.slow) for n in range(2, 8))])
def test_the_table_follows_gold(catalog: Catalog, seed: int, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Appends, late trades, compaction, replaced and removed rows, other programs, rollbacks, restarts of the flow."""
    history = TradeHistory(catalog, seed + number)
    chance = random.Random(seed + number)
    flow = Flow(catalog)
    for _ in range(STEPS):
        history.step(history.own + history.foreign if chance.random() < 0.3 else history.own)
        if chance.random() < 0.2:
            flow = Flow(catalog)
        if chance.random() < 0.2:
            roll_back_candles(catalog, chance)
            flow = Flow(catalog)
        monkeypatch.setattr(updating, "MAX_TRADES", chance.choice((3, 10, 1_000)))
        if chance.random() < 0.2:
            flow.step()
        if chance.random() < 0.2:
            load_table(catalog, CANDLES_TABLE).delete("symbol = 'ETH'")
            with suppress(CommitError):
                flow.step()
            flow = Flow(catalog)
        if chance.random() < 0.6:
            while flow.step():
                pass
            assert_candles_of(load_table(catalog, CANDLES_TABLE), load_table(catalog, GOLD_TABLE))


def roll_back_candles(catalog: Catalog, chance: random.Random) -> None:
    table = load_table(catalog, CANDLES_TABLE)
    if table.metadata.snapshots:
        earlier = chance.choice(table.metadata.snapshots).snapshot_id
        table.manage_snapshots().set_current_snapshot(snapshot_id=earlier).commit()
