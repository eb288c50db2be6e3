"""The status of a flow, as pure functions of ledgers, Kafka's offsets, snapshots, files and the time."""

import json
from collections.abc import Mapping
from dataclasses import replace
from uuid import UUID

import pytest
from pyiceberg.manifest import DataFile, DataFileContent, FileFormat
from pyiceberg.table.metadata import TableMetadata, TableMetadataV2
from pyiceberg.table.snapshots import Operation, Snapshot, Summary
from pyiceberg.typedef import Record
from rich.console import Console

from k2flow.cli.status import render
from k2flow.dedup.cache import Figures
from k2flow.iceberg.ledger import KEY, CommittedRange, Ledger, Writer
from k2flow.kafka.topic import Topic
from k2flow.layers import GOLD_TABLE
from k2flow.maintain.actions import MaintenanceAction
from k2flow.maintain.plans import LiveFile
from k2flow.status.candles import candles_status
from k2flow.status.flows import (
    Rate,
    TopicState,
    flow_status,
    history,
    hung_transactions,
    layer_status,
    level,
    lost_offsets,
    missing_messages,
    open_transactions,
    partition_lags,
    rate,
    window_status,
)
from k2flow.status.metrics import StatusMetrics
from k2flow.status.model import (
    CandlesStatus,
    ExchangeStatus,
    FlowState,
    FlowStatus,
    Leader,
    Level,
    MaintenanceDone,
    MaintenanceDue,
    OpenTransaction,
    PartitionLag,
    Status,
    TableStatus,
    TableTotals,
)
from k2flow.status.tables import dead_letters, maintenance_done, maintenance_due, rows_since, totals

NOW = 1_790_000_000_000
TOPIC = Topic("t", "id", (0, 1))
HERE, THERE = Writer("here", 7, 1.0), Writer("there", 8, 2.0)


def ledger(*nexts: int, sequence: int = 1, ago: float = 0.0, topic_id: str = "id", first: int = 0) -> Ledger:
    """Return a ledger of one partition for each next offset, a row for each message, committed `ago` seconds ago."""
    extents = {p: CommittedRange(first, end, end - first) for p, end in enumerate(nexts)}
    return Ledger("t", topic_id, 1, sequence, HERE, NOW - int(ago * 1000), extents)


def kafka(*marks: tuple[int, int], times: Mapping[tuple[int, int], int | None] | None = None) -> TopicState:
    return TopicState(topic=TOPIC, watermarks=dict(enumerate(marks)), times=times or {})


def figures(hits: int, at: int) -> Figures:
    """Return the figures of a worker whose numbers are multiples of its hits."""
    return Figures(
        at=at,
        hours=hits,
        ids=1_000 * hits,
        disk_ids=100 * hits,
        memory_bytes=20_000 * hits,
        disk_bytes=1_800 * hits,
        disk_hits=hits,
    )


def test_lag_counts_the_offsets_after_the_ledger() -> None:
    ledgers = {"bronze": ledger(10, 20), "gold": ledger(7, 20)}
    asked = kafka((0, 15), (5, 20))
    assert missing_messages(ledgers, asked) == {(0, 10), (0, 7)}
    answered = replace(asked, times={(0, 10): NOW - 4_000, (0, 7): NOW - 9_500})
    assert partition_lags("bronze", ledgers, answered, NOW) == (
        PartitionLag(0, 0, 15, 10, 5, 4.0, 15),
        PartitionLag(1, 5, 20, 20, 0, 0.0, 20),
    )
    gold = layer_status("gold", "gold_crypto_trades", ledgers, [ledgers["gold"]], answered, 10, NOW)
    assert (gold.lag, gold.lag_seconds, gold.level) == (8, 9.5, Level.OK)
    assert (gold.messages, gold.rows, gold.committed_at) == (27, 27, NOW)


