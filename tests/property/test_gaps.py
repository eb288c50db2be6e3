"""All holes are named, none is invented: thousands of histories of trade ids, against an oracle of sets and loops."""

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from k2flow.gaps.find import TradeRange, find_gaps
from tests.property import examples
from tests.trade_ids import BINANCE, HOUR, NOW, Trade, expect, in_memory
from tests.unit.test_gaps import as_expected

HISTORIES = examples(3_000)
MINUTE = HOUR // 60
ODD_IDS = ("", "BINANCE-", "BINANCE-007", "KRAKEN-7", "BINANCE--3", "BINANCE-9223372036854775808", "oops")


def history(chance: random.Random, symbol: str) -> list[Trade]:
    """Return the trades of one symbol: ids from anywhere, with holes of all sizes, copies, late and odd ones, mixed."""
    at = chance.choice((0, 1, 60, 1_000, 10**12, (1 << 63) - 5_000))
    rows = []
    for n in range(at, at + chance.choice((1, 2, 30, 140))):
        time = NOW + (n - at) * MINUTE + (chance.randrange(-3 * HOUR, 3 * HOUR) if chance.random() < 0.1 else 0)
        rows += [Trade(symbol, f"BINANCE-{n}", time)] * chance.choice((1, 1, 1, 2))
        if chance.random() < 0.01:
            rows.append(Trade(symbol, chance.choice(ODD_IDS), time))
    while len(rows) > 1 and chance.random() < 0.7:  # a hole
        first = chance.randrange(len(rows))
        del rows[first : first + chance.choice((1, 1, 2, 64, 128))]
    chance.shuffle(rows)
    return rows


def test_planted_holes_are_named_and_none_is_invented(seed: int) -> None:
    chance = random.Random(seed)
    rows = [trade for i in range(HISTORIES) for trade in history(chance, f"S{i:04}")]
    for wanted in (TradeRange(), TradeRange((), NOW + HOUR, NOW + 3 * HOUR)):
        found = as_expected(find_gaps(in_memory(rows), BINANCE, wanted))
        assert found == expect(rows, wanted.since_us, wanted.until_us)
        assert len(found.holes) > HISTORIES / 4


connection = in_memory([])
ids = st.integers(0, 200) | st.integers(0, (1 << 63) - 1)
texts = ids.map(lambda n: f"BINANCE-{n}") | st.sampled_from(ODD_IDS)
moments = st.integers(NOW - 3 * HOUR, NOW + 3 * HOUR)
symbols = st.sampled_from(("A", "B"))


@settings(max_examples=examples(150))
@given(
    st.lists(st.builds(Trade, symbols, texts, moments, st.sampled_from(("BINANCE", "KRAKEN")))),
    st.none() | moments,
    st.none() | moments,
)
def test_any_trades(rows: list[Trade], since: int | None, until: int | None) -> None:
    found = as_expected(find_gaps(in_memory(rows, connection), BINANCE, TradeRange((), since, until)))
    assert found == expect(rows, since, until)
