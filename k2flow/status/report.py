"""What is told of the flows and their tables.

Times named `at` or `_at` are in ms since 1970, spans in seconds, unless it says otherwise.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any

from k2flow.iceberg.ledger import Writer
from k2flow.kafka.topic import Topic
from k2flow.maintain.run import Action

VERSION = 1


class Level(StrEnum):
    """Whether a layer keeps up."""

    OK = "ok"
    LATE = "late"
    STALE = "stale"
    UNKNOWN = "unknown"


class State(StrEnum):
    """Whether the processes that committed last still run. Of another host's that cannot be told: ELSEWHERE."""

    NEVER = "never"
    RUNS = "runs"
    PARTLY = "partly"
    STOPPED = "stopped"
    ELSEWHERE = "elsewhere"


@dataclass(frozen=True)
class Kafka:
    """What Kafka says of one topic; only `trouble`, in words, where it could not be asked (`answers`: a broker does).

    `marks`: by partition the first offset that it has and the end of the committed messages. `times`: the time (ms) of
    the first message at or after a (partition, offset), None where no message follows, absent where it is not known.
    """

    topic: Topic | None = None
    marks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    times: Mapping[tuple[int, int], int | None] = field(default_factory=dict)
    trouble: str = ""
    answers: bool = True


@dataclass(frozen=True)
class PartitionLag:
    """How far a layer is behind in one partition, of which Kafka has the offsets [low, high).

    `next` is the first offset that the layer lacks, `lag` how many there are, `seconds` how old the first of them is (0
    where there is none, None where Kafka did not say).
    """

    partition: int
    low: int
    high: int
    next: int
    lag: int
    seconds: float | None


@dataclass(frozen=True)
class Rate:
    """What a layer's commits of the last `over_seconds` brought, by the second."""

    messages_per_second: float
    rows_per_second: float
    over_seconds: float


@dataclass(frozen=True)
class Layer:
    """One layer of one exchange.

    `lag` and `seconds` are those of all its partitions: the sum, and the most. `messages` that it holds, of the topic
    as it is now, and `rows` that came out of them (of Gold: before deduplication) are the ledger's.
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
class Flow:
    """Who committed last to the tables of an exchange, and whether it still runs."""

    state: State
    writers: tuple[Writer, ...]
    epoch: int
    committed_at: int | None


@dataclass(frozen=True)
class Replacing:
    """Rows that are being replaced: `decided`, and so by and by published, or still in preparation."""

    what: str
    decided: bool


@dataclass(frozen=True)
class DeadLetters:
    """How many messages are dead letters: shares from 0 to 1, None of no messages.

    `hour_letters` of `hour_messages` were taken in during the last hour, by the bounds of the data files (of a file
    that is older and younger, in proportion). `reasons` are those of the newest `looked_at` letters of the last day,
    most first.
    """

    share: float | None
    hour_letters: int
    hour_messages: int
    reasons: tuple[tuple[str, int], ...]
    looked_at: int

    @property
    def hour_share(self) -> float | None:
        return min(1.0, self.hour_letters / self.hour_messages) if self.hour_messages else None


@dataclass(frozen=True)
class Exchange:
    """One exchange; a layer whose table is missing is None. `troubles` say what is wrong and what to do."""

    name: str
    topic: str
    trigger_seconds: float
    kafka: Kafka
    flow: Flow
    replacing: Replacing | None
    layers: Mapping[str, Layer | None]
    dead_letters: DeadLetters | None
    troubles: tuple[str, ...]


@dataclass(frozen=True)
class Totals:
    """What a table's newest snapshot has."""

    rows: int = 0
    files: int = 0
    bytes: int = 0
    committed_at: int | None = None


@dataclass(frozen=True)
class Maintained:
    """The newest commit of one of maintenance's steps, among the snapshots that are kept."""

    what: str
    at: int