def test_offsets_after_the_last_message_are_no_lag() -> None:
    """Transaction markers take offsets, too."""
    ledgers = {"bronze": ledger(10)}
    assert partition_lags("bronze", ledgers, kafka((0, 12), times={(0, 10): None}), NOW) == (
        PartitionLag(0, 0, 12, 10, 0, 0.0, 12),
    )


def test_messages_of_an_open_transaction_are_lag() -> None:
    """A layer that holds all committed messages is as far behind as the first hidden one is old."""
    ledgers = {"bronze": ledger(10, 20)}
    hung = replace(kafka((0, 10), (0, 25), times={(1, 20): NOW - 2_000}), log_ends={0: 10_010, 1: 26})
    assert hung.stable_ends_before_open_transactions == {0: 10, 1: 25}
    answered = replace(hung, hidden_times={0: NOW - 600_000, 1: NOW - 1_000})
    assert partition_lags("bronze", ledgers, answered, NOW) == (
        PartitionLag(0, 0, 10, 10, 10_000, 600.0, 10_010),
        PartitionLag(1, 0, 25, 20, 6, 2.0, 26),
    )
    bronze = layer_status("bronze", "b", ledgers, [], answered, 10, NOW)
    assert (bronze.lag, bronze.lag_seconds, bronze.level) == (10_006, 600.0, Level.STALE)
    assert open_transactions(answered, NOW) == (OpenTransaction(0, 10, 10_010, 600.0), OpenTransaction(1, 25, 26, 1.0))
    (line,) = hung_transactions("t", answered, 10, NOW)
    assert line.startswith("t[0]: a transaction has been open for 600 s and hides 10,000 messages: the log ends before")
    silent = layer_status("bronze", "b", {"bronze": ledger(10)}, [], replace(hung, watermarks={0: (0, 10)}), 10, NOW)
    assert (silent.lag, silent.lag_seconds, silent.level) == (10_000, None, Level.UNKNOWN)


def test_an_end_of_the_log_that_kafka_does_not_say_hides_nothing() -> None:
    assert open_transactions(kafka((0, 10)), NOW) == ()


def test_a_clock_ahead_gives_no_negative_age() -> None:
    ledgers = {"bronze": ledger(10)}
    assert partition_lags("bronze", ledgers, kafka((0, 12), times={(0, 10): NOW + 5_000}), NOW)[0].lag_seconds == 0.0


def test_a_time_that_kafka_did_not_give_is_unknown() -> None:
    ledgers = {"bronze": ledger(10, 20)}
    silent = layer_status("bronze", "b", ledgers, [], kafka((0, 15), (0, 20)), 10, NOW)
    assert (silent.lag, silent.lag_seconds, silent.level) == (5, None, Level.UNKNOWN)
    half = kafka((0, 15), (0, 25), times={(1, 20): NOW - 2_000})
    assert layer_status("bronze", "b", ledgers, [], half, 10, NOW).lag_seconds == 2.0
    down = layer_status("bronze", "b", ledgers, [], TopicState(problem="no broker"), 10, NOW)
    assert (down.lag, down.lag_seconds, down.level, down.partitions) == (None, None, Level.UNKNOWN, ())
    assert missing_messages(ledgers, TopicState(problem="no broker")) == set()


def test_a_partition_without_ledger_entry_begins_where_the_others_began() -> None:
    """It begins where the others began, or at what Kafka has first."""
    ledgers = {"bronze": ledger(10, first=4), "gold": ledger()}
    assert [each.next for each in partition_lags("gold", ledgers, kafka((0, 15), (3, 9)), NOW)] == [4, 3]
    assert [each.lag for each in partition_lags("gold", ledgers, kafka((6, 15), (3, 9)), NOW)] == [9, 6]


def test_a_recreated_topic_lags_by_all_its_messages() -> None:
    ledgers = {"bronze": ledger(10, topic_id="before")}
    assert [each.lag for each in partition_lags("bronze", ledgers, kafka((0, 3)), NOW)] == [3]
    (text,) = lost_offsets({"bronze_t": ledgers["bronze"]}, kafka((0, 3)), False, "SETTING")
    assert "was deleted and created again" in text


