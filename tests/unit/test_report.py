"""The parts of a report that need no tables: axes, formats, charts, commits, pages with little data, the file."""

import math
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import duckdb
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from markupsafe import Markup

from k2flow.audit import AuditReport, Severity
from k2flow.errors import QueryError, ReportError
from k2flow.exchange import find_exchange
from k2flow.gaps.find import Gap, SymbolGaps
from k2flow.iceberg.ledger import CommittedRange, FormerTopic, Ledger
from k2flow.layers import GOLD_TABLE
from k2flow.report import check_writable, formats, queries, render, write
from k2flow.report.axes import DAY_US, SECOND_US, STEPS_US, Axis, axis, time_ticks, value_ticks, without_outliers
from k2flow.report.charts import WIDTH, Bar, Line, bars, candles, columns, histogram, lines
from k2flow.report.figures import (
    Candle,
    DeadLetterReason,
    Delays,
    ExchangeGaps,
    Figures,
    FileStats,
    MarketCandles,
    RowCounts,
    Unavailable,
    attempt,
)
from k2flow.report.freshness import Commit, commits, freshness
from k2flow.report.queries import ReportSource

NOW_US = 1_764_000_000_000_000
HOSTILE = "<script>alert(1)</script>\"'&]]>\x00\x1b\u202e\ud800"
SHOWN = "<script>alert(1)</script>\"'&]]>����"
TIMES = st.integers(-62_135_596_800_000_000, 253_402_300_799_999_999)  # years 1 to 9999

Svg = ElementTree.Element


def parsed(chart: Markup) -> Svg:
    """Parse a chart, which must be well-formed, with all marks inside, a title and a description."""
    svg = ElementTree.fromstring(chart)
    *_, width, height = map(float, svg.attrib["viewBox"].split())
    for mark in svg.iter():
        for name, value in mark.attrib.items():
            if name in ("x", "x1", "x2", "cx", "y", "y1", "y2", "cy", "width", "height"):
                assert math.isfinite(float(value))
                assert -0.1 <= float(value) <= (width if name in ("x", "x1", "x2", "cx", "width") else height) + 0.1
    title, description = svg[0], svg[1]
    assert (title.tag, description.tag) == ("title", "desc")
    assert svg.attrib["aria-labelledby"] == f"{title.attrib['id']} {description.attrib['id']}"
    assert title.text
    assert description.text
    return svg


def marks(svg: Svg, wanted: str) -> list[Svg]:
    """Return the marks of a class."""
    return [mark for mark in svg.iter() if wanted in mark.attrib.get("class", "").split()]


def tips(found: Sequence[Svg]) -> list[str]:
    return [mark.findtext("title", "") for mark in found]


@given(TIMES, TIMES, st.integers(1, 300))
@example(NOW_US, NOW_US, 1)
def test_axis_covers_all_in_at_most_the_given_steps(first: int, last: int, most: int) -> None:
    first, last = sorted((first, last))
    found = axis(first, last, most + 1)
    assert found.begin_us <= first < found.begin_us + found.step_us
    assert found.end_us - found.step_us <= last < found.end_us
    assert found.steps <= most + 1
    assert found.begin_us % found.step_us == 0
    assert len(time_ticks(found.begin_us, found.end_us, most + 1)) <= most + 1
    assert formats.moment(found.begin_us) <= formats.moment(found.end_us)
    if found.step_us > STEPS_US[0]:
        shorter = max((step for step in STEPS_US if step < found.step_us), default=0)
        assert last // shorter - first // shorter + 1 > most + 1


def test_axis_keeps_its_shortest_step() -> None:
    assert axis(NOW_US, NOW_US + 10, 100, SECOND_US) == Axis(NOW_US, SECOND_US, 1)
    assert axis(NOW_US, NOW_US + 199 * SECOND_US, 200) == Axis(NOW_US, SECOND_US, 200)
    assert axis(NOW_US, NOW_US + 200 * SECOND_US, 200) == Axis(NOW_US, 2 * SECOND_US, 101)


