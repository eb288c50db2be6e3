"""How fast `k2flow audit` is, and how much memory it takes, on tables that are as a flow leaves them."""

import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow as pa
import typer

from bench.measure import machine, run
from k2flow.catalog import load_table, open_catalog
from k2flow.commit import Committer
from k2flow.data_files import DataFileWriter
from k2flow.decode import TradeDecoder
from k2flow.dedup.index import SeenIds
from k2flow.exchange import GOLD, exchange_names, find_exchange
from k2flow.flow import bronze_rows
from k2flow.gold import gold_rows, hours_of
from k2flow.kafka.local import LocalKafka, free_port
from k2flow.ledger import Range
from k2flow.messages import MESSAGE_SCHEMA, Slice
from k2flow.produce import ProduceOptions
from k2flow.produce.stream import Messages, Stream
from k2flow.schemas import FixedSchemas
from k2flow.settings import load_settings
from k2flow.tables import create, definitions

EXCHANGE = "binance"
BATCH = 200_000


def audit(
    messages: Annotated[int, typer.Option(help="Messages, each one a row of Bronze.")] = 10_000_000,
    partitions: Annotated[int, typer.Option(help="Partitions of the topic.")] = 6,
    folder: Annotated[Path | None, typer.Option(help="Folder to keep the tables in, to measure again.")] = None,
) -> None:
    """The audit of one exchange, as a process of its own: wall clock, CPU and peak resident memory.

    The tables are written by the flow's own parts, without Kafka in between: 2 % bad messages, 3 % duplicates. The
    audit asks a real broker that no longer has the topic, so everything is proved by the tables.
    """
    with tempfile.TemporaryDirectory() as made:
        home = folder or Path(made)
        with LocalKafka(Path(made) / "kafka", free_port()) as kafka:
            kafka.start({"another": 1})
            began = time.perf_counter()
            if not (home / "catalog.db").exists():
                write_tables(home, messages, partitions)
            written = time.perf_counter() - began
            settings = {"K2FLOW_HOME": str(home), "K2FLOW_KAFKA_BOOTSTRAP_SERVERS": kafka.bootstrap}
            imports = run([sys.executable, "-c", "import k2flow.cli.main, k2flow.audit.run"], {})
            used = run([sys.executable, "-m", "k2flow", "audit", EXCHANGE, "--json"], settings)
    figures = {
        "benchmark": "audit",
        "messages": messages,
        "seconds": round(used.wall, 2),
        "start_up_seconds": round(imports.wall, 2),
        "messages_per_second": round(messages / used.wall),
        "cpu_us_per_message": round(used.cpu / messages * 1e6, 2),
        "peak_bytes": used.peak,
        "tables_written_in_seconds": round(written, 1),
        "machine": machine(),
    }
    print(json.dumps(figures))


def write_tables(home: Path, messages: int, partitions: int) -> None:
    """Tables under `home` as a flow leaves them that has read `messages` messages, a commit for each BATCH."""
    exchange = find_exchange(EXCHANGE)
    settings = load_settings(exchange_names()).model_copy(update={"home": home})
    catalog = open_catalog(settings)
    wanted = definitions(exchange)
    create(catalog, wanted.values())
    writers = {name: DataFileWriter(load_table(catalog, name), wanted[name]) for name in wanted}
    topic = exchange.settings.topic
    committers = {name: Committer(catalog, name, exchange.name, topic) for name in wanted}
    for committer in committers.values():
        committer.fence("id")
    decoder = TradeDecoder(exchange, FixedSchemas((1,)))
    seen = SeenIds(lambda hour: [], None)
    options = ProduceOptions(count=messages, bad=0.02, duplicates=0.03, seed=1)
    reached = np.zeros(partitions, np.int64)
    gathered: list[Messages] = []
    for chunk in Stream(exchange.code, options, options.start_us()).chunks():
        gathered.append(chunk)
        if sum(len(each.values) for each in gathered) < BATCH:
            continue
        _commit(_slice(gathered, reached), topic, decoder, seen, writers, committers)
        gathered = []
    if gathered:
        _commit(_slice(gathered, reached), topic, decoder, seen, writers, committers)


def _slice(gathered: list[Messages], reached: np.ndarray) -> Slice:
    """The messages as a consumer gives them; `reached`, the next offset of each partition, goes on."""
    values = [value for chunk in gathered for value in chunk.values]
    keys = [key for chunk in gathered for key in chunk.keys]
    times = np.concatenate([chunk.time_us for chunk in gathered])
    partition = np.concatenate([chunk.route for chunk in gathered]) % len(reached)
    order = np.argsort(partition, kind="stable")
    counts = np.bincount(partition, minlength=len(reached))
    starts = np.cumsum(counts) - counts
    offset = np.arange(len(partition)) - np.repeat(starts, counts) + np.repeat(reached, counts)
    rows = pa.RecordBatch.from_arrays(
        [pa.array(keys, pa.binary()), pa.array(values, pa.binary()), pa.array(times).cast(pa.timestamp("us", "UTC"))],
        schema=MESSAGE_SCHEMA,
    )
    ranges = [(p, int(reached[p]), int(reached[p] + n)) for p, n in enumerate(counts) if n]
    reached += counts
    return Slice(rows.take(pa.array(order)), partition[order].astype(np.int32), offset, ranges)


def _commit(
    messages: Slice,
    topic: str,
    decoder: TradeDecoder,
    seen: SeenIds,
    writers: dict[str, DataFileWriter],
    committers: dict[str, Committer],
) -> None:
    exchange = find_exchange(EXCHANGE)
    decoded = decoder.decode(messages)
    gold = gold_rows(decoded.trades.rows)
    first = seen.first_seen(gold.column("message_id"), hours_of(gold))
    seen.commit()
    tables: dict[str, tuple[pa.RecordBatch, list[Range]]] = {
        exchange.bronze: (bronze_rows(messages, topic), messages.ranges()),
        exchange.silver: (decoded.trades.rows, decoded.trades.ranges()),
        exchange.dlq: (decoded.failures.rows, decoded.failures.ranges()),
        GOLD: (gold.filter(pa.array(first)), decoded.trades.ranges()),
    }
    for name, (rows, ranges) in tables.items():
        committers[name].commit(writers[name].write(rows), ranges)
