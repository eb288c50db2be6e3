"""The status of flows and tables, as plain values. JSON has the same names, and the times as ISO 8601.

Times are in ms since 1970 (UTC), spans in seconds, shares from 0 to 1. None: unknown, unless stated otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from pydantic import PlainSerializer, TypeAdapter

from k2flow.iceberg.ledger import Writer
from k2flow.layers import MAX_TIME_US, MIN_TIME_US

VERSION = 1
_FIRST_MS, _LAST_MS = MIN_TIME_US // 1000, MAX_TIME_US // 1000


def iso(at: int) -> str:
    """Format ms since 1970 as ISO 8601."""
    return _utc(at).isoformat(timespec="milliseconds")


def moment(at: int) -> str:
    """Format ms since 1970 as date and time (UTC), to the second."""
    return _utc(at).replace(tzinfo=None).isoformat(" ", "seconds")


def _utc(at: int) -> datetime:
    """Return ms since 1970 as a time, within the years 1 to 9999: other programs may write any number."""
    seconds, milliseconds = divmod(min(max(at, _FIRST_MS), _LAST_MS), 1000)
    return datetime.fromtimestamp(seconds, UTC).replace(microsecond=milliseconds * 1000)


TimeMs = Annotated[int, PlainSerializer(iso)]
Rounded = Annotated[float, PlainSerializer(lambda value: round(value, 3))]
Share = Annotated[float, PlainSerializer(lambda share: round(share, 6))]


class Level(StrEnum):
    """Whether a layer keeps up."""

    OK = "ok"
    LATE = "late"
    STALE = "stale"
    UNKNOWN = "unknown"


class FlowState(StrEnum):
    """Whether the processes that committed last still run. ELSEWHERE: they are another host's, so it is unknown."""

    NEVER = "never"
    RUNS = "runs"
    PARTLY = "partly"
    STOPPED = "stopped"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class PartitionLag:
    """The lag of a layer in one partition."""

    partition: int
    low: int  # Kafka has the committed offsets [low, high)
    high: int
    next: int  # the first offset that the layer lacks
    lag: int  # the number of offsets from there to the end of the log
    lag_seconds: Rounded | None  # the age of the message there; 0 if there is none, None if Kafka did not say
    log_end: int  # the end of the log, after `high` if a transaction is open


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """One layer of one exchange.

    `messages` and `rows` come from the ledger: the messages of the current topic that the layer holds, and the rows
    from them (for Gold: before deduplication).
    """

    table: str
    level: Level
    lag: int | None  # the sum over the partitions
    lag_seconds: Rounded | None  # the maximum over the partitions
    messages: int
    rows: int
    messages_per_second: Rounded | None  # in the commits of the last `rate_over_seconds`
    rows_per_second: Rounded | None
    rate_over_seconds: Rounded | None
    committed_at: TimeMs | None  # None: never
    partitions: tuple[PartitionLag, ...]


@dataclass(frozen=True)
class FlowStatus:
    """The processes that committed last to the tables of an exchange, and whether they still run."""

    state: FlowState
    writers: tuple[Writer, ...]
    epoch: int
    committed_at: TimeMs | None  # None: never


@dataclass(frozen=True)
class Replacement:
    """A replacement of rows: committed and about to be published, or still staged."""

    what: str
    committed: bool


@dataclass(frozen=True, kw_only=True)
class DeadLetters:
    """The dead letters of an exchange: all of them, those of the last hour, and the reasons of the newest.

    The last hour is counted by the bounds of the data files. A file that also has older rows counts in proportion.
    """

    share: Share | None  # of all messages; None: there are none
    hour_share: Share | None
    hour_letters: int
    hour_messages: int
    reasons: Mapping[str, int]  # of the newest `letters_read` of the last day, most frequent first
    letters_read: int


