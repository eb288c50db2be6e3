"""The state of a flow, from ledgers and Kafka: the lag and rate of each layer, and whether the flow runs.

Lag is given twice. In messages: the end of Kafka's log minus the next offset of the layer's ledger. In seconds: the
age, by Kafka's time, of the oldest message the layer lacks, which is the one at the ledger's next offset. The time
since the last commit would mislead. It is a few seconds for a flow that commits all the time but is a day behind. It is
hours for a flow whose topic was idle until just now. If producers set the time of their messages (Kafka's CreateTime),
the lag in seconds is as right as their clocks.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from pyiceberg.table.metadata import TableMetadata

from k2flow.dedup.cache import Figures
from k2flow.errors import LostOffsetsError
from k2flow.iceberg.ledger import KEY, Ledger, Writer, read
from k2flow.kafka.start_offsets import begin_offsets, check_same_topic, first_offset
from k2flow.kafka.topic import Topic
from k2flow.status.model import FlowState, FlowStatus, LayerStatus, Level, OpenTransaction, PartitionLag, WindowStatus

LATE, STALE = 3, 10  # triggers of lag above which a layer is late, or stale
SHORTEST_TRIGGER = 10.0  # a shorter trigger counts as this long: a start, or a commit with a retry, takes this long
WINDOW_SECONDS = 60.0
WINDOW_TRIGGERS = 3
"""Rates cover the last WINDOW_SECONDS, or this many triggers if they take longer, and at least two commits."""


@dataclass(frozen=True, kw_only=True)
class TopicState:
    """One topic as Kafka describes it. If Kafka could not be asked, only `problem` is set: the cause, and what to do.

    `watermarks` are by partition the first offset that Kafka has, and the end of the committed messages (the stable
    end). `log_ends` are the ends of the log: messages between the two are hidden by an open transaction. `times` are by
    (partition, offset) the time (ms) of the first message at or after it. None: no message follows. Absent: unknown.
    `hidden_times` are by partition those of the first hidden message.
    """

    topic: Topic | None = None
    watermarks: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    log_ends: Mapping[int, int] = field(default_factory=dict)
    times: Mapping[tuple[int, int], int | None] = field(default_factory=dict)
    hidden_times: Mapping[int, int | None] = field(default_factory=dict)
    problem: str | None = None

    @property
    def stable_ends_before_open_transactions(self) -> dict[int, int]:
        """The stable end of each partition with an open transaction."""
        return {p: high for p, (_, high) in self.watermarks.items() if self.log_ends.get(p, high) > high}


@dataclass(frozen=True)
class Rate:
    """Messages and rows per second in a layer's commits of the last `over_seconds`."""

    messages: float
    rows: float
    over_seconds: float


def missing_messages(ledgers: Mapping[str, Ledger], kafka: TopicState) -> set[tuple[int, int]]:
    """Return the (partition, offset) of the oldest message each layer lacks in each partition, to ask for its time."""
    positions = {(p, at) for layer in ledgers for p, at in _positions(layer, ledgers, kafka).items()}
    return {(p, at) for p, at in positions if at < kafka.watermarks[p][1]}


def _positions(layer: str, ledgers: Mapping[str, Ledger], kafka: TopicState) -> dict[int, int]:
    """Return by partition the first offset that a layer lacks, within the offsets that Kafka has.

    A partition that is not in its table's ledger begins where the other tables began, as in `ledger.start_offsets`.
    """
    if kafka.topic is None:
        return {}
    held = {name: kafka.topic.held(ledger) for name, ledger in ledgers.items()}
    found = {}
    for p, (low, high) in kafka.watermarks.items():
        firsts = [each.partitions[p].first for each in held.values() if p in each.partitions]
        own = held[layer].next_offset(p)
        found[p] = min(max(low, min(firsts, default=low) if own is None else own), high)
    return found


