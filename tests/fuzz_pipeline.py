"""`scripts/fuzz --minutes`: hostile messages through the whole path, into tables and back, against the oracle.

Each round writes the tables of one exchange in a new catalog: keys, texts, numbers and times at the borders of what
Kafka, Avro, Parquet and Iceberg can hold, and damaged records between them. Then it merges the files, as maintenance
does. Each message must be in Silver or a dead letter, with the values that fastavro reads. PyIceberg and DuckDB must
read the same rows, and find each by its value. The audit must hold.
"""

import random
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.expressions import EqualTo
from pyiceberg.table.snapshots import Operation

from k2flow.audit import audit, exchange_audit
from k2flow.audit.report import Verdict
from k2flow.config.settings import load_settings
from k2flow.exchange import Exchange, exchange_names, find_exchange
from k2flow.iceberg.catalog import load_table, open_catalog
from k2flow.iceberg.rewrite import rewrite_files
from k2flow.iceberg.tables import definitions
from k2flow.layers import GOLD_TABLE, MAX_TIME_US, MIN_TIME_US
from k2flow.maintain.compaction import Compactor
from k2flow.maintain.plans import LiveFile, live_files
from k2flow.query.connection import connect_to
from tests.audited_lake import StoredTopicReader
from tests.integration.harness import rows_of
from tests.messages import value
from tests.oracle import Expected, expect
from tests.pipeline import PipelineRun, messages_of
from tests.property.test_avro_decoder import damage

from k2flow.trades.messages import HEADER_BYTES, MESSAGE_SCHEMA, MessageBatch, timestamps  # isort: skip

EXCHANGE = "binance"
PARTITIONS, BATCHES, MESSAGES = 2, 3, 60
CODE_POINTS = "\0\t\n\x1b\x7f\x80\x85\xa0\u07ff\u0800\u2028\u202e\ud7ff\ue000\ufeff\ufffd\uffff\U00010000\U0010ffff"
BORDERS = CODE_POINTS + "[/]{}'\"\\,%a Z"
LONG = 5_000  # characters: Parquet keeps no bounds of so long a value
INT64 = (-(2**63), -1, 0, 1, 2**63 - 1)
DAY_US, YEAR_US = 86_400_000_000, 365 * 86_400_000_000
MAX_AMOUNT = 10**18 - 1
MAX_DETAIL = 2_100
Batches = Sequence[MessageBatch]


def text(chance: random.Random) -> str:
    """Return a text of up to 40 characters, rarely a long one, from one character, a few or all."""
    alphabet = chance.choice((BORDERS, chance.choice(BORDERS), chance.choices(BORDERS, k=3)))
    found = "".join(chance.choices(alphabet, k=chance.choice((0, 1, 15, 16, 17, 40))))
    return chance.choice(BORDERS) * LONG if chance.random() < 0.01 else found


def key(chance: random.Random) -> bytes | None:
    """Return a Kafka key: none, an empty one, text, or bytes that are not UTF-8."""
    odd = (None, b"", chance.randbytes(20), b"\xff" * 17, b"\xed\xa0\x80" * 6, ("\ufffd" * 15 + "\ud7ff").encode())
    return chance.choice((*odd, *[text(chance).encode() for _ in odd]))


def amount(chance: random.Random) -> Decimal:
    """Return a price or quantity, rarely one that is not positive."""
    good = (1, MAX_AMOUNT, chance.randint(1, MAX_AMOUNT))
    return Decimal(chance.choice((*good * 10, 0, -MAX_AMOUNT))).scaleb(-8)


