"""When offsets were committed, from the ledgers of a table's snapshots, as far back as snapshots are kept.

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

LAYERS = (BRONZE, GOLD)
"""The layers whose freshness is reported: the first and the last of the data's way."""
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("exchange", "layer")),
        *(pa.field(name, pa.int64()) for name in ("partition", "first", "next", "committed_us", "since_us")),
    ]
)


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
        since = max((each.until for each in after.former_topics), default=0)
        for partition, extent in sorted(after.partitions.items()):
            held = before.partitions.get(partition)
            first = extent.first if held is None else held.next
            if first < extent.next:
                at = after.committed_at * 1000
                found.append(Commit(exchange, layer, partition, first, extent.next, at, since * 1000))
    return found


def commits_table(found: Iterable[Commit]) -> pa.Table:
    """Return the commits as rows of SCHEMA, for DuckDB."""
    return pa.Table.from_pylist([vars(each) for each in found], schema=SCHEMA)