def test_outliers_do_not_stretch_an_axis() -> None:
    assert without_outliers(0, 10, 90, 100) == (0, 100)
    assert without_outliers(-DAY_US, 10, 90, 100) == (10, 90)
    assert without_outliers(0, 10, 90, DAY_US) == (10, 90)
    assert without_outliers(5, 5, 5, 5) == (5, 5)


@given(st.floats(-1e12, 1e12), st.floats(0, 1e12), st.sampled_from([0.0, 1.0]))
@example(0.0, 0.0, 0.0)
@example(0.0, 0.0, 1.0)
@example(64_000.0, 0.0, 0.0)
@example(0.0, 1e-8, 0.0)
@example(8532204896.55425388, 1.9e-7, 0.0)
@example(5e-324, 5e-324, 0.0)
def test_ticks_hold_all_values(low: float, room: float, least: float) -> None:
    high = low + room
    ticks = value_ticks(low, high, least)
    tolerance = (ticks[1] - ticks[0]) * 1e-6
    assert 2 <= len(ticks) <= 7
    assert ticks == sorted(set(ticks))
    assert ticks[0] <= low + tolerance
    assert ticks[-1] >= high - tolerance
    assert all(b - a >= least for a, b in pairwise(ticks))


def test_time_labels_are_as_fine_as_the_ticks() -> None:
    ten = 10 * SECOND_US
    assert time_ticks(NOW_US, NOW_US + 3 * ten, 4) == [
        (NOW_US + i * ten, f"16:00:{i * 10:02}") for i in range(4)
    ]  # fmt: skip
    assert [text for _, text in time_ticks(NOW_US + 1, NOW_US + 400_000, 2)] == ["16:00:00.200", "16:00:00.400"]
    assert [text for _, text in time_ticks(NOW_US, NOW_US + DAY_US, 4)] == ["11-25", "12:00"]
    assert [text for _, text in time_ticks(NOW_US, NOW_US + 4 * DAY_US, 4)] == [f"2025-11-{n}" for n in (26, 28)]
    assert len(time_ticks(NOW_US, NOW_US, 4)) <= 4


def test_formats() -> None:
    assert formats.clean(HOSTILE) == SHOWN
    assert [formats.duration(s) for s in (None, 0, 0.0123, 1.0, 119.96, 300, 86_400, 864_000)] == [
        "unknown", "0 s", "12 ms", "1 s", "120 s", "5 min", "24 h", "10 d",
    ]  # fmt: skip
    assert [formats.compact(n) for n in (0, 0.25, 999, 1_500, 25e6)] == ["0", "0.25", "999", "1.5k", "25M"]
    assert [formats.amount(Decimal(n)) for n in ("64000.50000000", "1000.00000000", "0.00000001", "100")] == [
        "64,000.5", "1,000", "0.00000001", "100",
    ]  # fmt: skip
    assert [formats.size(n) for n in (0, 1023, 1024, 1 << 27, 3 << 29)] == [
        "0 B",
        "1023 B",
        "1 KiB",
        "128 MiB",
        "1.5 GiB",
    ]
    assert [formats.step(n) for n in (20_000, SECOND_US, 300 * SECOND_US, 7 * DAY_US)] == [
        "20 ms",
        "1 s",
        "5 min",
        "7 d",
    ]
    assert formats.moment(NOW_US + 5_000, fractions=True) == "2025-11-24 16:00:00.005"
    assert formats.moment(-1) == "1969-12-31 23:59:59"