def partition_lags(
    layer: str, ledgers: Mapping[str, Ledger], kafka: TopicState, now_ms: int
) -> tuple[PartitionLag, ...]:
    """Return the lag of a layer in each partition, up to the end of the log; nothing if Kafka could not be asked.

    All offsets up to the stable end that a layer lacks may be transaction markers: then it lacks none of them.
    """
    hidden = {each.partition: each for each in open_transactions(kafka, now_ms)}
    found = []
    for p, at in sorted(_positions(layer, ledgers, kafka).items()):
        low, high = kafka.watermarks[p]
        lag, seconds = high - at, None
        if lag == 0 or kafka.times.get((p, at), 0) is None:
            lag, seconds = 0, 0.0
        elif (ms := kafka.times.get((p, at))) is not None:
            seconds = max(0.0, (now_ms - ms) / 1000)
        if (behind := hidden.get(p)) is not None:
            seconds = behind.seconds if lag == 0 else seconds
            lag += behind.log_end - high
        found.append(PartitionLag(p, low, high, at, lag, seconds, hidden[p].log_end if behind else high))
    return tuple(found)


def open_transactions(kafka: TopicState, now_ms: int) -> tuple[OpenTransaction, ...]:
    """Return the messages that open transactions hide from every reader of committed messages."""
    found = []
    for p, stable_end in sorted(kafka.stable_ends_before_open_transactions.items()):
        ms = kafka.hidden_times.get(p)
        seconds = None if ms is None else max(0.0, (now_ms - ms) / 1000)
        found.append(OpenTransaction(p, stable_end, kafka.log_ends[p], seconds))
    return tuple(found)


def hung_transactions(topic: str, kafka: TopicState, trigger_seconds: float, now_ms: int) -> list[str]:
    """Return a line for each transaction that has been open so long that the layers are stale."""
    return [
        f"{topic}[{each.partition}]: a transaction has been open for {each.seconds:.0f} s and hides "
        f"{each.log_end - each.stable_end:,} messages: the log ends before offset {each.log_end}, but readers see only "
        f"those before {each.stable_end}. Find its producer (kafka-transactions find-hanging), and end or abort it"
        for each in open_transactions(kafka, now_ms)
        if each.seconds is not None and level(each.seconds, trigger_seconds) is Level.STALE
    ]


def level(seconds: float | None, trigger_seconds: float) -> Level:
    """Rate a lag of `seconds`: late above 3 triggers, stale above 10 (a trigger counts as at least 10 s)."""
    if seconds is None:
        return Level.UNKNOWN
    triggers = seconds / max(trigger_seconds, SHORTEST_TRIGGER)
    return Level.STALE if triggers > STALE else Level.LATE if triggers > LATE else Level.OK


def history(metadata: TableMetadata, exchange: str, topic: str) -> list[Ledger]:
    """Return the current topic's ledgers, oldest first, of the kept snapshots and the table. Raises CommitError."""
    now = read(metadata.properties, exchange, topic)
    summaries = [snapshot.summary.additional_properties for snapshot in metadata.snapshots if snapshot.summary]
    copies = [read(summary, exchange, topic) for summary in summaries if KEY + exchange in summary]
    earlier = {each.sequence: each for each in copies if each.sequence < now.sequence}
    return [each for _, each in sorted(earlier.items()) if each.topic_id == now.topic_id] + [now]


def rate(ledgers: Sequence[Ledger], now_ms: int, trigger_seconds: float) -> Rate | None:
    """Return the rate of the commits of the last minute (or 3 triggers), from a layer's ledgers, oldest first.

    It is measured from the first of these commits to the last. If there is only one, it is measured from the commit
    before it, however long ago. The time counts as at least one trigger: messages that a flow finds at its start
    arrived over a longer time than its first commit took. Without a commit the rate is 0; None if it is unknown.
    """
    window = max(WINDOW_SECONDS, WINDOW_TRIGGERS * trigger_seconds)
    known = [each for each in ledgers if each.committed_at]
    recent = [each for each in known if now_ms - each.committed_at <= window * 1000]
    if known and not recent:
        return Rate(0.0, 0.0, window)
    since, last = (recent if len(recent) > 1 else known[-2:])[:1], known[-1:]
    if not since or since == last:
        return None
    elapsed = max(trigger_seconds, (last[0].committed_at - since[0].committed_at) / 1000)
    messages, rows = (max(0, count(last[0]) - count(since[0])) / elapsed for count in (messages_of, rows_of))
    return Rate(messages, rows, elapsed)