def test_lost_offsets_are_reported_with_the_flows_errors() -> None:
    ledgers = {"bronze_t": ledger(10, 20), "gold_t": ledger(8, 20)}
    lost = kafka((12, 15), (0, 5))
    found = lost_offsets(ledgers, lost, False, "SETTING")
    assert len(found) == 2
    assert "t[0]: offsets 8 to 11 (4 of them) were never committed" in found[0]
    assert "SETTING=1" in found[0]
    assert "t[1]: the tables end before offset 20 but the topic ends before 5" in found[1]
    assert len(lost_offsets(ledgers, lost, True, "SETTING")) == 1
    assert lost_offsets(ledgers, kafka((0, 15), (0, 25)), False, "SETTING") == []
    assert lost_offsets(ledgers, TopicState(problem="no broker"), False, "SETTING") == []


@pytest.mark.parametrize(
    ("seconds", "trigger", "is_"),
    [
        (None, 10, Level.UNKNOWN),
        (0.0, 10, Level.OK),
        (30.0, 10, Level.OK),
        (30.1, 10, Level.LATE),
        (100.1, 10, Level.STALE),
        (30.0, 1, Level.OK),
        (100.0, 1, Level.LATE),
        (89.0, 30, Level.OK),
        (300.0, 30, Level.LATE),
        (300.1, 30, Level.STALE),
    ],
)
def test_levels(seconds: float | None, trigger: float, is_: Level) -> None:
    assert level(seconds, trigger) is is_


def test_rates_cover_the_last_minute() -> None:
    past = [ledger(100 * n, sequence=n, ago=200 - 10 * n) for n in range(20)]
    assert rate(past, NOW, 10) == Rate(10.0, 10.0, 50.0)
    assert rate(past, NOW, 60) == Rate(10.0, 10.0, 170.0)  # three triggers


def test_rates_with_few_commits() -> None:
    once = [ledger(0, sequence=1, ago=1000), ledger(500, sequence=2, ago=0)]
    assert rate(once, NOW, 10) == Rate(0.5, 0.5, 1000.0)
    at_start = [ledger(0, sequence=1, ago=0.1), ledger(500, sequence=2, ago=0)]
    assert rate(at_start, NOW, 10) == Rate(50.0, 50.0, 10.0)
    assert rate([ledger(0, sequence=1, ago=1000), ledger(500, sequence=2, ago=900)], NOW, 10) == Rate(0.0, 0.0, 60.0)
    assert rate([ledger(500)], NOW, 10) is None
    assert rate([Ledger("t")], NOW, 10) is None
    assert rate([], NOW, 10) is None


def test_a_correction_gives_no_negative_rate() -> None:
    before, after = ledger(100, sequence=1, ago=10), ledger(100, sequence=2)
    found = rate([before, replace(after, partitions={0: CommittedRange(0, 100, 60)})], NOW, 10)
    assert found == Rate(0.0, 0.0, 10.0)


def test_flow_state() -> None:
    ledgers = [ledger(1), replace(ledger(1), writer=THERE, writer_epoch=4)]
    assert flow_status([Ledger("t")], {}).state is FlowState.NEVER
    assert flow_status(ledgers, {HERE: True, THERE: None}).state is FlowState.ELSEWHERE
    assert flow_status(ledgers, {HERE: True, THERE: False}).state is FlowState.PARTLY
    assert flow_status(ledgers, {HERE: False, THERE: False}).state is FlowState.STOPPED
    found = flow_status(ledgers, {HERE: True, THERE: True})
    assert (found.state, found.writers, found.epoch, found.committed_at) == (FlowState.RUNS, (HERE, THERE), 4, NOW)


