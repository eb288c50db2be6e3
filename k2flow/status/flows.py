"""What ledgers and Kafka say of a flow: how far each layer is behind, how fast it goes, and whether the flow runs.

How far a layer is behind is told twice. In messages: Kafka's high watermark minus the next offset of the layer's
ledger. In seconds: the age, by Kafka's time, of the oldest message that the layer lacks, which is the one at the
ledger's next offset. Not the time since the last commit: that is a few seconds for a flow that commits all the time but
is still a day behind, and hours for one to whose topic nothing came until just now. Where producers set the time of
their messages (Kafka's CreateTime), it is as right as their clocks are.
"""

from collections.abc import Iterable, Mapping, Sequence

from pyiceberg.table.metadata import TableMetadata

from k2flow.errors import LostOffsetsError
from k2flow.iceberg.ledger import KEY, Ledger, Writer, read
from k2flow.kafka.topic import begin_offsets, check_same_topic, first_offset
from k2flow.status.report import Flow, Kafka, Layer, Level, PartitionLag, Rate, State

LATE, STALE = 3, 10
"""So many triggers behind a layer is late, or stale."""
SHORTEST_TRIGGER = 10.0
"""What a shorter trigger counts as for that: a start, or a commit that is tried again, takes this long."""
WINDOW_SECONDS = 60.0
WINDOW_TRIGGERS = 3
"""Rates are of the last WINDOW_SECONDS, or of so many triggers if they take longer: two commits at least."""


def missing_messages(ledgers: Mapping[str, Ledger], kafka: Kafka) -> set[tuple[int, int]]:
    """The (partition, offset) of the oldest message that a layer lacks, of each partition and layer that lacks any:
    what Kafka is to be asked the times of."""
    positions = {(p, at) for layer in ledgers for p, at in _positions(layer, ledgers, kafka).items()}
    return {(p, at) for p, at in positions if at < kafka.marks[p][1]}


def _positions(layer: str, ledgers: Mapping[str, Ledger], kafka: Kafka) -> dict[int, int]:
    """By partition the first offset that a layer lacks, as far as Kafka has it.

    A partition that its table knows nothing of begins where the others began, as `ledger.start_offsets` has it.
    """
    if kafka.topic is None:
        return {}
    held = {name: kafka.topic.held(ledger) for name, ledger in ledgers.items()}
    found = {}
    for p, (low, high) in kafka.marks.items():
        firsts = [each.partitions[p].first for each in held.values() if p in each.partitions]
        own = held[layer].next_offset(p)
        found[p] = min(max(low, min(firsts, default=low) if own is None else own), high)
    return found


def behind(layer: str, ledgers: Mapping[str, Ledger], kafka: Kafka, now_ms: int) -> tuple[PartitionLag, ...]:
    """How far a layer is behind, partition by partition; nothing where Kafka could not be asked.

    What follows its last message may be none (Kafka's marks of transactions take offsets too): then it lacks none.
    """
    found = []
    for p, at in sorted(_positions(layer, ledgers, kafka).items()):
        low, high = kafka.marks[p]
        lag, seconds = high - at, None
        if lag == 0 or kafka.times.get((p, at), 0) is None:
            lag, seconds = 0, 0.0
        elif (ms := kafka.times.get((p, at))) is not None:
            seconds = max(0.0, (now_ms - ms) / 1000)
        found.append(PartitionLag(p, low, high, at, lag, seconds))
    return tuple(found)


def level(seconds: float | None, trigger_seconds: float) -> Level:
    """Of a layer that is `seconds` behind: late beyond 3 triggers, stale beyond 10 (of 10 s at least)."""
    if seconds is None:
        return Level.UNKNOWN
    triggers = seconds / max(trigger_seconds, SHORTEST_TRIGGER)
    return Level.STALE if triggers > STALE else Level.LATE if triggers > LATE else Level.OK


def history(metadata: TableMetadata, exchange: str, topic: str) -> list[Ledger]:
    """The ledger of an exchange as it is and as the kept snapshots say it was, oldest first; for the topic as it is.

    Raises CommitError.
    """
    now = read(metadata.properties, exchange, topic)
    summaries = [snapshot.summary.additional_properties for snapshot in metadata.snapshots if snapshot.summary]
    copies = [read(summary, exchange, topic) for summary in summaries if KEY + exchange in summary]
    earlier = {each.sequence: each for each in copies if each.sequence < now.sequence}
    return [each for _, each in sorted(earlier.items()) if each.topic_id == now.topic_id] + [now]


def rate(ledgers: Sequence[Ledger], now_ms: int, trigger_seconds: float) -> Rate | None:
    """What the commits of the last minute (or 3 triggers) brought, from one of them to the last.

    `ledgers` are a layer's, oldest first. Where there was only one commit in that time, from the last one before it,
    however long ago; it took a trigger at least, for what a flow finds at its start has gathered for longer than until
    its first commit. Nothing where there was none; None where it cannot be told.
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
    """How many offsets a table holds of the topic as it is now."""
    return sum(extent.next - extent.first for extent in ledger.partitions.values())


def rows_of(ledger: Ledger) -> int:
    """How many rows came out of them."""
    return sum(extent.rows for extent in ledger.partitions.values())


def layer_status(
    layer: str,
    table: str,
    ledgers: Mapping[str, Ledger],
    past: Sequence[Ledger],
    kafka: Kafka,
    trigger_seconds: float,
    now_ms: int,
) -> Layer:
    """One layer; `ledgers` are those of all layers of its exchange, `past` is its own's `history`."""
    ledger = ledgers[layer]
    partitions = behind(layer, ledgers, kafka, now_ms)
    known = [each.seconds for each in partitions if each.seconds is not None]
    seconds = max(known, default=None) if any(known) or len(known) == len(partitions) else None
    return Layer(
        table,
        level(seconds, trigger_seconds),
        sum(each.lag for each in partitions) if partitions else None,
        seconds,
        partitions,
        messages_of(ledger),
        rows_of(ledger),
        rate(past, now_ms, trigger_seconds),
        ledger.committed_at or None,
    )


def flow_status(ledgers: Iterable[Ledger], running: Mapping[Writer, bool | None]) -> Flow:
    """The processes that committed last, and whether they run: of each true, false, or None for another host's."""
    known = [ledger for ledger in ledgers if ledger.writer]
    writers = tuple(sorted({each.writer for each in known if each.writer}, key=str))
    states = {running.get(writer) for writer in writers}
    if not writers:
        state = State.NEVER
    elif None in states:
        state = State.ELSEWHERE
    else:
        state = State.PARTLY if len(states) > 1 else State.RUNS if True in states else State.STOPPED
    epoch = max((each.epoch for each in known), default=0)
    return Flow(state, writers, epoch, max((each.committed_at for each in known), default=None))


def lost_offsets(ledgers: Mapping[str, Ledger], kafka: Kafka, accept_lost: bool, setting: str) -> list[str]:
    """What would keep the flow from going on where the tables end: its own words, by table or partition.

    `ledgers` by table; `accept_lost` is whether `setting` lets it go on without what Kafka no longer has.
    """
    if kafka.topic is None:
        return []
    try:
        check_same_topic(kafka.topic, ledgers, accept_lost, setting)
    except LostOffsetsError as error:
        return [str(error)]
    found = []
    for p, wanted in sorted(begin_offsets(kafka.topic, ledgers).items()):
        low, high = kafka.marks.get(p, (wanted, wanted))
        if accept_lost and wanted < low:
            continue
        try:
            first_offset(kafka.topic, p, wanted, low, high, accept_lost, setting)
        except LostOffsetsError as error:
            found.append(str(error))
    return found
