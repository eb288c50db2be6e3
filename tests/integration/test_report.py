"""`k2flow report`: its page shows the tables' content and what is unavailable, and is safe to open in a browser."""

import json
import re
import shutil
import subprocess
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from html.parser import HTMLParser
from pathlib import Path

import duckdb
import numpy as np
import pytest
from confluent_kafka import Producer
from PIL import Image
from typer.testing import CliRunner

from k2flow.cli import report as command
from k2flow.cli.commands import app
from k2flow.exchange import find_exchange
from k2flow.gaps.find import TradeRange, find_gaps
from k2flow.iceberg.ledger import KEY
from k2flow.inspection import pinned as snapshots
from k2flow.layers import CANDLES_TABLE, GOLD_TABLE
from k2flow.query.connection import connect_to
from k2flow.report import formats
from k2flow.sandbox.kafka.local import LocalKafka
from tests.integration import damage
from tests.integration.conftest import fill
from tests.integration.harness import Lake, batches
from tests.messages import value

pytestmark = pytest.mark.xdist_group("report")

HOSTILE = '<script>document.title="x"</script><img src="https://example.com/x.png" onerror="y()">'
NOWHERE = "127.0.0.1:9"  # nothing listens there
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
BLUE = (37, 99, 235)
"""The first series' colour in the style sheet."""
STEPS_US = {"ms": 1_000, "s": 1_000_000, "min": 60_000_000, "h": 3_600_000_000, "d": 86_400_000_000}


