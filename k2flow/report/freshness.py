"""The time from a message to its commit, from the ledgers of a table's snapshots, as far back as snapshots are kept.

A ledger covers all offsets of a topic, whether or not they became rows of its table. Bronze has the Kafka time of each
offset. Together they give the time from message to commit for any table. Compaction moves rows but no ledgers, so it
changes nothing.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from k2flow.iceberg.ledger import Ledger
from k2flow.layers import BRONZE, GOLD
from k2flow.query.sql import query_errors, string_literal
from k2flow.report.axes import SECOND_US, axis
from k2flow.report.figures import Delays, Freshness
from k2flow.report.queries import ReportSource

LAYERS = (BRONZE, GOLD)  # the layers whose freshness is reported: the first and the last of the data's way
MAX_POINTS = 120
OFFSET_CELLS = 10_000
"""The offsets of all commits are divided into about this many cells. The commit of a message is found by its cell: an
equality join, which needs little memory and time."""
DELAY_DIGITS = 3  # delays are rounded up to this many digits, so that any number of messages has few distinct delays
DELAYS = f"""
    WITH messages AS ({{messages}}),
    cells AS (SELECT *, unnest(range(first // $cell, (next - 1) // $cell + 1)) AS cell FROM commits),
    delays AS (
        SELECT c.exchange, c.layer, (c.committed_us - $begin) // $step AS step,
               greatest(0, c.committed_us // 1000 - m.sent_ms) AS ms
        FROM messages m JOIN cells c
        ON m.exchange = c.exchange AND m."partition" = c."partition" AND m."offset" // $cell = c.cell
        WHERE m."offset" >= c.first AND m."offset" < c.next AND m.taken_us >= c.since_us),
    digits AS (
        SELECT *, pow(10, greatest(0, floor(log10(greatest(ms, 1))) + 1 - {DELAY_DIGITS})) AS unit FROM delays),
    spread AS (
        SELECT exchange, layer, step, (ceil(ms / unit) * unit)::BIGINT AS delay, count(*) AS n, max(ms) AS longest
        FROM digits GROUP BY GROUPING SETS ((exchange, layer, step, delay), (exchange, layer, delay))),
    ranked AS (
        SELECT *, sum(n) OVER (PARTITION BY exchange, layer, step ORDER BY delay) AS so_far,
               sum(n) OVER (PARTITION BY exchange, layer, step) AS whole
        FROM spread)
    SELECT exchange, layer, step, sum(n)::BIGINT, min(delay) FILTER (so_far * 2 >= whole),
           min(delay) FILTER (so_far * 100 >= whole * 99), max(longest)
    FROM ranked GROUP BY exchange, layer, step"""
"""The delays by exchange, layer and step of time, and by exchange and layer (step NULL)."""


@dataclass(frozen=True)
class Commit:
    """One commit of a layer, of the offsets [first, next) of one partition.

    A Bronze row ingested before `since_us` has its offset in a former topic of the same name.
    """

    exchange: str
    layer: str
    partition: int
    first: int
    next: int
    committed_us: int
    since_us: int


def commits(exchange: str, layer: str, ledgers: Sequence[Ledger]) -> list[Commit]:
    """Return the commits between a table's `ledgers`, oldest first, as `status.flows.history` returns them."""
    found = []
    for before, after in pairwise(ledgers):
        at_us, since_us = after.committed_at * 1000, max((each.until for each in after.former_topics), default=0) * 1000
        for partition, extent in sorted(after.partitions.items()):
            held = before.partitions.get(partition)
            first = extent.first if held is None else held.next
            if first < extent.next:
                found.append(Commit(exchange, layer, partition, first, extent.next, at_us, since_us))
    return found


def freshness(source: ReportSource, commits: Sequence[Commit]) -> Freshness | None:
    """Return the delays of messages until `commits`; None without a known commit of a message that has a time.

    The longest delay is exact; median and p99 are rounded up to DELAY_DIGITS digits. Raises QueryError.
    """
    messages = _messages(source, commits)
    if not messages:
        return None
    times = [each.committed_us for each in commits]
    time = axis(min(times), max(times), MAX_POINTS, SECOND_US)
    held = sum(each.next - each.first for each in commits)
    with query_errors():
        source.db.register("commits", pa.Table.from_pylist([vars(each) for each in commits]))
    sql, cell = DELAYS.format(messages=messages), 1 + held // OFFSET_CELLS
    total: dict[tuple[str, str], Delays] = {}
    steps: dict[tuple[str, str], dict[int, Delays]] = {}
    for exchange, layer, step, *delays in source.fetch(sql, cell=cell, begin=time.begin_us, step=time.step_us):
        if step is None:
            total[exchange, layer] = Delays(*delays)
        else:
            steps.setdefault((exchange, layer), {})[step] = Delays(*delays)
    return Freshness(time, total, steps) if total else None


def _messages(source: ReportSource, commits: Iterable[Commit]) -> str:
    """Return SQL for the messages that have a time, of the exchanges with commits, from the first committed offset."""
    oldest: dict[str, int] = {}
    for commit in commits:
        oldest[commit.exchange] = min(commit.first, oldest.get(commit.exchange, commit.first))
    return " UNION ALL ".join(
        f'SELECT {string_literal(each.name)} AS exchange, "partition", "offset", epoch_ms(kafka_timestamp) AS sent_ms, '
        f"epoch_us(ingestion_timestamp) AS taken_us FROM {each.bronze} "
        f'WHERE "offset" >= {oldest[each.name]} AND kafka_timestamp IS NOT NULL AND {source.recent(BRONZE)}'
        for each in source.exchanges
        if each.bronze in source.tables and each.name in oldest
    )