def test_columns_are_stacked() -> None:
    svg = parsed(columns("c", HOSTILE, Axis(NOW_US, SECOND_US, 3), {"binance": [1, 0, 4], HOSTILE: [3, 0, 0]}))
    first, second, third = marks(svg, "fill")
    assert tips([first, second, third]) == [
        "2025-11-24 16:00:00: binance 1",
        f"2025-11-24 16:00:00: {SHOWN} 3",
        "2025-11-24 16:00:02: binance 4",
    ]
    assert svg[0].text == SHOWN
    heights = [float(mark.attrib["height"]) for mark in (first, second, third)]
    assert heights == pytest.approx([heights[2] / 4, heights[2] * 3 / 4, heights[2]], abs=0.2)
    assert float(second.attrib["y"]) + heights[1] == pytest.approx(float(first.attrib["y"]), abs=0.2)
    assert float(first.attrib["x"]) == float(second.attrib["x"]) < float(third.attrib["x"])
    assert marks(parsed(columns("c", "none", Axis(0, SECOND_US, 2), {"binance": [0, 0]})), "fill") == []


def test_lines_have_gaps_and_points() -> None:
    values = {0: 1.0, 1: 2.0, 5: 0.0, 8: 2.0}
    svg = parsed(lines("l", "t", Axis(NOW_US, SECOND_US, 9), [Line("median", 0, values), Line("none", 1, {})]))
    (run,) = [mark for mark in svg if mark.tag == "polyline"]
    assert len(run.attrib["points"].split()) == 2
    points = marks(svg, "point")
    assert tips(points) == [
        f"2025-11-24 16:00:0{step}: median {formats.duration(value)}" for step, value in values.items()
    ]  # fmt: skip
    bottom = max(float(mark.attrib["y1"]) for mark in marks(svg, "grid"))
    assert float(points[2].attrib["cy"]) == bottom
    assert points[1].attrib["cy"] == points[3].attrib["cy"]
    constant = parsed(lines("l", "t", Axis(0, 1, 1), [Line("zero", 0, {0: 0.0}, dashed=True)]))
    assert [mark.attrib["cy"] for mark in marks(constant, "point")] == [f"{bottom:g}"]
    assert "dashed" in marks(constant, "point")[0].attrib["class"]


def test_bars() -> None:
    svg = parsed(bars("b", "t", [Bar(HOSTILE, {0: 30, 1: 10}), Bar("x" * 100, {1: 0})], ["binance", "kraken"]))
    first, second, third = marks(svg, "fill")
    assert tips([first, second]) == [f"{SHOWN}: binance 30", f"{SHOWN}: kraken 10"]
    assert float(first.attrib["width"]) == pytest.approx(3 * float(second.attrib["width"]), abs=0.5)
    assert float(third.attrib["width"]) == 0
    assert [mark.text for mark in marks(svg, "value")] == ["40", "0"]
    assert [mark.text for mark in marks(svg, "label")] == [formats.clean(HOSTILE[:31]) + "…", "x" * 31 + "…"]
    parsed(bars("b", "t", [], []))


def test_histogram() -> None:
    mib = 1 << 20
    svg = parsed(histogram("h", "t", {13: 7, 20: 1, 27: 2}, 128 * mib))
    assert tips(marks(svg, "fill")) == [
        "8 KiB to 16 KiB: 7 files", "1 MiB to 2 MiB: 1 files", "128 MiB to 256 MiB: 2 files",
    ]  # fmt: skip
    assert [len(marks(svg, name)) for name in ("small", "well")] == [2, 1]
    (goal,) = marks(svg, "goal")
    assert goal.findtext("title") == "target size: 128 MiB"
    (well,) = marks(svg, "well")
    assert float(goal.attrib["x1"]) < float(well.attrib["x"])
    parsed(histogram("h", "t", {}, 256 * mib))


def candle(*prices: str, volume: str = "1") -> Candle:
    return Candle(*map(Decimal, prices), Decimal(volume), 2)  # type: ignore[arg-type]