@dataclass(frozen=True)
class Table:
    """One table: its size, what maintenance would do to it now, did last (each step), and who leads that until when."""

    name: str
    totals: Totals
    small_files: int
    snapshots: int
    due: tuple[Action, ...]
    maintained: tuple[Maintained, ...]
    leader: Writer | None
    leads_until: int | None


@dataclass(frozen=True)
class Status:
    """All that was looked at, at one moment. `to_dict` is what `--json` prints; its keys are stable within a `version`.

    - `version`, `at` (ISO 8601, as all times are), `took_seconds`;
    - `exchanges`: by name `topic`, `topic_id` (null: Kafka was not asked, or has no such topic), `trigger_seconds`,
      `kafka_trouble` (or null), `flow` (`state`: never, runs, partly, stopped, elsewhere; `writers`: `host`, `pid`,
      `started`; `epoch`, `committed_at`), `replacing` (`what`, `decided`, or null), `layers`, `dead_letters` (or null),
      `troubles`;
    - `layers`: by layer null for a missing table, else `table`, `level` (ok, late, stale, unknown), `lag`,
      `lag_seconds`, `messages`, `rows`, `messages_per_second`, `rows_per_second`, `rate_over_seconds`, `committed_at`,
      `partitions` (`partition`, `low`, `high`, `next`, `lag`, `lag_seconds`);
    - `dead_letters`: `share`, `hour_share`, `hour_letters`, `hour_messages`, `reasons` (by reason how many of
      the newest `looked_at`);
    - `tables`: by name null for a missing one, else `rows`, `files`, `small_files`, `bytes`, `snapshots`,
      `committed_at`, `due` (`what`, `gone`, `come`), `maintained` (`what`, `at`), `leader` (`host`, `pid`,
      `started`, `until`, or null).
    """

    at: int
    took_seconds: float
    exchanges: tuple[Exchange, ...]
    tables: Mapping[str, Table | None]

    def to_dict(self) -> dict[str, Any]:
        return {
            "version": VERSION,
            "at": iso(self.at),
            "took_seconds": round(self.took_seconds, 3),
            "exchanges": {each.name: _exchange_dict(each) for each in self.exchanges},
            "tables": {name: table and _table_dict(table) for name, table in self.tables.items()},
        }


def iso(at: int | None) -> str | None:
    """ISO 8601 of ms since 1970."""
    return None if at is None else datetime.fromtimestamp(at / 1000, UTC).isoformat(timespec="milliseconds")


def moment(at: int) -> str:
    """Date and time (UTC) of ms since 1970, to the second, for people."""
    return f"{datetime.fromtimestamp(at / 1000, UTC):%Y-%m-%d %H:%M:%S}"


def _exchange_dict(each: Exchange) -> dict[str, Any]:
    flow = {**asdict(each.flow), "state": str(each.flow.state), "committed_at": iso(each.flow.committed_at)}
    return {
        "topic": each.topic,
        "topic_id": each.kafka.topic.id if each.kafka.topic else None,
        "trigger_seconds": each.trigger_seconds,
        "kafka_trouble": each.kafka.trouble or None,
        "flow": flow,
        "replacing": asdict(each.replacing) if each.replacing else None,
        "layers": {name: layer and _layer_dict(layer) for name, layer in each.layers.items()},
        "dead_letters": each.dead_letters and _letters_dict(each.dead_letters),
        "troubles": list(each.troubles),
    }


def _layer_dict(layer: Layer) -> dict[str, Any]:
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
        "looked_at": letters.looked_at,
    }


def _table_dict(table: Table) -> dict[str, Any]:
    leader = table.leader
    return {
        "rows": table.totals.rows,
        "files": table.totals.files,
        "small_files": table.small_files,
        "bytes": table.totals.bytes,
        "snapshots": table.snapshots,
        "committed_at": iso(table.totals.committed_at),
        "due": [{"what": each.what, "gone": each.gone, "come": each.come} for each in table.due],
        "maintained": [{"what": each.what, "at": iso(each.at)} for each in table.maintained],
        "leader": leader and {**asdict(leader), "until": iso(table.leads_until)},
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)
