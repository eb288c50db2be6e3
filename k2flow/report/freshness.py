"""When which offsets were committed: the ledgers of a table's snapshots say it, as far back as snapshots are kept.

A ledger covers all offsets of a topic, whichever of them became rows of its table; so Bronze, which has the Kafka time
of each offset, says with any table's ledgers how long messages took until that table's commit. Compaction does not
change that, for it moves rows and no ledgers.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import pyarrow as pa

from k2flow.iceberg.ledger import Ledger
from k2flow.layers import BRONZE, GOLD

LAYERS = (BRONZE, GOLD)
"""The layers whose freshness is told: where messages come in, and where all of it ends."""
SCHEMA = pa.schema(
    [
        *(pa.field(name, pa.string()) for name in ("exchange", "layer")),
        *(pa.field(name, pa.int64()) for name in ("partition", "first", "next", "committed_us", "since_us")),
    ]
)


@dataclass(frozen=True)
class Commit:
    """One commit of a layer, of the offsets [first, next) of one partition.

    `since_us`: a Bronze row that was taken in before has the same offset in an earlier topic of the same name.
    """

    exchange: str
    layer: str
    partition: int
    first: int
    next: int
    committed_us: int
    since_us: int


def commits(exchange: str, layer: str, ledgers: Sequence[Ledger]) -> list[Commit]:
    """The commits between `ledgers`, a table's oldest first, as `status.flows.history` has them."""
    found = []
    for before, after in pairwise(ledgers):
        since = max((each.until for each in after.earlier), default=0)
        for partition, extent in sorted(after.partitions.items()):
            held = before.partitions.get(partition)
            first = extent.first if held is None else held.next
            if first < extent.next:
                at = after.committed_at * 1000
                found.append(Commit(exchange, layer, partition, first, extent.next, at, since * 1000))
    return found


def as_arrow(found: Iterable[Commit]) -> pa.Table:
    """The commits as rows of SCHEMA, for DuckDB."""
    return pa.Table.from_pylist([vars(each) for each in found], schema=SCHEMA)