def snapshot(number: int, operation: Operation = Operation.APPEND, **summary: str) -> Snapshot:
    return Snapshot(
        snapshot_id=number,
        sequence_number=number,
        timestamp_ms=NOW + number,
        manifest_list="l",
        summary=Summary(operation, **summary),
    )


def metadata(*snapshots: Snapshot, properties: Mapping[str, str] | None = None) -> TableMetadata:
    return TableMetadataV2(
        location="file:///t",
        last_column_id=1,
        schemas=[{"type": "struct", "schema-id": 0, "fields": []}],
        partition_specs=[{"spec-id": 0, "fields": []}],
        last_sequence_number=9,
        snapshots=list(snapshots),
        properties=dict(properties or {}),
    )


def test_history_comes_from_the_summaries() -> None:
    one, two, other = ledger(1, sequence=1), ledger(5, sequence=2), ledger(9, sequence=1, topic_id="before")
    key = f"{KEY}binance"
    copies = [snapshot(n, **{key: each.to_json()}) for n, each in enumerate((other, one, two), 1)]
    found = metadata(*copies, snapshot(4), properties={key: two.advanced([]).to_json()})
    assert [each.sequence for each in history(found, "binance", "t")] == [1, 2, 3]
    assert history(metadata(), "binance", "t") == [Ledger("t")]


def test_maintenance_done_is_the_newest_of_each_kind() -> None:
    append = snapshot(5)
    assert maintenance_done(metadata(append)) == ()
    compacted = snapshot(3, Operation.REPLACE, **{"added-data-files": "1"})
    then = (snapshot(2, Operation.REPLACE, **{"added-data-files": "1"}), compacted, snapshot(4, Operation.REPLACE))
    assert maintenance_done(metadata(*then)) == (
        MaintenanceDone("manifests", NOW + 4),
        MaintenanceDone("compaction", NOW + 3),
    )
    assert maintenance_done(metadata(snapshot(4, Operation.DELETE))) == (MaintenanceDone("retention", NOW + 4),)


def test_totals() -> None:
    summary = {"total-records": "12", "total-data-files": "3", "total-files-size": "4567"}
    assert totals(snapshot(1, **summary)) == TableTotals(12, 3, 4567, NOW + 1)
    assert totals(None) == TableTotals()


def live(rows: int, lower: int | None, upper: int | None) -> LiveFile:
    file = DataFile.from_args(
        content=DataFileContent.DATA,
        file_path="f",
        file_format=FileFormat.PARQUET,
        partition=Record(0),
        record_count=rows,
        file_size_in_bytes=1,
    )
    return LiveFile(file, (0,), lower, upper)


def test_rows_since() -> None:
    files = [live(10, 0, 99), live(20, 100, 100), live(30, 200, 300), live(40, 80, 120), live(50, None, None)]
    assert rows_since(files, 100) == 20 + 30 + 20
    assert rows_since([live(7, 5, 5)], 5) == 7


def test_dead_letters() -> None:
    found = dead_letters(ledger(5), ledger(95), 3, 100, {"b": 1, "a": 1, "c": 3})
    assert (found.share, found.hour_share, found.letters_read) == (0.05, 0.03, 5)
    assert list(found.reasons.items()) == [("c", 3), ("a", 1), ("b", 1)]
    nothing = dead_letters(Ledger("t"), Ledger("t"), 0, 0, {})
    assert (nothing.share, nothing.hour_share) == (None, None)


def test_maintenance_due_is_summed_by_kind() -> None:
    compaction, snapshots = MaintenanceAction("t", "compaction", 10, 1), MaintenanceAction("t", "snapshots", 3)
    due = maintenance_due([compaction, snapshots, MaintenanceAction("t", "compaction", 2, 1)])
    assert due == (MaintenanceDue("compaction", 12, 2), MaintenanceDue("snapshots", 3, 0))


