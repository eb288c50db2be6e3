"""Where a flow begins, and which events end it; no broker is needed."""

import logging

import pytest
from confluent_kafka import KafkaError as ConfluentError

from k2flow.errors import KafkaError, KafkaRefusedError, LostOffsetsError
from k2flow.iceberg.ledger import CommittedRange, FormerTopic, Ledger
from k2flow.kafka.consumer import PartitionEvent, check_event
from k2flow.kafka.start_offsets import begin_offsets, check_same_topic, ends_in_replaced_log, first_offset
from k2flow.kafka.topic import Topic

TOPIC = Topic("t", "new", (0,))
OLD = Ledger("t", "old", partitions={0: CommittedRange(0, 500, 500)})
NEW = Ledger("t", "new", partitions={0: CommittedRange(3, 90, 87)})


def test_table_of_the_old_topic_starts_where_the_new_one_begins() -> None:
    """After a crash while the loss is accepted, one table has begun with the new topic and another has not."""
    assert begin_offsets(TOPIC, {"bronze": NEW, "silver": OLD}) == {0: 3}


def test_ledger_of_a_deleted_topic_is_refused() -> None:
    check_same_topic(TOPIC, {"bronze": NEW, "silver": Ledger("t")}, False, "ACCEPT")
    check_same_topic(TOPIC, {"bronze": OLD}, True, "ACCEPT")
    with pytest.raises(LostOffsetsError, match=r"was deleted and created again: bronze .* \[0\] before 500; .*ACCEPT"):
        check_same_topic(TOPIC, {"bronze": OLD}, False, "ACCEPT")


@pytest.mark.parametrize(("wanted", "begin"), [(None, 10), (10, 10), (15, 15), (20, 20)])
def test_offsets_that_kafka_has(wanted: int | None, begin: int) -> None:
    assert first_offset(TOPIC, 0, wanted, 10, 20, False, "ACCEPT") == begin


def test_offsets_that_kafka_no_longer_has(caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(LostOffsetsError, match=r"t\[0\]: offsets 7 to 9 \(3 of them\) .* set ACCEPT=1 for one start"):
        first_offset(TOPIC, 0, 7, 10, 20, False, "ACCEPT")
    assert first_offset(TOPIC, 0, 7, 10, 20, True, "ACCEPT") == 10
    assert "offsets 7 to 9 are lost; continuing, as ACCEPT says" in caplog.text


def test_tables_that_end_after_the_topic() -> None:
    """Nothing accepts that: the topic is another one, or was truncated."""
    with pytest.raises(LostOffsetsError, match="end before offset 21 but the topic ends before 20: it was"):
        first_offset(TOPIC, 0, 21, 10, 20, True, "ACCEPT")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        (ConfluentError.OFFSET_OUT_OF_RANGE, LostOffsetsError, r"t\[2\]: Kafka no longer has offset 7, .*\(why\)"),
        (ConfluentError._AUTO_OFFSET_RESET, LostOffsetsError, "start again to see what is lost"),
        (ConfluentError._UNKNOWN_PARTITION, KafkaRefusedError, r"t\[2\]: the partition no longer exists \(why\)"),
    ],
)
def test_fatal_event_is_an_error(code: int, error: type[KafkaError], message: str) -> None:
    with pytest.raises(error, match=message):
        check_event(PartitionEvent(code=code, text="why", partition=2, offset=-1), "t", 7)


def test_other_event_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_event(PartitionEvent(code=ConfluentError._TRANSPORT, text="why", partition=2, offset=-1), "t", None)
    assert "t: why; librdkafka keeps trying" in caplog.text


def log_of(*ranges: CommittedRange, former: int = 0) -> Ledger:
    """Return a ledger of TOPIC, after `former` replaced logs."""
    closed = tuple(FormerTopic("new", i, {0: CommittedRange(0, 5, 5)}) for i in range(former))
    return Ledger("t", "new", partitions=dict(enumerate(ranges)), former_topics=closed)


def test_all_tables_continue_in_a_replaced_log_where_the_furthest_ends() -> None:
    ledgers = {
        "bronze": log_of(CommittedRange(0, 40, 40)),
        "silver": log_of(CommittedRange(0, 30, 30)),
        "dlq": log_of(),
    }
    assert ends_in_replaced_log(TOPIC, ledgers, {0}) == {name: {0: 40} for name in ledgers}
    assert ends_in_replaced_log(TOPIC, ledgers, ()) == {name: {} for name in ledgers}


def test_after_a_kill_between_fences_the_others_continue_where_the_first_began() -> None:
    """Bronze has begun the new log at offset 40, and has read on."""
    ledgers = {
        "bronze": log_of(CommittedRange(40, 70, 30), former=1),
        "silver": log_of(CommittedRange(0, 30, 30)),
        "gold": log_of(CommittedRange(0, 40, 40)),
    }
    assert ends_in_replaced_log(TOPIC, ledgers, {0}) == {"bronze": {}, "silver": {0: 40}, "gold": {0: 40}}


def test_log_that_is_replaced_twice() -> None:
    once = {
        "bronze": log_of(CommittedRange(40, 70, 30), former=1),
        "silver": log_of(CommittedRange(40, 60, 20), former=1),
    }
    assert ends_in_replaced_log(TOPIC, once, {0}) == {"bronze": {0: 70}, "silver": {0: 70}}
    once["bronze"] = log_of(CommittedRange(70, 70, 0), former=2)
    assert ends_in_replaced_log(TOPIC, once, {0}) == {"bronze": {}, "silver": {0: 70}}
