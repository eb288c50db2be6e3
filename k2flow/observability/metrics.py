"""What a flow tells Prometheus of itself.

Each process counts for itself. With PROMETHEUS_MULTIPROC_DIR set, as `k2flow run` sets it, the counts go into files of
that folder, which outlive the process and which the supervisor adds up; without it they are this process's alone.
Names follow Prometheus' conventions (base units, `_total`); `layer` is bronze, silver, dlq or gold.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import psutil
from prometheus_client import Counter, Gauge, Histogram
from pyiceberg.manifest import DataFile

SUPERVISED = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that the supervisor sets: the folder into which Prometheus' client writes the counts of each process."""

LABELS = ("exchange", "layer")

ROWS = Counter("k2flow_rows", "Rows committed.", LABELS)
FILES = Counter("k2flow_files", "Data files committed.", LABELS)
BYTES = Counter("k2flow_file_bytes", "Bytes of the data files committed.", LABELS)
DEAD_LETTERS = Counter("k2flow_dead_letters", "Messages that are no valid trades, by reason.", ("exchange", "reason"))
DUPLICATES = Counter("k2flow_duplicates_dropped", "Trades whose id Gold had already.", ("exchange",))
COMMIT_SECONDS = Histogram(
    "k2flow_commit_seconds",
    "Time of a commit, with all its attempts.",
    LABELS,
    buckets=(0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120),
)
COMMIT_RETRIES = Counter(
    "k2flow_commit_retries", "Attempts of commits that another commit or an outage foiled.", LABELS
)
COMMIT_FAILURES = Counter("k2flow_commit_failures", "Commits that were given up, which ends the flow.", LABELS)
FRESHNESS_SECONDS = Histogram(
    "k2flow_freshness_seconds",
    "Age, by Kafka's time, of the oldest message of a commit once readers see it.",
    LABELS,
    buckets=(0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 900, 3600, 86400),
)
BATCH_MESSAGES = Histogram(
    "k2flow_batch_messages",
    "Messages of a batch.",
    ("exchange",),
    buckets=(0, 100, 1_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000),
)
COMMITTED_AT = Gauge(
    "k2flow_last_commit_timestamp_seconds", "When a layer's last commit was made.", LABELS, multiprocess_mode="max"
)
SEEN_IDS = Gauge(
    "k2flow_dedup_ids", "Message ids that a worker remembers.", ("exchange", "worker"), multiprocess_mode="livesum"
)
SEEN_BYTES = Gauge("k2flow_dedup_bytes", "Memory of those ids.", ("exchange", "worker"), multiprocess_mode="livesum")
RESIDENT_BYTES = Gauge(
    "k2flow_resident_bytes", "Resident memory of an exchange's processes.", ("exchange",), multiprocess_mode="livesum"
)
STAGE = Gauge(
    "k2flow_process_stage",
    "How far a process has come: 1 its tables and topic are open, 2 it reads.",
    ("exchange",),
    multiprocess_mode="liveall",
)


class Stage(IntEnum):
    """What STAGE tells."""

    STARTING = 0
    OPENED = 1
    READING = 2


@dataclass(frozen=True)
class BatchStats:
    """What the metrics are to be told of rows once they are committed.

    `oldest_us`: Kafka's time (us since 1970) of the oldest of their messages, if it is known.
    """

    oldest_us: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0


def layer_of(table: str) -> str:
    """bronze, silver, dlq or gold: what a table's name begins with."""
    return table.partition("_")[0]


def committed(exchange: str, table: str, files: Sequence[DataFile], told: Sequence[BatchStats], seconds: float) -> None:
    """Counts one commit."""
    labels = (exchange, layer_of(table))
    now = time.time()
    ROWS.labels(*labels).inc(sum(file.record_count for file in files))
    FILES.labels(*labels).inc(len(files))
    BYTES.labels(*labels).inc(sum(file.file_size_in_bytes for file in files))
    COMMIT_SECONDS.labels(*labels).observe(seconds)
    COMMITTED_AT.labels(*labels).set(now)
    times = [each.oldest_us for each in told if each.oldest_us is not None]
    if times:
        FRESHNESS_SECONDS.labels(*labels).observe(max(0.0, now - min(times) / 1e6))
    for each in told:
        for reason, count in each.reasons.items():
            DEAD_LETTERS.labels(exchange, reason).inc(count)
    DUPLICATES.labels(exchange).inc(sum(each.duplicates for each in told))
    RESIDENT_BYTES.labels(exchange).set(psutil.Process().memory_info().rss)
