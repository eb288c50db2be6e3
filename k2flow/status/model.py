"""The status of flows and tables, as plain values.

Times named `at` or `_at` are in ms since 1970, spans in seconds, unless stated otherwise.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from k2flow.iceberg.ledger import Writer
from k2flow.kafka.topic import Topic
from k2flow.maintain.actions import MaintenanceAction

VERSION = 1


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


@dataclass(frozen=True, kw_only=True)
class TopicState:
    """One topic as Kafka describes it. If Kafka could not be asked, only `problem` is set.

    Attributes:
        topic: The topic; None if it does not exist.
        watermarks: By partition the first offset that Kafka has, and the end of the committed messages.
        times: By (partition, offset) the time (ms) of the first message at or after it. None: no message follows.
            Absent: unknown.
        problem: Why Kafka could not be asked, and what to do.
        answers: Whether a broker answers.
    """

    topic: Topic | None = None
    watermarks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    times: Mapping[tuple[int, int], int | None] = field(default_factory=dict)
    problem: str = ""
    answers: bool = True


@dataclass(frozen=True)
class PartitionLag:
    """The lag of a layer in one partition, of which Kafka has the offsets [low, high).

    `next` is the first offset that the layer lacks, and `lag` the number of offsets from there. `seconds` is the age of
    the first of them: 0 if there is none, None if Kafka did not say.
    """

    partition: int
    low: int
    high: int
    next: int
    lag: int
    seconds: float | None


@dataclass(frozen=True)
class Rate:
    """Messages and rows per second in a layer's commits of the last `over_seconds`."""

    messages_per_second: float
    rows_per_second: float
    over_seconds: float


@dataclass(frozen=True, kw_only=True)
class LayerStatus:
    """One layer of one exchange.

    `lag` is the sum over its partitions, `seconds` the maximum. `messages` and `rows` come from the ledger: the
    messages of the current topic that the layer holds, and the rows from them (for Gold: before deduplication).
    """

    table: str
    level: Level
    lag: int | None
    seconds: float | None
    partitions: tuple[PartitionLag, ...]
    messages: int
    rows: int
    rate: Rate | None
    committed_at: int | None


@dataclass(frozen=True)
class FlowStatus:
    """The processes that committed last to the tables of an exchange, and whether they still run."""

    state: FlowState
    writers: tuple[Writer, ...]
    epoch: int
    committed_at: int | None


@dataclass(frozen=True)
class Replacement:
    """A replacement of rows: committed and about to be published, or still staged."""

    what: str
    committed: bool


@dataclass(frozen=True, kw_only=True)
class DeadLetters:
    """The number of messages that are dead letters.

    Attributes:
        share: Share of all messages, 0 to 1; None if there are no messages.
        hour_letters: Dead letters of the last hour, by the bounds of the data files. A file that also has older rows
            counts in proportion.
        hour_messages: Messages of the last hour, counted in the same way.
        reasons: Reason codes of the newest `letters_read` dead letters of the last day, most frequent first.
        letters_read: Dead letters whose reasons were read.
    """

    share: float | None
    hour_letters: int
    hour_messages: int
    reasons: tuple[tuple[str, int], ...]
    letters_read: int

    @property
    def hour_share(self) -> float | None:
        """Share of the last hour's messages, 0 to 1; None if there are none."""
        return min(1.0, self.hour_letters / self.hour_messages) if self.hour_messages else None


@dataclass(frozen=True, kw_only=True)
class ExchangeStatus:
    """One exchange. A layer whose table is missing is None. `problems` say what is wrong and what to do."""

    name: str
    topic: str
    trigger_seconds: float
    kafka: TopicState
    flow: FlowStatus
    replacement: Replacement | None
    layers: Mapping[str, LayerStatus | None]
    dead_letters: DeadLetters | None
    problems: tuple[str, ...]