def test_candles() -> None:
    found = {0: candle("10", "14", "9", "13", volume="4"), 3: candle("13", "13.5", "8", "9", volume="1")}
    svg = parsed(candles("k", HOSTILE, Axis(NOW_US, SECOND_US, 4), found))
    up, down = marks(svg, "body")
    assert ("up" in up.attrib["class"], "down" in down.attrib["class"]) == (True, True)
    assert tips([up])[0] == ("2025-11-24 16:00:00: open 10, high 14, low 9, close 13, volume 4, 2 trades")
    assert float(up.attrib["y"]) == float(down.attrib["y"])  # one closed where the other opened
    assert float(down.attrib["height"]) == pytest.approx(float(up.attrib["height"]) * 4 / 3, abs=0.2)
    volumes = [float(mark.attrib["height"]) for mark in marks(svg, "volume")]
    assert volumes == pytest.approx([volumes[0], volumes[0] / 4], abs=0.1)
    wick = marks(svg, "wick")[0].attrib["d"]
    assert float(wick.split("M")[1].split(" ")[1].split("V")[0]) < float(up.attrib["y"])


@pytest.mark.parametrize("price", ["0", "0.00000001", "64000", "9999999999.99999999"])
def test_constant_price_is_drawn(price: str) -> None:
    found = {0: candle(*[price] * 4, volume="0")}
    (body,) = marks(parsed(candles("k", "t", Axis(NOW_US, 1_000, 1), found)), "body")
    assert float(body.attrib["height"]) == 1
    assert 0 < float(body.attrib["x"]) < WIDTH


def ledger(
    sequence: int, at: int, partitions: dict[int, tuple[int, int]], earlier: tuple[FormerTopic, ...] = ()
) -> Ledger:
    extents = {p: CommittedRange(first, end, end - first) for p, (first, end) in partitions.items()}
    return Ledger("t", "id", 1, sequence, None, at, extents, earlier)


def test_commits_are_the_differences_of_ledgers() -> None:
    past = [
        ledger(1, 1_000, {}),
        ledger(2, 2_000, {0: (5, 10)}),
        ledger(3, 3_000, {0: (5, 10), 1: (0, 3)}),
        ledger(4, 4_000, {0: (5, 12), 1: (0, 3)}),
    ]
    found = commits("binance", "gold", past)
    assert found == [
        Commit("binance", "gold", 0, 5, 10, 2_000_000, 0),
        Commit("binance", "gold", 1, 0, 3, 3_000_000, 0),
        Commit("binance", "gold", 0, 10, 12, 4_000_000, 0),
    ]
    assert commits("binance", "gold", past[1:]) == found[1:]  # the time of the first one is no longer known
    again = ledger(5, 9_000, {0: (0, 1)}, (FormerTopic("old", 8_000, {}),))
    assert commits("binance", "gold", [ledger(4, 8_500, {}), again]) == [
        Commit("binance", "gold", 0, 0, 1, 9_000_000, 8_000_000)
    ]
    assert commits("binance", "gold", past[:1]) == []


def failing() -> int:
    raise QueryError("why it failed")


UNAVAILABLE = Unavailable("why it failed")
ALL_UNAVAILABLE = Figures(
    created_us=NOW_US,
    catalog=[("uri", "sqlite:///x.db")],
    exchanges=[find_exchange("binance"), find_exchange("kraken")],
    symbols=(),
    **dict.fromkeys(("status", "rows", "ingested", "traded", "freshness", "reasons", "markets", "gaps"), UNAVAILABLE),
    files=dict.fromkeys([*find_exchange("binance").tables, *find_exchange("kraken").tables], UNAVAILABLE),
)


def test_unavailable_figures_are_shown_in_their_sections() -> None:
    assert attempt(failing) == UNAVAILABLE
    page = render(ALL_UNAVAILABLE, UNAVAILABLE)
    assert page.startswith("<!DOCTYPE html>")
    for section in ("flows", "throughput", "freshness", "candles", "gaps", "dead-letters", "tables", "audit"):
        part = page[page.index(f'<section id="{section}"') :].partition("</section>")[0]
        assert "why it failed" in part, section
    assert "<svg" not in page
    assert page.rstrip().endswith("</html>")