@dataclass(frozen=True)
class OpenTransaction:
    """The messages of one partition that an open transaction hides: offsets [stable_end, log_end)."""

    partition: int
    stable_end: int
    log_end: int
    seconds: Rounded | None  # the age of the first of them


@dataclass(frozen=True, kw_only=True)
class WindowStatus:
    """The deduplication window of those workers that wrote its figures into this host's cache folder: their sums.

    A worker writes them at each commit that has messages. What is in memory is gone once the flow stops.
    """

    workers: int  # of the flow
    workers_here: int  # whose figures were found
    hours: int  # the maximum
    ids: int  # in memory and on disk
    disk_ids: int
    memory_bytes: int
    disk_bytes: int
    disk_hits: int  # duplicates found on disk since each worker's start
    at: TimeMs  # of the oldest figures


@dataclass(frozen=True, kw_only=True)
class ExchangeStatus:
    """One exchange. A layer whose table is missing is None. `problems` say what is wrong and what to do."""

    topic: str
    topic_id: str | None  # None: Kafka was not asked, or has no such topic
    trigger_seconds: float
    kafka_problem: str | None  # why Kafka could not be asked, and what to do
    flow: FlowStatus
    replacement: Replacement | None
    layers: Mapping[str, LayerStatus | None]
    dead_letters: DeadLetters | None
    open_transactions: tuple[OpenTransaction, ...] = ()
    window: WindowStatus | None = None  # None: no worker has written figures on this host
    problems: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class CandlesStatus:
    """The candles, which follow Gold. `problems` say what is wrong and what to do."""

    table: str
    trigger_seconds: float
    flow: FlowStatus
    level: Level
    sequence_number: int | None  # of Gold's snapshot that the candles are of; None: of none of this Gold
    gold_sequence_number: int | None  # of Gold's newest snapshot; None: there is no Gold
    lag: int | None  # the sequence numbers between the two: Gold's commits that the candles lack
    lag_seconds: Rounded | None  # the age of the oldest of these commits
    trades: int  # that the candles are made of
    trades_per_second: Rounded | None  # in the commits of the last `rate_over_seconds`
    rate_over_seconds: Rounded | None
    committed_at: TimeMs | None  # None: never
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TableTotals:
    """The totals in the summary of a table's newest snapshot, and its time; None if there is no snapshot."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    committed_at: TimeMs | None = None
    delete_files: int = 0  # of another engine: `rows` counts the rows that they delete, too


@dataclass(frozen=True)
class MaintenanceDue:
    """Maintenance that is due: the files (or snapshots) it removes and adds."""

    what: str
    removed: int
    added: int


@dataclass(frozen=True)
class MaintenanceDone:
    """The newest commit of one kind of maintenance, among the snapshots that are kept."""

    what: str
    at: TimeMs


@dataclass(frozen=True)
class Leader(Writer):
    """The process that maintains a table, until its lease ends."""

    until: TimeMs


@dataclass(frozen=True, kw_only=True)
class TableStatus(TableTotals):
    """One table: its size, and its maintenance."""

    small_files: int  # of the days that maintenance may still change, and of yesterday and today
    snapshots: int
    due: tuple[MaintenanceDue, ...]
    maintained: tuple[MaintenanceDone, ...]
    leader: Leader | None  # None: no process maintains it


@dataclass(frozen=True)
class Status:
    """Everything collected at one moment: the exchanges and tables by name. A missing table is None."""

    at: TimeMs
    took_seconds: Rounded
    exchanges: Mapping[str, ExchangeStatus]
    tables: Mapping[str, TableStatus | None]
    errors: Mapping[str, str]  # by table: why it, or a part of it, cannot be read
    candles: CandlesStatus | None = None  # None: not asked for

    def to_dict(self) -> dict[str, Any]:
        """Return the output of `--json`, whose keys are stable within a `version`."""
        return {"version": VERSION, **_JSON.dump_python(self, mode="json")}


_JSON = TypeAdapter(Status)