@dataclass(frozen=True)
class TableTotals:
    """The totals in the summary of a table's newest snapshot."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    committed_at: int | None = None


@dataclass(frozen=True)
class MaintenanceStep:
    """The newest commit of one step of maintenance, among the snapshots that are kept."""

    what: str
    at: int


@dataclass(frozen=True, kw_only=True)
class TableStatus:
    """One table: its size, the maintenance due, the newest commit of each step, and the holder of its lease."""

    name: str
    totals: TableTotals
    small_files: int
    snapshots: int
    due: tuple[MaintenanceAction, ...]
    maintained: tuple[MaintenanceStep, ...]
    leader: Writer | None
    leads_until: int | None


@dataclass(frozen=True)
class Status:
    """Everything collected at one moment. `to_dict` is the output of `--json`; its keys are stable within a `version`.

    - `version`, `at` (ISO 8601, as all times are), `took_seconds`;
    - `exchanges`: by name `topic`, `topic_id` (null: Kafka was not asked, or has no such topic), `trigger_seconds`,
      `kafka_problem` (or null), `flow` (`state`: never, runs, partly, stopped, elsewhere; `writers`: `host`, `pid`,
      `started`; `epoch`, `committed_at`), `replacement` (`what`, `committed`, or null), `layers`, `dead_letters` (or
      null), `problems`;
    - `layers`: by layer null for a missing table, else `table`, `level` (ok, late, stale, unknown), `lag`,
      `lag_seconds`, `messages`, `rows`, `messages_per_second`, `rows_per_second`, `rate_over_seconds`, `committed_at`,
      `partitions` (`partition`, `low`, `high`, `next`, `lag`, `lag_seconds`);
    - `dead_letters`: `share`, `hour_share`, `hour_letters`, `hour_messages`, `reasons` (count by reason of the newest
      `letters_read`);
    - `tables`: by name null for a missing one, else `rows`, `files`, `small_files`, `bytes`, `snapshots`,
      `committed_at`, `due` (`what`, `removed`, `added`), `maintained` (`what`, `at`), `leader` (`host`, `pid`,
      `started`, `until`, or null).
    """

    at: int
    took_seconds: float
    exchanges: tuple[ExchangeStatus, ...]
    tables: Mapping[str, TableStatus | None]

    def to_dict(self) -> dict[str, Any]:
        """Return the status as JSON values."""
        return {
            "version": VERSION,
            "at": iso(self.at),
            "took_seconds": round(self.took_seconds, 3),
            "exchanges": {each.name: _exchange_dict(each) for each in self.exchanges},
            "tables": {name: table and _table_dict(table) for name, table in self.tables.items()},
        }


def iso(at: int | None) -> str | None:
    """Format ms since 1970 as ISO 8601."""
    return None if at is None else datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")


def moment(at: int) -> str:
    """Format ms since 1970 as date and time (UTC), to the second."""
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def _exchange_dict(each: ExchangeStatus) -> dict[str, Any]:
    flow = {**asdict(each.flow), "state": str(each.flow.state), "committed_at": iso(each.flow.committed_at)}
    return {
        "topic": each.topic,
        "topic_id": each.kafka.topic.id if each.kafka.topic else None,
        "trigger_seconds": each.trigger_seconds,
        "kafka_problem": each.kafka.problem or None,
        "flow": flow,
        "replacement": asdict(each.replacement) if each.replacement else None,
        "layers": {name: layer and _layer_dict(layer) for name, layer in each.layers.items()},
        "dead_letters": each.dead_letters and _letters_dict(each.dead_letters),
        "problems": list(each.problems),
    }


def _layer_dict(layer: LayerStatus) -> dict[str, Any]:
    rate = asdict(layer.rate) if layer.rate else {}
    return {
        "table": layer.table,
        "level": str(layer.level),
        "lag": layer.lag,
        "lag_seconds": _rounded(layer.seconds),
        "messages": layer.messages,
        "rows": layer.rows,
        "messages_per_second": _rounded(rate.get("messages_per_second")),
        "rows_per_second": _rounded(rate.get("rows_per_second")),
        "rate_over_seconds": _rounded(rate.get("over_seconds")),
        "committed_at": iso(layer.committed_at),
        "partitions": [
            {
                **{name: getattr(each, name) for name in ("partition", "low", "high", "next", "lag")},
                "lag_seconds": _rounded(each.seconds),
            }
            for each in layer.partitions
        ],
    }


def _letters_dict(letters: DeadLetters) -> dict[str, Any]:
    shares = {"share": letters.share, "hour_share": letters.hour_share}
    return {
        **{name: None if share is None else round(share, 6) for name, share in shares.items()},
        "hour_letters": letters.hour_letters,
        "hour_messages": letters.hour_messages,
        "reasons": dict(letters.reasons),
        "letters_read": letters.letters_read,
    }


def _table_dict(table: TableStatus) -> dict[str, Any]:
    leader = table.leader
    return {
        "rows": table.totals.rows,
        "files": table.totals.files,
        "small_files": table.small_files,
        "bytes": table.totals.bytes,
        "snapshots": table.snapshots,
        "committed_at": iso(table.totals.committed_at),
        "due": [{"what": each.what, "removed": each.removed, "added": each.added} for each in table.due],
        "maintained": [{"what": each.what, "at": iso(each.at)} for each in table.maintained],
        "leader": leader and {**asdict(leader), "until": iso(table.leads_until)},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