def test_missing_and_empty_tables_are_shown_in_their_sections() -> None:
    exchanges = ALL_UNAVAILABLE.exchanges
    empty = FileStats(
        snapshot_id=None,
        committed_us=None,
        rows=0,
        files=0,
        small=0,
        bytes=0,
        median_bytes=0,
        target_bytes=1 << 27,
        snapshots=0,
        histogram={},
    )
    none = dict.fromkeys(("bronze", "silver", "dlq", "gold"), None)
    figures = replace(
        ALL_UNAVAILABLE,
        rows={"binance": dict.fromkeys(none, 0), "kraken": none},
        ingested=None, traded=None, freshness=None, reasons=[], markets=[], gaps=[],
        files={name: None if "kraken" in name else empty for name in ALL_UNAVAILABLE.files},
        symbols=["NO<b>"],
    )  # fmt: skip
    page = render(figures, None)
    assert page.count("Table bronze_kraken_trades does not exist.") == 2  # for throughput and for freshness
    assert page.count("Table dlq_kraken_trades does not exist.") == 1
    assert "There are no dead letters." in page
    assert "There are no trades of NO&lt;b&gt;." in page
    assert "The audit was skipped" in page
    without_gold = replace(figures, exchanges=exchanges[1:], files={**figures.files, GOLD_TABLE: None}, symbols=())
    page = render(without_gold, AuditReport("2026-01-31T12:00:00+00:00"))
    assert f"Table {GOLD_TABLE} does not exist." in page
    assert "There are no dead letters." not in page
    assert "All invariants hold." in page


def test_text_from_messages_is_escaped() -> None:
    """In tables, in charts, and in the audit's findings."""
    time = Axis(NOW_US, SECOND_US, 1)
    price = candle("1", "2", "0.5", "1")
    hole = Gap(symbol=HOSTILE, first=2, last=3, after_us=NOW_US, before_us=None)
    figures = replace(
        ALL_UNAVAILABLE,
        catalog=[("uri", HOSTILE)],
        ingested=RowCounts(time, {"binance": [1], "kraken": [0]}, 3),
        reasons=[DeadLetterReason("binance", HOSTILE, 2, NOW_US, HOSTILE)],
        markets=[MarketCandles("binance", HOSTILE, 2, time, {0: price}, 1)],
        gaps=[ExchangeGaps("binance", {HOSTILE: SymbolGaps(1, 2, 1, 4)}, [hole], 3)],
        files={**ALL_UNAVAILABLE.files, GOLD_TABLE: Unavailable(HOSTILE)},
    )
    found = AuditReport("2026-01-31T12:00:00+00:00")
    found.add("wrong", Severity.BROKEN, HOSTILE, table=HOSTILE, samples=[{HOSTILE: HOSTILE}])
    page = render(figures, found)
    assert "An invariant is broken." in page
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 14
    assert not set(HOSTILE[-4:]) & set(page)
    page.encode()