def kafka_ms(chance: random.Random, now_us: int) -> int:
    """Return a time of Kafka in ms, -1 for none."""
    return chance.choice((now_us // 1000,) * 15 + (-1, 0, 1, 1_231_000_000_000, MAX_TIME_US // 1000, 2**62))


def near(chance: random.Random, us: int) -> int:
    """Return a time in us at or near the limits of the rules for another time."""
    ages = (*(0, 1, DAY_US, -60_000_000, YEAR_US) * 4, -60_000_001, YEAR_US + 1, -YEAR_US)
    extremes = (MIN_TIME_US, MIN_TIME_US - 1, MAX_TIME_US, MAX_TIME_US + 1, 0, *INT64)
    found = us - chance.choice(ages) if chance.random() < 0.95 else chance.choice(extremes)
    return min(max(found, -(2**63)), 2**63 - 1)


def trade(chance: random.Random, kafka_us: int) -> dict[str, Any]:
    """Return the fields of a trade, valid in about half of all cases."""
    number = f"{chance.getrandbits(64):016x}"
    at = near(chance, kafka_us)
    vendor = {text(chance): text(chance) for _ in range(chance.choice((0, 1, 8)))}
    if chance.random() < 0.005:
        vendor = {str(i): "" for i in range(20_000)}
    return {
        "message_id": chance.choice((number + text(chance), text(chance)[:40] + number)),
        "trade_id": text(chance) + chance.choice("x" * 20 + "\xa0"),
        "symbol": text(chance) + chance.choice("x" * 20 + "\u2003"),
        "exchange": chance.choice(("BINANCE",) * 15 + ("binance", text(chance))),
        "timestamp": at,
        "ingestion_timestamp": chance.choice((kafka_us, kafka_us, near(chance, kafka_us))),
        "price": amount(chance),
        "quantity": amount(chance),
        "currency": text(chance) + chance.choice("x" * 20 + " "),
        "trade_conditions": [text(chance) for _ in range(chance.choice((0, 1, 3, 300)))],
        "source_sequence": chance.choice((None, *INT64)),
        "platform_sequence": chance.choice((None, *INT64)),
        "vendor_data": chance.choice((None, vendor, vendor)),
    }


def hostile_batch(chance: random.Random, first: Sequence[int], count: int) -> MessageBatch:
    """Return a batch of messages, whose offsets begin at `first` in each partition; some are sent twice."""
    now_us = time.time_ns() // 1000
    keys, values, times = [], [], []
    for _ in range(count):
        at = kafka_ms(chance, now_us)
        usable = at * 1000 if 0 <= at <= MAX_TIME_US // 1000 else now_us
        payload: bytes | None = value(chance.choice((1,) * 30 + (0, 2, 2**32 - 1)), **trade(chance, usable))
        fate = chance.randrange(12)
        if fate == 0:
            payload = chance.choice((None, b"", b"\0", b"\1" + payload, payload[:4], payload[:HEADER_BYTES]))
        elif fate <= 2:
            payload = payload[:HEADER_BYTES] + damage(payload[HEADER_BYTES:], b"\xff" * 9, chance)
        copies = 2 if chance.random() < 0.05 else 1
        for _ in range(copies):
            keys.append(key(chance))
            values.append(payload)
            times.append(at)
    partition = np.array([chance.randrange(PARTITIONS) for _ in values], np.int32)
    offset = np.zeros(len(values), np.int64)
    for p in range(PARTITIONS):
        of_it = partition == p
        offset[of_it] = first[p] + np.arange(of_it.sum())
    columns = [pa.array(keys, pa.binary()), pa.array(values, pa.binary()), timestamps(np.array(times, np.int64))]
    ranges = [(p, first[p], first[p] + int((partition == p).sum())) for p in range(PARTITIONS)]
    rows = pa.RecordBatch.from_arrays(columns, schema=MESSAGE_SCHEMA)
    return MessageBatch(rows, partition, offset, [each for each in ranges if each[1] < each[2]])


def whole(batches: Batches) -> MessageBatch:
    """Return all messages of some batches as one."""
    ends = {p: end for batch in batches for p, _, end in batch.offsets}
    return MessageBatch(
        pa.concat_batches([batch.rows for batch in batches]),
        np.concatenate([batch.partition for batch in batches]),
        np.concatenate([batch.offset for batch in batches]),
        [(p, 0, end) for p, end in ends.items()],
    )


def run_round(catalog: Catalog, seed: int, messages: int = MESSAGES) -> Counter[str]:
    """Write, merge, read and audit about `messages` per batch. Return the number of messages by reason."""
    chance, exchange = random.Random(seed), find_exchange(EXCHANGE)
    pipeline, batches, first = PipelineRun(catalog, exchange), [], [0] * PARTITIONS
    for _ in range(BATCHES):
        batch = hostile_batch(chance, first, messages)
        first = [next((end for p, _, end in batch.offsets if p == q), first[q]) for q in range(PARTITIONS)]
        pipeline.commit(batch)
        batches.append(batch)
    expected = expect([message for batch in batches for message in messages_of(batch)], exchange.code)
    check_tables(catalog, exchange, expected)
    merge_files(catalog, exchange)
    check_tables(catalog, exchange, expected)
    check_readers(catalog, exchange, chance)
    check_audit(catalog, exchange, whole(batches))
    return Counter({"valid": expected.silver.total()}) + Counter(reason for _, reason in expected.dlq.values())


def check_tables(catalog: Catalog, exchange: Exchange, expected: Expected) -> None:
    """Compare the rows that PyIceberg reads with the oracle's."""
    bronze = {(row["partition"], row["offset"]): row for row in all_rows(catalog, exchange.bronze)}
    assert bronze.keys() == expected.bronze.keys()
    for at, message in expected.bronze.items():
        assert bronze[at]["avro_payload"] == message.value
        wanted = None if message.key is None else message.key.decode("utf-8", "backslashreplace")
        assert bronze[at]["message_key"] == wanted
    letters = all_rows(catalog, exchange.dlq)
    assert len(letters) == len(expected.dlq)
    for row in letters:
        assert (row["payload"], row["reason"]) == expected.dlq[row["partition"], row["offset"]], row
        assert 0 < len(row["detail"].encode()) <= MAX_DETAIL * 4
    assert Counter(rows_of(load_table(catalog, exchange.silver))) == expected.silver
    gold = rows_of(load_table(catalog, GOLD_TABLE))
    assert sorted(row[0] for row in gold) == sorted(expected.gold_ids)
    assert all(row[:16] in expected.silver and row[16] == row[5].hour for row in gold)


def all_rows(catalog: Catalog, table: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = load_table(catalog, table).scan().to_arrow().to_pylist()
    return found


def merge_files(catalog: Catalog, exchange: Exchange) -> None:
    """Merge the files of each partition, as maintenance does."""
    for name, definition in definitions(exchange).items():
        table = load_table(catalog, name)
        by_partition: dict[tuple[Any, ...], list[LiveFile]] = defaultdict(list)
        for live in live_files(table, definition.layer.time_column):
            by_partition[live.partition].append(live)
        for files in by_partition.values():
            if len(files) > 1:
                new = Compactor(table, definition).compact(files)
                removed = [live.file.file_path for live in files]
                assert rewrite_files(catalog, name, Operation.REPLACE, removed, new, time.time_ns() // 10**6)


def check_readers(catalog: Catalog, exchange: Exchange, chance: random.Random) -> None:
    """Compare the rows of DuckDB with those of PyIceberg, and find some rows by their values in both."""
    connection = connect_to(catalog)
    for name, columns in (
        (exchange.bronze, ("message_key", "avro_payload")),
        (exchange.silver, ("message_id", "symbol", "currency")),
        (exchange.dlq, ("detail",)),
        (GOLD_TABLE, ("message_id", "trade_id")),
    ):
        table = load_table(catalog, name)
        rows = table.scan().to_arrow()
        ours = connection.sql(f"SELECT * FROM {name}").to_arrow_table().cast(rows.schema)
        assert Counter(map(repr, ours.to_pylist())) == Counter(map(repr, rows.to_pylist())), name
        for column in columns:
            values = [each for each in rows.column(column).to_pylist() if each is not None]
            for wanted in chance.sample(values, min(3, len(values))):
                count = values.count(wanted)
                found = connection.execute(f"SELECT count(*) FROM {name} WHERE {column} = ?", [wanted]).fetchone()
                assert found == (count,), (name, column, wanted)
                assert table.scan(EqualTo(column, wanted)).to_arrow().num_rows == count, (name, column, wanted)


def check_audit(catalog: Catalog, exchange: Exchange, messages: MessageBatch) -> None:
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as home:
        patch.setenv("K2FLOW_HOME", home)
        patch.setattr(exchange_audit, "TopicReader", lambda *_: StoredTopicReader(messages))
        report = audit(catalog, load_settings(exchange_names()), [exchange])
    assert report.verdict is Verdict.HOLDS, report.findings


def fuzz(seed: int, minutes: float) -> None:
    """Run rounds with the seeds `seed`, `seed` + 1, ... for some minutes, and show the number of messages by reason."""
    ends, found = time.monotonic() + minutes * 60, Counter[str]()
    for number in range(2**62):
        with tempfile.TemporaryDirectory() as home:
            settings = load_settings(exchange_names()).model_copy(update={"home": Path(home)})
            try:
                found += run_round(open_catalog(settings), seed + number)
            except BaseException:
                print(f"failed: --payloads 0 --minutes 0 --seed {seed + number}", flush=True)
                raise
        if time.monotonic() > ends:
            break
    print(f"path: {found.total():,} messages in {number + 1} rounds, all rows as expected")
    print(", ".join(f"{name} {count:,}" for name, count in found.most_common()))
