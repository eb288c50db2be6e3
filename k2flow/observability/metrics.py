"""The Prometheus metrics of a flow.

Each process counts for itself. `k2flow run` sets PROMETHEUS_MULTIPROC_DIR: the counts then go into files of that
folder, which outlive the process. The supervisor adds them up. Without it the counts are this process's alone.
Names follow Prometheus' conventions (base units, `_total`); `layer` is bronze, silver, dlq or gold.
"""

import struct
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import TYPE_CHECKING

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.metrics_core import Metric
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.registry import Collector
from tenacity import Retrying, retry_if_exception_type, stop_after_attempt, wait_fixed
from typing_extensions import override

from k2flow.layers import CANDLES, CANDLES_TABLE

if TYPE_CHECKING:
    from pyiceberg.manifest import DataFile

SUPERVISED = "PROMETHEUS_MULTIPROC_DIR"
"""Variable that the supervisor sets: the folder into which Prometheus' client writes the counts of each process."""
LABELS = ("exchange", "layer")
ROWS = Counter("k2flow_rows", "Rows committed.", LABELS)
FILES = Counter("k2flow_files", "Data files committed.", LABELS)
BYTES = Counter("k2flow_file_bytes", "Bytes of the data files committed.", LABELS)
DEAD_LETTERS = Counter("k2flow_dead_letters", "Messages that are not valid trades, by reason.", ("exchange", "reason"))
DUPLICATES = Counter("k2flow_duplicates_dropped", "Trades whose id Gold already had.", ("exchange",))
COMMIT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)
COMMIT_SECONDS = Histogram(
    "k2flow_commit_seconds", "Duration of a commit, with all its attempts.", LABELS, buckets=COMMIT_BUCKETS
)
COMMIT_RETRIES = Counter("k2flow_commit_retries", "Commit attempts that failed on a conflict or an outage.", LABELS)
COMMIT_FAILURES = Counter("k2flow_commit_failures", "Commits that failed for good, which ends the flow.", LABELS)
FRESHNESS_SECONDS = Histogram(
    "k2flow_freshness_seconds",
    "Age of a commit's oldest message, by its Kafka timestamp, when readers can see it.",
    LABELS,
    buckets=(0.5, 1, 2, 5, 10, 15, 30, 60, 120, 300, 900, 3600, 86400),
)
BATCH_BUCKETS = (0, 100, 1_000, 5_000, 10_000, 25_000, 50_000, 100_000, 250_000, 1_000_000)
BATCH_MESSAGES = Histogram("k2flow_batch_messages", "Messages per batch.", ("exchange",), buckets=BATCH_BUCKETS)
COMMITTED_AT = Gauge(
    "k2flow_last_commit_timestamp_seconds", "Time of a layer's last commit.", LABELS, multiprocess_mode="max"
)
WORKER = ("exchange", "worker")
SEEN_IDS = Gauge("k2flow_dedup_ids", "Keys in a worker's deduplication index.", WORKER, multiprocess_mode="livesum")
SEEN_BYTES = Gauge(
    "k2flow_dedup_bytes", "Memory of a worker's deduplication index.", WORKER, multiprocess_mode="livesum"
)
SEEN_DISK_BYTES = Gauge(
    "k2flow_dedup_disk_bytes", "Bytes of a worker's deduplication index on disk.", WORKER, multiprocess_mode="livesum"
)
SEEN_DISK_HITS = Gauge(
    "k2flow_dedup_disk_hits",
    "Duplicates that a worker found on disk since its start.",
    WORKER,
    multiprocess_mode="livesum",
)
RESIDENT_BYTES = Gauge(
    "k2flow_resident_bytes", "Resident memory of an exchange's processes.", ("exchange",), multiprocess_mode="livesum"
)
TABLE_CLOCK_OFFSET = Gauge(
    "k2flow_table_clock_offset_seconds",
    "How far a table's last commit is ahead of this host's clock.",
    ("table",),
    multiprocess_mode="livemax",
)
KAFKA_CLOCK_OFFSET = Gauge(
    "k2flow_kafka_clock_offset_seconds",
    "How far this host's clock is ahead of Kafka's time of new messages; negative: behind.",
    ("exchange",),
    multiprocess_mode="livemostrecent",
)
STAGE = Gauge(
    "k2flow_process_stage",
    "Stage of a process: 0 starting, 1 its tables and topic are open, 2 it reads.",
    ("exchange",),
    multiprocess_mode="liveall",
)


class Stage(IntEnum):
    """The values of STAGE."""

    STARTING = 0
    OPENED = 1
    READING = 2


@dataclass(frozen=True)
class BatchStats:
    """Per-batch statistics, published to Prometheus after the batch commits.

    `oldest_us` is the Kafka timestamp (us since 1970) of the batch's oldest message, if known; `reasons` counts dead
    letters by reason code.
    """

    oldest_us: int | None = None
    reasons: Mapping[str, int] = field(default_factory=dict)
    duplicates: int = 0


EMPTY_STATS = BatchStats()


def layer_of(table: str) -> str:
    """Return the layer of a table: candles, or the first part of its name, such as bronze, silver, dlq or gold."""
    return CANDLES.name if table == CANDLES_TABLE else table.partition("_")[0]


def count_commit(
    exchange: str, table: str, files: Sequence["DataFile"], stats: Sequence[BatchStats], seconds: float
) -> None:
    """Count one commit of `files`, which took `seconds`, and the statistics of its batches."""
    labels = (exchange, layer_of(table))
    now = time.time()
    ROWS.labels(*labels).inc(sum(file.record_count for file in files))
    FILES.labels(*labels).inc(len(files))
    BYTES.labels(*labels).inc(sum(file.file_size_in_bytes for file in files))
    COMMIT_SECONDS.labels(*labels).observe(seconds)
    COMMITTED_AT.labels(*labels).set(now)
    times = [each.oldest_us for each in stats if each.oldest_us is not None]
    if times:
        FRESHNESS_SECONDS.labels(*labels).observe(max(0.0, now - min(times) / 1e6))
    for each in stats:
        for reason, count in each.reasons.items():
            DEAD_LETTERS.labels(exchange, reason).inc(count)
    DUPLICATES.labels(exchange).inc(sum(each.duplicates for each in stats))
    RESIDENT_BYTES.labels(exchange).set(psutil.Process().memory_info().rss)


class ProcessCounts(Collector):
    """The metrics of all processes that write into a folder, added up.

    A read is repeated while a process creates or removes a file: Prometheus' client fails on a half-written one.
    """

    def __init__(self, folder: str) -> None:
        self._files = MultiProcessCollector(None, folder)  # type: ignore[no-untyped-call]
        self._retrying = Retrying(
            retry=retry_if_exception_type((struct.error, ValueError, OSError)),
            wait=wait_fixed(0.02),
            stop=stop_after_attempt(50),
            reraise=True,
        )

    @override
    def collect(self) -> Iterable[Metric]:
        metrics: Iterable[Metric] = self._retrying(lambda: list(self._files.collect()))  # type: ignore[no-untyped-call]
        return metrics


def process_stage(folder: str, exchange: str, pid: int) -> Stage:
    """Return the stage that a process has reported in the metrics of `folder`."""
    registry = CollectorRegistry()
    registry.register(ProcessCounts(folder))
    value = registry.get_sample_value("k2flow_process_stage", {"exchange": exchange, "pid": str(pid)})
    return Stage(int(value or 0))