def test_page_is_written_atomically(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    check_writable(path)
    write(path, "one")
    write(path, "two é")
    assert path.read_text("utf-8") == "two é"
    link = tmp_path / "link.html"
    link.symlink_to(path)
    write(link, "three")
    assert (link.is_symlink(), path.read_text()) == (True, "three")
    with pytest.raises(UnicodeEncodeError):
        write(path, "\ud800")
    assert path.read_text() == "three"
    assert sorted(each.name for each in tmp_path.iterdir()) == ["link.html", "report.html"]


def test_unwritable_file_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for path, why in {
        tmp_path: "is a folder: name a file",
        tmp_path / "no" / "report.html": "cannot be written: No such file or directory; name another file",
        tmp_path / "file" / "report.html": "cannot be written: Not a directory; name another file",
    }.items():
        with pytest.raises(ReportError, match=why):
            check_writable(path)
    with pytest.raises(ReportError, match="No such file or directory"):
        write(tmp_path / "no" / "report.html", "text")
    with pytest.raises(ReportError, match="Not a directory"):
        write(tmp_path / "file" / "report.html", "text")


BRONZE = "bronze_binance_trades"


def in_memory(*rows: tuple[int, int, int, int | None]) -> duckdb.DuckDBPyConnection:
    """Bronze of Binance: partition, offset, time of ingestion and Kafka time (us since 1970)."""
    db = duckdb.connect()
    db.execute("SET TimeZone = 'UTC'")
    db.execute(
        f'CREATE TABLE {BRONZE} ("partition" INT, "offset" BIGINT, ingestion_timestamp TIMESTAMPTZ, '
        "kafka_timestamp TIMESTAMPTZ)"
    )
    sql = f"INSERT INTO {BRONZE} VALUES (?, ?, make_timestamptz(?), make_timestamptz(?))"
    for row in rows:
        db.execute(sql, row)
    return db


def source(db: duckdb.DuckDBPyConnection, tables: Sequence[str] = (BRONZE,)) -> ReportSource:
    return ReportSource(db, [find_exchange("binance")], tables)


def test_outliers_at_both_ends_are_left_out() -> None:
    """The extreme times on both sides are left out, then the outliers among the rest."""
    usual = [NOW_US + i * SECOND_US for i in range(100)]
    outliers = [-62_135_596_800_000_000, 253_402_300_799_999_999, NOW_US - 30 * DAY_US, NOW_US + 30 * DAY_US]
    db = in_memory(*((0, 0, us, None) for us in [*usual, *outliers]))
    found = queries.ingested(source(db))
    assert found == RowCounts(Axis(NOW_US, SECOND_US, 100), {"binance": [1] * 100}, 4)
    many = [*usual, *[NOW_US - 300 * DAY_US] * 10]  # too many to be outliers
    db = in_memory(*((0, 0, us, None) for us in many))
    found = queries.ingested(source(db))
    assert found
    assert (found.outside, sum(found.rows["binance"]), found.rows["binance"][0]) == (0, 110, 10)
    assert queries.ingested(source(in_memory())) is None
    assert queries.ingested(source(in_memory(), tables=())) is None


def test_delays_are_of_the_committed_messages() -> None:
    """Messages before the first known commit, of an earlier topic, without a time, or without a commit do not count."""
    second = SECOND_US
    known = [
        Commit("binance", "bronze", 0, 10, 12, 100 * second, 5 * second),
        Commit("binance", "bronze", 0, 12, 13, 200 * second, 5 * second),
        Commit("binance", "gold", 0, 10, 13, 300 * second, 5 * second),
        Commit("binance", "bronze", 1, 0, 1, 200 * second, 5 * second),
    ]
    db = in_memory(
        (0, 9, 50 * second, 1 * second),
        (0, 10, 50 * second, 1 * second),
        (0, 11, 50 * second, 98_765_000),
        (0, 12, 50 * second, None),
        (0, 13, 50 * second, 1 * second),
        (0, 10, 4 * second, 1 * second),
        (1, 0, 50 * second, 201 * second),  # from the future
        (1, 10, 50 * second, 1 * second),
    )
    found = freshness(source(db), known)
    assert found
    assert found.total == {
        ("binance", "bronze"): Delays(3, 1_240, 99_000, 99_000),
        ("binance", "gold"): Delays(2, 202_000, 299_000, 299_000),
    }
    by_time = {
        found.axis.begin_us + step * found.axis.step_us: each for step, each in found.steps["binance", "bronze"].items()
    }
    assert by_time == {100 * second: Delays(2, 1_240, 99_000, 99_000), 200 * second: Delays(1, 0, 0, 0)}
    assert freshness(source(db), []) is None
    assert freshness(source(db, tables=()), known) is None
    assert freshness(source(in_memory()), known) is None