def messages_of(ledger: Ledger) -> int:
    """Count the offsets of the current topic that a table holds."""
    return sum(extent.next - extent.first for extent in ledger.partitions.values())


def rows_of(ledger: Ledger) -> int:
    """Count the rows that came out of the offsets in `messages_of`."""
    return sum(extent.rows for extent in ledger.partitions.values())


def layer_status(
    layer: str,
    table: str,
    ledgers: Mapping[str, Ledger],
    past: Sequence[Ledger],
    kafka: TopicState,
    trigger_seconds: float,
    now_ms: int,
) -> LayerStatus:
    """Return the status of one layer; `ledgers` are those of all layers of its exchange, `past` its own `history`."""
    ledger, recent = ledgers[layer], rate(past, now_ms, trigger_seconds)
    partitions = partition_lags(layer, ledgers, kafka, now_ms)
    known = [each.lag_seconds for each in partitions if each.lag_seconds is not None]
    seconds = max(known, default=None) if any(known) or len(known) == len(partitions) else None
    return LayerStatus(
        table=table,
        level=level(seconds, trigger_seconds),
        lag=sum(each.lag for each in partitions) if partitions else None,
        lag_seconds=seconds,
        messages=messages_of(ledger),
        rows=rows_of(ledger),
        messages_per_second=recent.messages if recent else None,
        rows_per_second=recent.rows if recent else None,
        rate_over_seconds=recent.over_seconds if recent else None,
        committed_at=ledger.committed_at or None,
        partitions=partitions,
    )


def window_status(workers: int, figures: Sequence[Figures]) -> WindowStatus:
    """Sum up the figures of some workers of a flow of `workers`; at least one."""
    return WindowStatus(
        workers=workers,
        workers_here=len(figures),
        hours=max(each.hours for each in figures),
        ids=sum(each.ids for each in figures),
        disk_ids=sum(each.disk_ids for each in figures),
        memory_bytes=sum(each.memory_bytes for each in figures),
        disk_bytes=sum(each.disk_bytes for each in figures),
        disk_hits=sum(each.disk_hits for each in figures),
        at=min(each.at for each in figures),
    )


def flow_status(ledgers: Iterable[Ledger], running: Mapping[Writer, bool | None]) -> FlowStatus:
    """Return the processes that committed last; `running` states of each whether it runs, None for another host's."""
    known = [ledger for ledger in ledgers if ledger.writer]
    writers = tuple(sorted({each.writer for each in known if each.writer}, key=str))
    states = {running.get(writer) for writer in writers}
    if not writers:
        state = FlowState.NEVER
    elif None in states:
        state = FlowState.ELSEWHERE
    else:
        state = FlowState.PARTLY if len(states) > 1 else FlowState.RUNS if True in states else FlowState.STOPPED
    epoch = max((each.writer_epoch for each in known), default=0)
    return FlowStatus(state, writers, epoch, max((each.committed_at for each in known), default=None))


def lost_offsets(ledgers: Mapping[str, Ledger], kafka: TopicState, accept_lost: bool, setting: str) -> list[str]:
    """Return the errors that would stop the flow if it continued where the tables end: of the topic, or of partitions.

    `ledgers` are by table. With `accept_lost`, the setting named `setting` lets it skip offsets Kafka no longer has.
    """
    if kafka.topic is None:
        return []
    try:
        check_same_topic(kafka.topic, ledgers, accept_lost, setting)
    except LostOffsetsError as error:
        return [str(error)]
    found = []
    for p, wanted in sorted(begin_offsets(kafka.topic, ledgers).items()):
        low, high = kafka.watermarks.get(p, (wanted, wanted))
        if accept_lost and wanted < low:
            continue
        try:
            first_offset(kafka.topic, p, wanted, low, high, accept_lost, setting)
        except LostOffsetsError as error:
            found.append(str(error))
    return found