def test_as_json() -> None:
    """Every value is a JSON value, and a missing one is null."""
    ledgers = {"bronze": ledger(10, 20)}
    state = kafka((0, 15), (0, 20), times={(0, 10): NOW - 4_000})
    bronze = layer_status("bronze", "bronze_t", ledgers, [], state, 10, NOW)
    exchange = ExchangeStatus(
        topic="t",
        topic_id="id",
        trigger_seconds=10,
        kafka_problem=None,
        flow=flow_status(ledgers.values(), {HERE: True}),
        replacement=None,
        layers={"bronze": bronze, "gold": None},
        dead_letters=dead_letters(ledger(5), ledger(95), 3, 100, {"c": 3}),
        problems=("a problem",),
        window=window_status(3, [figures(5, NOW), figures(7, NOW - 61_000)]),
    )
    table = TableStatus(
        rows=1,
        files=2,
        bytes=3,
        committed_at=NOW,
        small_files=2,
        snapshots=5,
        due=(MaintenanceDue("compaction", 12, 2),),
        maintained=(MaintenanceDone("compaction", NOW),),
        leader=Leader("here", 7, 1.0, NOW + 1),
    )
    status = Status(NOW, 0.51234, {"binance": exchange}, {"bronze_t": table, "gold_t": None}, {})
    found = json.loads(json.dumps(status.to_dict()))
    assert found["at"] == "2026-09-21T14:13:20.000+00:00"
    assert (found["version"], found["took_seconds"]) == (1, 0.512)
    one = found["exchanges"]["binance"]
    assert (one["flow"]["state"], one["topic_id"], one["kafka_problem"]) == ("runs", "id", None)
    assert one["flow"]["writers"] == [{"host": "here", "pid": 7, "started": 1.0}]
    assert one["layers"]["gold"] is None
    assert (one["layers"]["bronze"]["lag"], one["layers"]["bronze"]["lag_seconds"]) == (5, 4.0)
    assert one["layers"]["bronze"]["partitions"][0]["next"] == 10
    assert one["layers"]["bronze"]["messages_per_second"] is None
    assert one["dead_letters"]["reasons"] == {"c": 3}
    assert one["window"] == {
        "workers": 3, "workers_here": 2, "hours": 7, "ids": 12_000, "disk_ids": 1_200, "memory_bytes": 240_000,
        "disk_bytes": 21_600, "disk_hits": 12, "at": "2026-09-21T14:12:19.000+00:00",
    }  # fmt: skip
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(status))
    assert (
        "deduplication window, 2 of 3 workers: 12,000 ids of 7 hours, 240.0 kB in memory; "
        "1,200 of them on disk, 21.6 kB, with 12 hits; a minute ago"
    ) in shown.get()
    table_dict = found["tables"]["bronze_t"]
    assert found["tables"]["gold_t"] is None
    assert (table_dict["rows"], table_dict["committed_at"]) == (1, "2026-09-21T14:13:20.000+00:00")
    assert table_dict["due"] == [{"what": "compaction", "removed": 12, "added": 2}]
    assert table_dict["maintained"] == [{"what": "compaction", "at": "2026-09-21T14:13:20.000+00:00"}]
    assert table_dict["leader"] == {
        "host": "here", "pid": 7, "started": 1.0, "until": "2026-09-21T14:13:20.001+00:00",
    }  # fmt: skip


RUNS = FlowStatus(FlowState.RUNS, (HERE,), 1, NOW)
GOLD_UUID = "5f1cd9ae-6e1f-4f0a-9a52-0f6ac0ef1c55"


def candle_ledger(held: int, ago: float = 0.0, sequence: int = 1) -> Ledger:
    """Return the ledger of candles of Gold at sequence number `held`, of 10 trades for each."""
    extents = {0: CommittedRange(0, held + 1, 10 * held)}
    return Ledger(GOLD_TABLE, GOLD_UUID, 1, sequence, HERE, NOW - int(ago * 1000), extents)