class Page(HTMLParser):
    """A parsed page: elements with their attributes, tables by id, tooltips by chart id, text by section."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.tips: dict[str, list[str]] = defaultdict(list)
        self.sections: dict[str, str] = defaultdict(str)
        self._open: list[tuple[str, str]] = []
        self.feed(text)
        assert [tag for tag, _ in self._open] == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        attributes = dict(attrs)
        self.elements.append((tag, attributes))
        if tag == "meta":
            return
        self._open.append((tag, attributes.get("id") or ""))
        if tag == "table":
            self.tables[attributes["id"] or ""] = []
        if tag == "tr":
            self.tables[self._inside("table")].append([])
        if tag in ("td", "th"):
            self.tables[self._inside("table")][-1].append("")
        if tag == "title" and self._open[-2][0] != "svg":
            self.tips[self._inside("svg")].append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop()[0] == tag

    def handle_data(self, data: str) -> None:
        tags = [tag for tag, _ in self._open]
        if "table" in tags and ("td" in tags or "th" in tags):
            self.tables[self._inside("table")][-1][-1] += data.strip("\n")
        if tags[-1:] == ["title"] and "svg" in tags and tags[-2] != "svg":
            self.tips[self._inside("svg")][-1] += data
        self.sections[self._inside("section")] += data

    def _inside(self, tag: str) -> str:
        """Return the id of the innermost open element of a kind."""
        return next((name for kind, name in reversed(self._open) if kind == tag), "")

    def body(self, table: str) -> list[list[str]]:
        return self.tables[table][1:]


@pytest.fixture(scope="module")
def lake(kafka: LocalKafka, tmp_path_factory: pytest.TempPathFactory) -> Lake:
    """Binance's tables after several commits, with hostile messages; no tables of Kraken's."""
    topic = f"binance.{uuid.uuid4().hex}"
    kafka.start({topic: 3})
    lake = Lake("binance", topic, tmp_path_factory.mktemp("reported") / "lake", kafka.bootstrap)
    fill(lake, count=3_000, bad=0.05, duplicates=0.03, seed=7)
    now_us = time.time_ns() // 1_000
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    times = {"timestamp": now_us, "ingestion_timestamp": now_us}
    producer.produce(topic, value(symbol=HOSTILE, **times), partition=0)
    old = {"symbol": "OLD", "timestamp": now_us - 5 * STEPS_US["h"], "message_id": str(uuid.uuid4())}
    producer.produce(topic, value(**{**times, **old}), partition=1)
    for partition in range(3):  # one of them is the newest dead letter
        producer.produce(topic, value(exchange=HOSTILE, **times), partition=partition)
    assert producer.flush(30) == 0
    lake.catch_up(**batches(800))
    return lake


@pytest.fixture
def report(lake: Lake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., tuple[int, Page]]]:
    """Write a report as the command does; return its exit code and page. The next test finds the tables restored."""
    monkeypatch.setattr(command, "find_exchange", lambda name: replace(find_exchange(name)))  # settings are read again
    monkeypatch.setattr(command, "set_up_logging", lambda level: None)  # the log of other tests stays as it is
    monkeypatch.setattr(snapshots, "WAIT_SECONDS", 0.2)  # no flow is about to commit what a ledger lacks
    for name, setting in lake.environment(K2FLOW_KRAKEN_TOPIC=f"none.{uuid.uuid4().hex}").items():
        if name.startswith("K2FLOW_"):
            monkeypatch.setenv(name, setting)

    def make(*arguments: str) -> tuple[int, Page]:
        path = tmp_path / "report.html"
        done = CliRunner().invoke(app, ["report", "--html", str(path), "--since", "500d", *arguments])
        assert done.exception is None or isinstance(done.exception, SystemExit), done.output
        assert f"{path}: {path.stat().st_size:,} bytes; " in done.output
        assert [each.name for each in tmp_path.iterdir()] == ["report.html"]
        return done.exit_code, Page(path.read_text("utf-8"))

    with damage.restored(lake):
        yield make


def test_page_shows_the_content_of_the_tables(
    lake: Lake, report: Callable[..., tuple[int, Page]], tmp_path: Path
) -> None:
    code, page = report("--symbol", "BTCUSDT", "--symbol", HOSTILE, "--symbol", "NONE")
    assert code == 0, page.sections["audit"]
    db = connect_to(lake.catalog())
    assert_rows(page, db)
    assert_throughput(page, db)
    assert_freshness(page, lake)
    assert_dead_letters(page, db)
    assert_candles(page, db, "chart-market-0", "BTCUSDT")
    assert page.tips["chart-market-1"][0].endswith("open 64,000.5, high 64,000.5, low 64,000.5, close 64,000.5, "
                                                   "volume 0.001, 1 trades")  # fmt: skip
    assert "There are no trades of NONE." in page.sections["candles"]
    assert_gaps(page, db)
    assert_files(page, lake)
    assert "All invariants hold." in page.sections["audit"]
    assert [(row[1], row[7], row[8]) for row in page.body("partitions")] == [(str(p), "0", "0") for p in range(3)]
    assert "there are no tables of kraken" in page.sections["audit"]
    assert "there are no tables yet: start the flow" in page.sections["flows"]
    assert "Table bronze_kraken_trades does not exist." in page.sections["throughput"]
    assert_harmless(page, tmp_path / "report.html")


def test_page_of_some_hours_has_their_rows_only(lake: Lake, report: Callable[..., tuple[int, Page]]) -> None:
    code, page = report("binance", "--no-audit", "--since", "2h")
    assert code == 0
    found = re.search(r"since ([-0-9]+ [:0-9]+):", page.sections[""])
    assert found
    db = connect_to(lake.catalog())
    rows = [
        fetch(db, f"SELECT count(*) FROM {table} WHERE {column} >= TIMESTAMPTZ '{found[1]} UTC'")[0][0]
        for table, column in (
            ("bronze_binance_trades", "ingestion_timestamp"),
            ("silver_binance_trades", '"timestamp"'),
            ("dlq_binance_trades", "failed_at"),
            (GOLD_TABLE, '"timestamp"'),
        )
    ]
    assert [row[1] for row in page.body("layers-binance")] == [f"{n:,}" for n in rows]
    assert 0 < rows[3] < count(db, GOLD_TABLE)  # one trade is five hours old


def test_candles_come_from_their_table(lake: Lake, report: Callable[..., tuple[int, Page]]) -> None:
    """They equal those of Gold, in steps of whole minutes."""
    done = lake.command("run", "candles", "--until-caught-up")
    assert done.returncode == 0, done.stderr
    try:
        code, page = report("binance", "--no-audit", "--symbol", "BTCUSDT")
        assert code == 0
        assert re.search(r"candles of \d+ (min|h|d)", page.sections["candles"])
        assert "From the table of one-minute candles, which is 0 s behind Gold" in page.sections["candles"]
        assert_candles(page, connect_to(lake.catalog()), "chart-market-0", "BTCUSDT")
        assert_files(page, lake)
    finally:
        lake.catalog().drop_table(f"market_data.{CANDLES_TABLE}")  # the other tests have none


def fetch(db: duckdb.DuckDBPyConnection, sql: str) -> list[tuple[object, ...]]:
    return db.execute(sql).fetchall()


def count(db: duckdb.DuckDBPyConnection, table: str) -> int:
    return int(str(fetch(db, f"SELECT count(*) FROM {table}")[0][0]))


def assert_rows(page: Page, db: duckdb.DuckDBPyConnection) -> None:
    tables = ("bronze_binance_trades", "silver_binance_trades", "dlq_binance_trades", GOLD_TABLE)
    bronze, silver, dlq, gold = rows = [count(db, name) for name in tables]
    assert (bronze, silver + dlq) == (3_005, 3_005)
    assert [row[1] for row in page.body("layers-binance")] == [f"{n:,}" for n in rows]
    assert [row[2:4] for row in page.body("layers-binance")] == [["0", "0 s"]] * 4
    assert [row[1] for row in page.body("layers-kraken")] == ["no table"] * 3 + ["0"]
    for text in (f"{bronze:,}", f"{gold:,}", f"{dlq / bronze:.2%}"):
        assert text in page.sections[""]  # the summary


def assert_throughput(page: Page, db: duckdb.DuckDBPyConnection) -> None:
    assert "messages in 1 s" in page.sections["throughput"]
    seconds = fetch(
        db,
        "SELECT strftime(ingestion_timestamp, '%Y-%m-%d %H:%M:%S') AS at, count(*) FROM bronze_binance_trades "
        "GROUP BY 1 ORDER BY 1",
    )
    assert page.tips["chart-ingested"] == [f"{at}: binance {n:,}" for at, n in seconds]
    shown = sum(int(tip.rpartition(" ")[2].replace(",", "")) for tip in page.tips["chart-traded"])
    outside = re.search(r"([\d,]+) earlier or later ones are not shown", page.sections["throughput"])
    assert outside
    assert shown + int(outside[1].replace(",", "")) == count(db, GOLD_TABLE)
    assert shown > 0.9 * count(db, GOLD_TABLE)  # one trade is five hours old


def assert_freshness(page: Page, lake: Lake) -> None:
    """Compute the delays in another way: find, for each row of Bronze, the first snapshot whose ledger has it."""
    rows = lake.table("bronze").scan(selected_fields=("partition", "offset", "kafka_timestamp")).to_arrow().to_pylist()
    rows = [row for row in rows if row["kafka_timestamp"]]
    for line, layer in zip(page.body("delays"), ("bronze", "gold"), strict=True):
        snapshots = sorted(lake.table(layer).metadata.snapshots, key=lambda each: each.sequence_number or 0)
        ledgers = [
            json.loads(each.summary.additional_properties[KEY + "binance"]) for each in snapshots if each.summary
        ]
        delays = []
        for row in rows:
            ledger = next(
                each
                for each in ledgers
                if (part := each["partitions"].get(str(row["partition"]))) and part["next"] > row["offset"]
            )
            delays.append(ledger["committed_at"] - round(row["kafka_timestamp"].timestamp() * 1000))
        assert len({each["committed_at"] for each in ledgers}) > 3
        assert min(delays) >= 0
        median, p99 = np.quantile(delays, (0.5, 0.99), method="inverted_cdf").tolist()
        spans = [formats.duration(ms / 1000) for ms in (rounded(median), rounded(p99), max(delays))]
        assert line == ["binance", layer, f"{len(rows):,}", *spans]
    assert page.tips["chart-freshness"]


def rounded(ms: int) -> int:
    """Round up to three digits."""
    unit = 10 ** max(0, len(str(ms)) - 3)
    return -(-ms // unit) * unit


def assert_dead_letters(page: Page, db: duckdb.DuckDBPyConnection) -> None:
    reasons = fetch(
        db,
        'SELECT reason, count(*), first(detail ORDER BY failed_at DESC, "partition" DESC, "offset" DESC) '
        "FROM dlq_binance_trades GROUP BY reason ORDER BY count(*) DESC, reason",
    )
    found = page.body("reasons")
    assert [(row[0], row[1], row[2], row[4]) for row in found] == [(r, f"{n:,}", "0", d) for r, n, d in reasons]
    assert page.tips["chart-reasons"] == [f"{reason}: binance {n:,}" for reason, n, _ in reasons[:20]]
    assert len(reasons) > 15


def assert_candles(page: Page, db: duckdb.DuckDBPyConnection, chart: str, symbol: str) -> None:
    drawn = list(dict.fromkeys(page.tips[chart]))
    assert 2 <= len(drawn) <= 200
    step = re.search(r"candles of (\d+) (\w+)", page.sections["candles"])
    assert step
    step_us = int(step[1]) * STEPS_US[step[2]]
    begin, last = (datetime.fromisoformat(drawn[i].partition(": ")[0]).replace(tzinfo=UTC) for i in (0, -1))
    end = last + timedelta(microseconds=step_us)
    shown = f"symbol = '{symbol}' AND timestamp >= '{begin.isoformat()}' AND timestamp < '{end.isoformat()}'"
    ((outside,),) = fetch(db, f"SELECT count(*) FROM {GOLD_TABLE} WHERE symbol = '{symbol}' AND NOT ({shown})")
    assert not outside or f"{outside:,} earlier or later trades are not shown" in page.sections["candles"]
    candles = fetch(
        db,
        f"""
        SELECT epoch_us(timestamp) // {step_us} AS step, first(price ORDER BY timestamp, length(trade_id), trade_id),
               max(price), min(price), last(price ORDER BY timestamp, length(trade_id), trade_id),
               sum(quantity), count(*)
        FROM {GOLD_TABLE} WHERE {shown} GROUP BY step ORDER BY step""",
    )
    expected = []
    for at, *values in candles:
        prices = [formats.amount(Decimal(str(each))) for each in values[:-1]]
        texts = [
            f"{name} {price}" for name, price in zip(("open", "high", "low", "close", "volume"), prices, strict=True)
        ]
        moment = formats.moment(int(str(at)) * step_us, step_us % 1_000_000 > 0)
        expected.append(f"{moment}: {', '.join(texts)}, {values[-1]:,} trades")
    assert drawn == expected


def assert_gaps(page: Page, db: duckdb.DuckDBPyConnection) -> None:
    """The simulated market numbers its trades without holes, so dead letters are the holes."""
    found = find_gaps(db, find_exchange("binance"), TradeRange())
    holed = sorted(found.symbols.items(), key=lambda each: (-each[1].missing, each[0]))
    assert page.body("gap-symbols-binance") == [
        [name, f"{its.holes}", f"{its.missing}", f"{100 * its.share:.3g} %", f"{its.first}", f"{its.last}"]
        for name, its in holed
        if its.holes
    ]
    assert [row[:3] for row in page.body("gap-holes-binance")] == [
        [gap.symbol, f"{gap.first}", f"{gap.last}"] for gap in found.gaps(largest=20)
    ]
    assert found.holes > 20
    assert "There are no trades yet." in page.sections["gaps"]  # of kraken


def assert_files(page: Page, lake: Lake) -> None:
    for row in page.body("files"):
        if "kraken" in row[0] or not lake.catalog().table_exists(f"market_data.{row[0]}"):
            assert row[1:] == ["no table"]
            continue
        layer = "candles" if row[0] == CANDLES_TABLE else row[0].partition("_")[0]
        table = lake.table(layer)
        files = [(task.file.file_size_in_bytes, task.file.record_count) for task in table.scan().plan_files()]
        size = sum(size for size, _ in files)
        assert row[1:5] == [f"{sum(n for _, n in files):,}", f"{len(files):,}", f"{len(files):,}", formats.size(size)]
        assert row[7] == f"{len(table.metadata.snapshots)}"
        snapshot = table.current_snapshot()
        assert snapshot
        assert row[9] == str(snapshot.snapshot_id)
        tips = page.tips[f"chart-{row[0]}"]
        assert sum(int(tip.split(": ")[1].split()[0]) for tip in tips if not tip.startswith("target")) == len(files)


def assert_harmless(page: Page, path: Path) -> None:
    """Nothing runs or is loaded, and text from messages is text everywhere."""
    tags = {tag for tag, _ in page.elements}
    assert not tags & {"script", "img", "link", "iframe", "object", "embed", "image", "use", "form", "base"}
    for tag, attributes in page.elements:
        for name, text in attributes.items():
            assert not name.startswith("on"), (tag, name)
            assert name not in ("src", "srcset", "xlink:href", "style", "action", "data", "background"), (tag, name)
            assert name != "href" or (text or "").startswith("#"), (tag, text)
    assert {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"} in [
        attributes for tag, attributes in page.elements if tag == "meta"
    ]
    text = path.read_text("utf-8")
    style = text.partition("<style>")[2].partition("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    assert HOSTILE not in text
    assert HOSTILE in page.sections["candles"]
    assert f"exchange = '{HOSTILE}'" in page.sections["dead-letters"]


def test_problems_are_shown_and_the_audit_sets_the_exit_code(
    lake: Lake, report: Callable[..., tuple[int, Page]], monkeypatch: pytest.MonkeyPatch
) -> None:
    damage.delete(lake, "dlq", "reason = 'bad_magic'")
    code, page = report("binance")
    assert (code, "An invariant is broken." in page.sections["audit"]) == (1, True)
    assert "broken" in page.sections[""]
    assert "bad_magic" not in [row[0] for row in page.body("reasons")]
    monkeypatch.setenv("K2FLOW_KAFKA_BOOTSTRAP_SERVERS", NOWHERE)
    lake.catalog().rename_table(f"market_data.{GOLD_TABLE}", "market_data.elsewhere")
    code, page = report("binance")
    lake.catalog().rename_table("market_data.elsewhere", f"market_data.{GOLD_TABLE}")
    assert (code, f"{GOLD_TABLE} cannot be audited: there is no such table" in page.sections["audit"]) == (2, True)
    assert f"Kafka unavailable: no Kafka broker answers at {NOWHERE}" in page.sections["flows"]
    assert [row[2:4] for row in page.body("layers-binance")] == [["unknown", "unknown"]] * 4
    for section in ("throughput", "freshness", "candles"):
        assert f"Table {GOLD_TABLE} does not exist." in page.sections[section]
    assert page.body("layers-binance")[3][1] == "no table"
    assert [row[1] for row in page.body("delays")] == ["bronze"]


def test_unwritable_page_is_an_error(report: Callable[..., tuple[int, Page]], tmp_path: Path) -> None:
    (tmp_path / "report.html").write_text("as it was")
    for path, why in (("no/report.html", "No such file or directory"), (".", "is a folder: name a file")):
        done = CliRunner().invoke(app, ["report", "--html", str(tmp_path / path)])
        assert done.exit_code == 2
        assert f"k2flow: error: no report is written: {tmp_path / path}".removesuffix("/.") in done.stderr
        assert why in done.stderr
    assert [each.read_text() for each in tmp_path.iterdir()] == ["as it was"]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed to open the page in")
def test_browser_draws_the_page_and_loads_nothing(report: Callable[..., tuple[int, Page]], tmp_path: Path) -> None:
    code, written = report("binance", "--no-audit", "--symbol", HOSTILE)
    assert (code, "The audit was skipped" in written.sections["audit"]) == (0, True)
    path = tmp_path / "report.html"
    shot = tmp_path / "page.png"
    dom, console = opened(path, tmp_path, "--dump-dom", f"--screenshot={shot}", "--window-size=1200,3000")
    assert console == []
    assert "<title>k2flow report, " in dom
    page = Page(dom[dom.index("<html") :])
    charts = [attributes["id"] for tag, attributes in page.elements if tag == "svg"]
    assert charts == [attributes["id"] for tag, attributes in written.elements if tag == "svg"]
    assert len(charts) == 9
    assert not {tag for tag, _ in page.elements} & {"script", "img"}
    assert HOSTILE in page.sections["candles"]
    with Image.open(shot) as image:
        colours = {colour: n for n, colour in image.convert("RGB").getcolors(1 << 24) or []}
    assert colours[BLUE] > 10_000  # the bars of the dead letters above all
    unsafe = path.read_text().replace("<main>", "<main><script>1</script><img src='http://127.0.0.1:9/x.png'>")
    (tmp_path / "unsafe.html").write_text(unsafe)
    _, console = opened(tmp_path / "unsafe.html", tmp_path, "--dump-dom")
    assert sum("violates the following Content Security Policy directive" in line for line in console) >= 2


def opened(path: Path, folder: Path, *arguments: str) -> tuple[str, list[str]]:
    """Return what Chromium prints of a page, and the lines of the page's console."""
    assert CHROMIUM
    done = subprocess.run(
        [
            CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars",
            f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", *arguments, path.as_uri(),
        ],
        capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
