"""The producer without Kafka: its messages."""

import hashlib
import io
import json
from collections import Counter
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import fastavro
import numpy as np
import pytest

from k2flow.errors import ProduceError
from k2flow.sandbox.producer import Manifest, PartitionRange, ProduceOptions
from k2flow.sandbox.producer.defects import DEFECTS
from k2flow.sandbox.producer.encode import avro_long, encode
from k2flow.sandbox.producer.market import Market
from k2flow.sandbox.producer.replay import message_id, read_trades, shift_to_end
from k2flow.sandbox.producer.stream import CHUNK, MessageStream
from k2flow.trades.reasons import Reason
from k2flow.trades.schema import trade_schema
from tests.oracle import Message, classify, decode
from tests.strict_avro import defect

START = datetime(2026, 3, 14, 15, 9, 26, tzinfo=UTC)
DAY_US = 86_400_000_000
HOUR_SECONDS = 3600
SCHEMA = fastavro.parse_schema(trade_schema())
SAMPLE = Path(__file__).parents[1] / "data" / "kraken_btcusd_trades.csv"


def take(exchange: str = "BINANCE", **given: object) -> tuple[MessageStream, list[tuple[int, Message]]]:
    """Return a stream and all its messages, numbered by offset, each with its route."""
    options = ProduceOptions(**{"count": 3000, "start": START, **given})  # type: ignore[arg-type]
    stream = MessageStream(exchange, options, options.start_us())
    rows: list[tuple[int, Message]] = []
    for chunk in stream.chunks():
        for value, key, time_us, route in zip(
            chunk.values, chunk.keys, chunk.time_us.tolist(), chunk.route.tolist(), strict=True
        ):
            rows.append((route, Message(0, len(rows), key, value, time_us // 1000)))
    return stream, rows


def look(message: Message, exchange: str = "BINANCE") -> tuple[str, dict[str, Any]]:
    """Return the reason why a message is bad, or an empty text, and its trade."""
    value = message.value or b""
    if value[:5] == b"\0\0\0\0\x01" and (reason := defect(value[5:])):
        return reason, {}
    return classify(message, exchange, (1,))


@pytest.mark.parametrize("exchange", ["BINANCE", "KRAKEN", "COINBASE"])
def test_messages_match_the_counts(exchange: str) -> None:
    stream, rows = take(exchange, count=CHUNK + 6400, bad=0.1, duplicates=0.05)
    reasons: Counter[str] = Counter()
    values: Counter[bytes] = Counter()
    ids: set[str] = set()
    for _, message in rows:
        reason, trade = look(message, exchange)
        reasons[reason] += 1
        if not reason:
            ids.add(trade["message_id"])
            values[message.value or b""] += 1
    counts = stream.counts
    good = reasons.pop("")
    assert reasons == counts.bad == dict.fromkeys((reason.code for reason in DEFECTS), 120)
    assert len(ids) == counts.originals == round(26_400 * 0.85)
    assert good == len(ids) + counts.duplicates_exact + counts.duplicates_shifted
    assert counts.duplicates_exact + counts.duplicates_shifted == 1320
    assert sum(count - 1 for count in values.values()) == counts.duplicates_exact
    assert 400 < counts.duplicates_shifted < 850


def test_every_reason_has_all_its_defects() -> None:
    assert [reason for reason in Reason if reason] == list(DEFECTS)
    stream, _ = take(count=2200, bad=0.5)
    assert sum(stream.counts.bad.values()) == 1100 >= 22 * max(len(forms) for forms in DEFECTS.values())


def test_same_seed_and_start_give_the_same_messages() -> None:
    given: dict[str, Any] = {"count": CHUNK + 500, "bad": 0.02, "duplicates": 0.03, "seed": 5}
    first, second = take(**given)[1], take(**given)[1]
    assert first == second
    other_seed = {message.value for _, message in take(**{**given, "seed": 6})[1]}
    assert not other_seed & {message.value for _, message in first if len(message.value or b"") > 60}
    later = take(**given, start=datetime(2026, 3, 15, tzinfo=UTC))[1]
    ids = [{found[1]["message_id"] for _, m in rows if not (found := look(m))[0]} for rows in (first, later)]
    assert not ids[0] & ids[1]


def test_handlers_send_the_same_trades_with_ids_and_delays_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each handler loses, copies and spoils messages of its own. The counts say what Gold holds by either key."""
    monkeypatch.setattr("k2flow.sandbox.producer.stream.CHUNK", 2_000)
    each = 5_000
    given: dict[str, Any] = {"count": each, "handlers": 2, "loss": 0.2, "bad": 0.05, "duplicates": 0.05}
    stream, rows = take(**given)
    assert rows == take(**given)[1]
    found = [(route, look(message)) for route, message in rows]
    trades = [trade for _, (reason, trade) in found if not reason]
    by_trade: dict[tuple[str, str], dict[str, Any]] = {}
    for trade in trades:
        by_trade.setdefault((trade["symbol"], trade["trade_id"]), {})[trade["message_id"]] = trade
    counts = stream.counts
    assert len(rows) == 2 * (each - each // 5) == ProduceOptions(**given).messages
    assert counts.originals == len({trade["message_id"] for trade in trades}) == 2 * round(each * 0.7)
    assert counts.trades == len(by_trade)
    assert len(by_trade) == pytest.approx(each * (1 - 0.3**2), rel=0.02)  # the handlers lose independently
    assert len(trades) - counts.originals == counts.duplicates_exact + counts.duplicates_shifted == 2 * round(each / 20)
    assert counts.bad.total() == 2 * each // 20
    twice = [list(copies.values()) for copies in by_trade.values() if len(copies) == 2]
    assert max(len(copies) for copies in by_trade.values()) == 2
    same = ("symbol", "exchange", "price", "quantity", "side", "currency", "source_sequence", "vendor_data")
    assert all(one[name] == other[name] for one, other in twice for name in same)
    delays = [one["ingestion_timestamp"] - other["ingestion_timestamp"] for one, other in twice]
    assert 1_000_000 < max(map(abs, delays)) < 2_100_000


def test_one_handler_draws_the_ids_that_it_always_has() -> None:
    """The options of several handlers draw no random number: a seed gives the message ids of earlier versions."""
    digest = hashlib.sha256()
    for _, message in take(count=CHUNK + 500, duplicates=0.03, seed=5)[1]:
        digest.update((message.value or b"-")[:42])  # the header and the id
    assert digest.hexdigest()[:16] == "4059b12a41b81901"


def test_copies_have_the_partition_and_nearly_the_time_of_the_original() -> None:
    places: dict[str, set[tuple[int, bytes | None]]] = {}
    times: dict[str, list[int]] = {}
    for route, message in take(count=10_000, duplicates=0.3)[1]:
        trade = classify(message, "BINANCE", (1,))[1]
        places.setdefault(trade["message_id"], set()).add((route, message.key))
        times.setdefault(trade["message_id"], []).append(trade["timestamp"])
    assert all(len(found) == 1 for found in places.values())
    spread = [max(found) - min(found) for found in times.values() if len(set(found)) > 1]
    assert len(spread) > 1000
    assert max(spread) < DAY_US / 4 + 60_000_000
    hours = [{time // 3_600_000_000 for time in found} for found in times.values()]
    assert sum(len(found) > 1 for found in hours) > 100


def test_trades_spread_over_a_time_that_ends_now() -> None:
    """All rules hold, no trade is newer than its message, and the messages spread evenly with late ones and copies."""
    given: dict[str, Any] = {"count": 2 * CHUNK, "bad": 0.02, "duplicates": 0.1, "over_seconds": HOUR_SECONDS}
    stream, rows = take(**given)
    assert rows == take(**given)[1]
    messages = [message for _, message in rows]
    times_ms = np.array([message.timestamp_ms for message in messages if message.usable_ms])
    start_ms = int(START.timestamp() * 1000)
    assert start_ms <= times_ms.min() < start_ms + 60_000
    assert start_ms + 1000 * HOUR_SECONDS - 60_000 < times_ms.max() <= start_ms + 1000 * HOUR_SECONDS
    assert (np.diff(times_ms) >= 0).all()
    assert np.bincount((times_ms - start_ms) // 600_000, minlength=6)[:6].min() > 2 * CHUNK / 6 * 0.5
    judged = [look(message) for message in messages]
    assert Counter(reason for reason, _ in judged if reason) == stream.counts.bad
    ages_ms = np.array(
        [
            (message.timestamp_ms or 0) - trade["timestamp"] / 1000
            for message, (reason, trade) in zip(messages, judged, strict=True)
            if not reason
        ]
    )
    assert ages_ms.min() >= 0
    assert np.median(ages_ms) < 20
    assert (ages_ms > 60_000).sum() > 20
    assert stream.counts.duplicates_exact > 500
    assert stream.counts.duplicates_shifted > 500
    ids = {trade["message_id"] for reason, trade in judged if not reason}
    assert len(ids) == stream.counts.originals


@pytest.mark.parametrize("share", [0, 0.1])
def test_share_of_late_trades(share: float) -> None:
    _, rows = take(count=5_000, late=share)
    delays = [message.timestamp_ms - look(message)[1]["timestamp"] / 1000 for _, message in rows]
    assert sum(delay > 50_000 for delay in delays) == pytest.approx(5_000 * share, rel=0.2)


def test_spread_trades_end_now() -> None:
    before = datetime.now(UTC).timestamp()
    start = ProduceOptions(count=1, over_seconds=HOUR_SECONDS).start_us() / 1e6
    assert before - HOUR_SECONDS - 0.001 <= start <= datetime.now(UTC).timestamp() - HOUR_SECONDS + 0.001


def test_encoding_matches_fastavro() -> None:
    market = Market("BINANCE", np.random.default_rng(3), 1_700_000_000_000_000, 0.001)
    arrival = market.arrivals(2000, 1_700_000_000_000_000, 1e6)
    trades, _ = market.trades(arrival)
    encoded = encode(trades, 7)
    assert encoded.header == b"\0\0\0\0\x07"
    columns = trades.to_pylist(maps_as_pydicts="strict")
    numbers = Counter[str]()
    for value, trade in zip(encoded.values(), columns, strict=True):
        stream = io.BytesIO(value[5:])
        record = fastavro.schemaless_reader(stream, SCHEMA, None)
        assert isinstance(record, dict)
        assert stream.read() == b""
        for name in ("symbol", "currency", "side", "trade_conditions", "source_sequence", "platform_sequence"):
            assert record[name] == trade[name]
        assert record["symbol"].endswith(record["currency"])
        assert record["trade_id"] == trade["trade_id"] == f"BINANCE-{1_700_000_000_000_000 + numbers[trade['symbol']]}"
        numbers[trade["symbol"]] += 1
        assert record["message_id"].replace("-", "") == trade["message_id"].hex()
        assert (record["exchange"], record["asset_class"]) == ("BINANCE", "crypto")
        assert record["price"] == Decimal(trade["price"]).scaleb(-8) > 0
        assert record["quantity"] == Decimal(trade["quantity"]).scaleb(-8) > 0
        assert record["timestamp"].timestamp() == pytest.approx(trade["timestamp"] / 1e6, abs=1e-6)
        assert record["vendor_data"] == trade["vendor_data"]
        again = io.BytesIO()
        fastavro.schemaless_writer(again, SCHEMA, record)
        assert again.getvalue() == value[5:]


@pytest.mark.parametrize("number", [0, -1, 63, 64, -65, 2**31, 2**62, -(2**63), 2**63 - 1])
def test_encoding_of_longs_matches_fastavro(number: int) -> None:
    stream = io.BytesIO()
    fastavro.schemaless_writer(stream, {"type": "long"}, number)
    assert avro_long(number) == stream.getvalue()


def test_market_is_realistic() -> None:
    _, rows = take(count=100_000, rate=10_000)
    trades = [decode((message.value or b"")[5:])[1] for _, message in rows]
    delay_ms = np.array(
        [(m.timestamp_ms or 0) - trade["timestamp"] / 1000 for (_, m), trade in zip(rows, trades, strict=True)]
    )
    symbols = Counter(trade["symbol"] for trade in trades)
    assert len(symbols) >= 40
    assert symbols.most_common(1)[0][0] == "BTCUSDT"
    assert symbols["BTCUSDT"] > 5 * sorted(symbols.values())[len(symbols) // 2]
    assert delay_ms.min() >= 0
    assert np.median(delay_ms) < 20
    assert 50 < (delay_ms > 60_000).sum() < 200  # minutes to hours late
    assert (delay_ms < 300 * 86_400_000).all()
    times = np.array([trade["timestamp"] for trade in trades])
    assert (np.diff(times) < 0).sum() > 10_000  # overtaken
    sizes = np.array([float(trade["price"] * trade["quantity"]) for trade in trades if trade["currency"] == "USDT"])
    assert np.quantile(sizes, 0.99) > 20 * np.median(sizes)
    gaps = np.diff([message.timestamp_ms or 0 for _, message in rows])
    assert gaps.min() >= 0
    busy = np.bincount(np.cumsum(gaps) // 20)[:-1]  # messages in each 20 ms: far from Poisson's
    assert busy.var() > 5 * busy.mean()
    btc = [trade["price"] for trade in trades if trade["symbol"] == "BTCUSDT"]
    assert 0.8 < float(min(btc) / max(btc)) < 1
    numbers = [trade["source_sequence"] for trade in trades if trade["symbol"] == "BTCUSDT"]
    assert numbers == list(range(numbers[0], numbers[0] + len(numbers)))
    assert sum(message.key is None for _, message in rows) == pytest.approx(1000, rel=0.2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"count": 0},
        {"rate": -1},
        {"bad": 0.6, "duplicates": 0.4},
        {"seed": -1},
        {"start": datetime(2026, 1, 1)},
        {"over_seconds": 0},
        {"over_seconds": 13 * 3600},
        {"over_seconds": 60, "rate": 10},
    ],
)
def test_invalid_options_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ProduceError, match=next(iter(wrong)).removesuffix("_seconds")):
        ProduceOptions(**{"count": 1, **wrong})  # type: ignore[arg-type]


def test_manifest_survives_json() -> None:
    ranges = {0: PartitionRange(10, 5, 15), 1: PartitionRange(2, 0, 2)}
    when = START.isoformat()
    manifest = Manifest(
        exchange="BINANCE",
        topic="t",
        schema_id=1,
        seed=7,
        started=when,
        ended=when,
        seconds=1.5,
        originals=8,
        duplicates_exact=1,
        duplicates_shifted=1,
        bad={"bad_magic": 2},
        partitions=ranges,
    )
    assert Manifest.from_json(manifest.to_json()) == manifest
    stored = json.loads(manifest.to_json())
    assert stored["partitions"] == {"0": {"sent": 10, "first": 5, "next": 15}, "1": {"sent": 2, "first": 0, "next": 2}}
    assert stored["expected_rows"] == {"bronze": 12, "silver": 10, "dlq": 2, "gold": 8}
    assert (manifest.sent, manifest.silver, manifest.dlq, manifest.gold) == (12, 10, 2, 8)
    with pytest.raises(ProduceError, match="not a manifest"):
        Manifest.from_json('{"exchange": "BINANCE"}')


def test_recorded_trades_shift_by_whole_minutes_to_now() -> None:
    trades = read_trades(SAMPLE, {"kraken"})["kraken"]
    end_ms = int(START.timestamp() * 1000)
    there = shift_to_end(trades, end_ms)
    assert len(there) == len(trades) == 300
    assert 0 <= end_ms - there[-1].time_ms < 60_000
    shifts = {after.time_ms - before.time_ms for before, after in zip(trades, there, strict=True)}
    assert len(shifts) == 1
    assert shifts.pop() % 60_000 == 0
    assert (there[0].price, there[0].quantity) == (trades[0].price, trades[0].quantity)
    assert len({message_id("kraken", trade) for trade in trades}) == 300
    assert message_id("kraken", there[0]) == message_id("kraken", trades[0])
    assert read_trades(SAMPLE, {"binance"}) == {}


LINE = "kraken,BTCUSD,USD,1,1561939203172,10749.4,0.004,SELL,spot"


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (LINE.replace("10749.4", "0.000000001"), "price"),
        (LINE.replace("10749.4", "1.000000000000000000000000000000001"), "price"),
        (LINE.replace("10749.4", "10000000000"), "price"),
        (LINE.replace("0.004", "NaN"), "quantity"),
        (LINE.replace("0.004", "-1"), "quantity"),
        (LINE.replace("SELL", "sell"), "side"),
        (LINE.replace("1561939203172", "soon"), "time_ms"),
        (LINE.replace("BTCUSD", ""), "symbol is empty"),
        ("kraken,BTCUSD", "currency is empty"),
    ],
)
def test_invalid_line_is_named(tmp_path: Path, line: str, problem: str) -> None:
    file = tmp_path / "trades.csv"
    file.write_text("\n".join([SAMPLE.read_text().splitlines()[0], LINE, line]))
    with pytest.raises(ProduceError, match=f"line 3: {problem}"):
        read_trades(file, {"kraken"})


def test_missing_column_is_named(tmp_path: Path) -> None:
    file = tmp_path / "trades.csv"
    file.write_text("exchange,symbol\nkraken,BTCUSD\n")
    with pytest.raises(ProduceError, match=r"line 1: no column currency, trade_id"):
        read_trades(file, {"kraken"})
    with pytest.raises(ProduceError, match="cannot be read"):
        read_trades(tmp_path / "none.csv", {"kraken"})