def gold(*ages: tuple[int, float], uuid: str = GOLD_UUID) -> TableMetadata:
    """Return Gold with snapshots of these sequence numbers and ages in seconds, the last one its head."""
    found = [snapshot(number).model_copy(update={"timestamp_ms": NOW - int(age * 1000)}) for number, age in ages]
    return metadata(*found).model_copy(update={"table_uuid": UUID(uuid), "current_snapshot_id": ages[-1][0]})


def candles_of(gold: TableMetadata | None, *past: Ledger) -> CandlesStatus:
    return candles_status(gold, past, RUNS, 1.0, NOW)


@pytest.mark.parametrize(
    ("gold", "past", "held", "lag", "seconds", "level"),
    [
        (gold((3, 9), (4, 5)), [candle_ledger(4)], 4, 0, 0.0, Level.OK),
        (gold((3, 9), (4, 5), (6, 1)), [candle_ledger(3)], 3, 3, 5.0, Level.OK),
        (gold((3, 90), (4, 40)), [candle_ledger(3)], 3, 1, 40.0, Level.LATE),
        (gold((8, 400), (9, 5)), [candle_ledger(3, ago=500)], 3, 6, 500.0, Level.STALE),  # snapshot 4 has expired
        (gold((8, 400)), [candle_ledger(3, 900), candle_ledger(3, 500, 2)], 3, 5, 900.0, Level.STALE),
        (gold((8, 4), (3, 40)), [candle_ledger(5)], 5, 0, 0.0, Level.OK),  # Gold went back
        (gold((2, 7), uuid="00000000-0000-0000-0000-000000000001"), [candle_ledger(5)], None, 2, 7.0, Level.OK),
        (gold((1, 50), (2, 7)), [Ledger(GOLD_TABLE, GOLD_UUID)], None, 2, 50.0, Level.LATE),
        (None, [candle_ledger(5)], 5, None, None, Level.UNKNOWN),
        (gold((2, 7)), [], None, None, None, Level.UNKNOWN),  # there is no table of candles
    ],
)
def test_lag_of_candles_is_that_behind_gold(
    gold: TableMetadata | None,
    past: list[Ledger],
    held: int | None,
    lag: int | None,
    seconds: float | None,
    level: Level,
) -> None:
    found = candles_of(gold, *past)
    assert (found.sequence_number, found.lag, found.lag_seconds, found.level) == (held, lag, seconds, level)


def test_candles_are_shown_and_exported() -> None:
    late = candles_of(gold((3, 90), (4, 40)), candle_ledger(2, ago=65, sequence=1), candle_ledger(3, 5, sequence=2))
    never = replace(late, flow=FlowStatus(FlowState.NEVER, (), 0, None))
    assert lags(late) == {"k2flow_lag_commits": 1.0, "k2flow_lag_seconds": 40.0}
    assert lags(never) == {}
    console = Console(width=200)
    with console.capture() as shown:
        console.print(render(Status(NOW, 0.1, {}, {}, {}, late)))
    assert "candles: runs: process 7 on here, epoch 1; from gold_crypto_trades" in shown.get()
    row = next(line for line in shown.get().splitlines() if line.startswith("│ candles"))
    assert row.replace("│", "").split()[:8] == ["candles", "1", "40.0", "s,", "late", "3", "4", "30"]
    with console.capture() as shown:
        console.print(render(Status(NOW, 0.1, {}, {}, {}, never)))
    assert "candles: no flow has started yet; from gold_crypto_trades" in shown.get()


def lags(candles: CandlesStatus) -> dict[str, float]:
    """Return the metrics of the candles' lag."""
    collector = StatusMetrics(lambda: Status(NOW, 0.1, {}, {}, {}, candles))
    collector.update()
    samples = [sample for family in collector.collect() for sample in family.samples]
    return {each.name: each.value for each in samples if each.labels == {"exchange": "candles", "layer": "candles"}}
