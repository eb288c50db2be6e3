"""Holes in trade ids: which ids parse, what a hole is, symbols, ranges of time, and how they are shown."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest

from k2flow.cli import gaps as command
from k2flow.errors import QueryError, SettingsError
from k2flow.gaps.find import MARGIN_US, FoundGaps, SymbolGaps, TradeRange, find_gaps, iso
from k2flow.layers import MAX_TIME_US, MIN_TIME_US
from tests.trade_ids import BINANCE, NOW, Expected, Hole, Trade, expect, in_memory

SECOND = 1_000_000


def trades(symbol: str, *ids: int, exchange: str = "BINANCE") -> list[Trade]:
    """Return trades, the one with id n at NOW + n seconds."""
    return [Trade(symbol, f"{exchange}-{n}", NOW + n * SECOND, exchange) for n in ids]


def found(rows: Sequence[Trade], wanted: TradeRange = TradeRange()) -> FoundGaps:  # noqa: B008 - it is frozen
    return find_gaps(in_memory(rows), BINANCE, wanted)


def as_expected(result: FoundGaps) -> Expected:
    """Return what was found in the form of the oracle; the sums by symbol must be those of the holes."""
    holes = [Hole(g.symbol, g.first, g.last, g.after_us, g.before_us) for g in result.gaps()]
    for name, its in result.symbols.items():
        own = [hole for hole in holes if hole.symbol == name]
        assert (its.holes, its.missing) == (len(own), sum(hole.last - hole.first + 1 for hole in own))
    return Expected(holes, {name: (its.first, its.last) for name, its in result.symbols.items()}, result.unparsed)


def test_holes_of_each_symbol() -> None:
    rows = [
        *trades("BTCUSDT", 10, 11, 14, 15, 200),
        *trades("ETHUSDT", 7),
        *trades("SOLUSDT", 5, 4, 3, 4, 5),
        *trades("BTCUSDT", 12, exchange="KRAKEN"),
    ]
    result = found(rows)
    assert as_expected(result) == Expected(
        [
            Hole("BTCUSDT", 12, 13, NOW + 11 * SECOND, NOW + 14 * SECOND),
            Hole("BTCUSDT", 16, 199, NOW + 15 * SECOND, NOW + 200 * SECOND),
        ],
        {"BTCUSDT": (10, 200), "ETHUSDT": (7, 7), "SOLUSDT": (3, 5)},
        0,
    )
    assert result.symbols["BTCUSDT"] == SymbolGaps(2, 186, 10, 200)
    assert result.symbols["BTCUSDT"].share == 186 / 191
    assert [(gap.first, gap.missing) for gap in result.gaps(largest=1)] == [(16, 184)]


@pytest.mark.parametrize(
    "text",
    [
        "", None, "BINANCE-", "BINANCE", "7", "KRAKEN-7", "binance-7", "BINANCE-7 ", " BINANCE-7", "BINANCE- 7",
        "BINANCE-+7", "BINANCE--7", "BINANCE--0", "BINANCE-07", "BINANCE-00", "BINANCE-7.0", "BINANCE-7e1",
        "BINANCE-0x7", "BINANCE-1_0", "BINANCE-٧", "BINANCE-7\0", "BINANCE-9223372036854775808", "BINANCE-" + "9" * 40,
        "BINANCE_7", "BINANCES-7", "BINANCE-T7", "💥INANCE-7",
    ],
)  # fmt: skip
def test_other_ids_are_counted_and_never_dropped(text: str | None) -> None:
    result = found([*trades("BTCUSDT", 1, 2), Trade("BTCUSDT", text), Trade("ONLY", text)])
    assert as_expected(result) == Expected([], {"BTCUSDT": (1, 2)}, 2)
    assert list(result.examples) == [text, text]


def test_trade_without_symbol_is_counted() -> None:
    assert found([*trades("BTCUSDT", 1, 2), Trade(None, "BINANCE-4")]).unparsed == 1


def test_ids_of_63_bits() -> None:
    top = (1 << 63) - 1
    result = found([*(Trade("A", f"BINANCE-{n}") for n in (0, 2, 63, 64, 129, top - 64, top)), *trades("B", 0)])
    assert as_expected(result) == expect(
        [Trade("A", f"BINANCE-{n}") for n in (0, 2, 63, 64, 129, top - 64, top)] + trades("B", 0)
    )
    assert result.symbols["A"] == SymbolGaps(5, top + 1 - 7, 0, top)
    both = found([*(Trade(s, f"BINANCE-{n}") for s in "AB" for n in (0, top))])
    assert sum(its.missing for its in both.symbols.values()) == 2 * (top - 1)  # more than 63 bits


def test_copies_of_a_trade_are_no_hole_and_the_earliest_has_its_time() -> None:
    rows = [*trades("A", 1, 2, 4), Trade("A", "BINANCE-2", NOW), Trade("A", "BINANCE-4", None)]
    (gap,) = found(rows).gaps()
    assert (gap.first, gap.last, gap.after_us, gap.before_us) == (3, 3, NOW, NOW + 4 * SECOND)


def test_no_trades_are_no_holes() -> None:
    result = found([])
    assert as_expected(result) == Expected([], {}, 0)
    assert result.holes == 0


def test_range_of_time_is_half_open() -> None:
    rows = trades("A", 1, 3, 5, 7, 9)
    result = found(rows, TradeRange((), NOW + 3 * SECOND, NOW + 7 * SECOND))
    assert as_expected(result) == Expected([Hole("A", 4, 4, NOW + 3 * SECOND, NOW + 5 * SECOND)], {"A": (3, 5)}, 0)
    since = found(rows, TradeRange(since_us=NOW + 5 * SECOND))
    assert since.symbols == {"A": SymbolGaps(2, 2, 5, 9)}
    until = found(rows, TradeRange(until_us=NOW + 5 * SECOND))
    assert until.symbols == {"A": SymbolGaps(1, 1, 1, 3)}
    none = found(rows, TradeRange((), NOW + 100 * SECOND, NOW + 101 * SECOND))
    assert as_expected(none) == Expected([], {}, 0)


def test_id_that_gold_has_just_outside_of_the_range_is_not_missing() -> None:
    """Ids are not always in the order of time."""
    rows = [*trades("A", 1, 2, 4), Trade("A", "BINANCE-3", NOW - MARGIN_US), Trade("A", "oops", NOW - 1)]
    assert as_expected(found(rows, TradeRange(since_us=NOW))) == Expected([], {"A": (1, 4)}, 0)
    rows[3] = Trade("A", "BINANCE-3", NOW - MARGIN_US - 1)
    assert found(rows, TradeRange(since_us=NOW)).holes == 1
    assert found(rows).holes == 0


def test_range_may_reach_the_ends_of_time() -> None:
    rows = [Trade("A", "BINANCE-1", MIN_TIME_US), Trade("A", "BINANCE-3", MAX_TIME_US)]
    (gap,) = found(rows, TradeRange(since_us=MIN_TIME_US)).gaps()
    assert [iso(gap.after_us), iso(gap.before_us)] == ["0001-01-01T00:00:00+00:00", "9999-12-31T23:59:59.999999+00:00"]
    assert found(rows, TradeRange(until_us=MAX_TIME_US)).symbols == {"A": SymbolGaps(0, 0, 1, 1)}
    assert iso(MAX_TIME_US + 1) is iso(None) is None


def test_wanted_symbols_only() -> None:
    rows = [*trades("A", 1, 3), *trades("B", 1, 3), *trades("it's", 1, 4), Trade("B", "oops")]
    assert found(rows, TradeRange(("A",))).symbols.keys() == {"A"}
    assert found(rows, TradeRange(("A",))).unparsed == 0
    assert found(rows, TradeRange(("it's", "B"))).symbols.keys() == {"B", "it's"}
    with pytest.raises(QueryError, match="has no trade of C, D of binance, or none in this time: check the symbol"):
        found(rows, TradeRange(("A", "D", "C")))
    with pytest.raises(QueryError, match="has no trade of A of binance"):
        found(rows, TradeRange(("A",), since_us=NOW + 10 * SECOND))


def test_exchange_without_dense_ids_is_refused() -> None:
    sparse = replace(BINANCE, dense_trade_ids=False)
    with pytest.raises(SettingsError, match=r"binance does not declare dense_trade_ids: .* in flows/binance\.py"):
        find_gaps(in_memory([]), sparse, TradeRange())


def shown(rows: Sequence[Trade], capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], list[str]]:
    """Return the JSON and the lines of text that the command prints."""
    result = found(rows)
    command._print_json(BINANCE, result)
    printed = json.loads(capsys.readouterr().out)
    command._print_text(BINANCE, result)
    return printed, capsys.readouterr().out.splitlines()


def test_output(capsys: pytest.CaptureFixture[str]) -> None:
    printed, lines = shown([*trades("A", 1, 2, 5), *trades("\x1b[31mB", 1, 3), Trade("A", "oops\x1b")], capsys)
    assert printed == {
        "exchange": "binance",
        "gaps": [
            {
                "symbol": "\x1b[31mB", "first": 2, "last": 2, "missing": 1,
                "after": "2025-11-24T16:00:01+00:00", "before": "2025-11-24T16:00:03+00:00",
            },
            {
                "symbol": "A", "first": 3, "last": 4, "missing": 2,
                "after": "2025-11-24T16:00:02+00:00", "before": "2025-11-24T16:00:05+00:00",
            },
        ],
        "symbols": {
            "\x1b[31mB": {"holes": 1, "missing": 1, "first": 1, "last": 3},
            "A": {"holes": 1, "missing": 2, "first": 1, "last": 5},
        },
        "unparsed": 1,
    }  # fmt: skip
    assert lines[0].split() == ["symbol", "first", "last", "missing", "trade", "before", "it", "trade", "after", "it"]
    assert lines[1].split() == [r"\x1b[31mB", "2", "2", "1", "2025-11-24T16:00:01+00:00", "2025-11-24T16:00:03+00:00"]
    assert lines[2].split() == ["A", "3", "4", "2", "2025-11-24T16:00:02+00:00", "2025-11-24T16:00:05+00:00"]
    assert lines[3] == ""
    assert [row.strip("│").split("│") for row in map(str.strip, lines) if row.startswith("│ A")] == [
        [" A         ", "     1 ", "       2 ", "   40 % ", "        1 ", "       5 "]
    ]
    assert lines[-1] == r"1 trades are not checked: their ids are no BINANCE-<integer>: 'oops\x1b'"
    assert "\x1b" not in "".join(lines)


def test_output_without_trades(capsys: pytest.CaptureFixture[str]) -> None:
    printed, lines = shown([], capsys)
    assert printed == {"exchange": "binance", "gaps": [], "symbols": {}, "unparsed": 0}
    assert lines == ["there are no trades of binance to check"]


def test_times_without_a_zone_are_utc() -> None:
    assert command._us(None) is None
    assert command._us(datetime(2025, 11, 24, 16)) == NOW == command._us(datetime(2025, 11, 24, 16, tzinfo=UTC))
    assert command._us(datetime.fromisoformat("0001-01-01T00:00:00+05:00")) == MIN_TIME_US
    assert command._us(datetime.fromisoformat("9999-12-31T23:59:59-05:00")) == MAX_TIME_US
