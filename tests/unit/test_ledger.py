"""The ledger: contiguous offsets, start offsets, its JSON."""

from dataclasses import replace

import pytest

from k2flow.errors import CommitError, OffsetGapError
from k2flow.iceberg.ledger import (
    EVIDENCE_KEY,
    KEY,
    CommittedRange,
    Evidence,
    FormerTopic,
    Ledger,
    Mark,
    OffsetRange,
    Writer,
    read,
    start_offsets,
)

TOPIC = "t"


def test_ledger_advances_over_contiguous_ranges() -> None:
    ledger = Ledger(TOPIC).advanced([OffsetRange(0, 5, 9, 4), OffsetRange(0, 9, 12, 2), OffsetRange(3, 0, 1, 0)])
    assert ledger.partitions == {0: CommittedRange(5, 12, 6), 3: CommittedRange(0, 1, 0)}
    assert ledger.next_offset(0) == 12
    assert ledger.next_offset(1) is None
    assert ledger.sequence == 1


def test_order_of_ranges_does_not_matter() -> None:
    assert Ledger(TOPIC).advanced([OffsetRange(0, 9, 12, 2), OffsetRange(0, 5, 9, 4)]).partitions == {
        0: CommittedRange(5, 12, 6)
    }


@pytest.mark.parametrize("first", [11, 13, 0])
@pytest.mark.parametrize("accept", [False, True])
def test_gaps_and_overlaps_are_refused(first: int, accept: bool) -> None:
    ledger = Ledger(TOPIC, partitions={0: CommittedRange(0, 12, 12)})
    if accept and first > 12:
        assert ledger.advanced([OffsetRange(0, first, 20, 1)], accept_gaps=True).next_offset(0) == 20
    else:
        with pytest.raises(OffsetGapError, match=r"t\[0\]"):
            ledger.advanced([OffsetRange(0, first, 20, 1)], accept_gaps=accept)


def test_json_round_trip() -> None:
    ledger = Ledger(TOPIC, "id", 3, 41, Writer("host", 7, 1.25), 99, {0: CommittedRange(5, 12, 6)})
    assert read({KEY + "binance": ledger.to_json()}, "binance", TOPIC) == ledger


def test_json_is_the_one_that_existing_tables_hold() -> None:
    """Written by an earlier version, with `json.dumps` of its dataclasses."""
    text = (
        '{"topic":"t","topic_id":"id","epoch":3,"sequence":41,"writer":{"host":"h\\u00f6st","pid":7,"started":1.25},'
        '"committed_at":99,"partitions":{"0":{"first":5,"next":12,"rows":6}},"earlier":'
        '[{"topic_id":"old","until":8,"partitions":{"1":{"first":0,"next":2,"rows":2}}}]}'
    )
    former = FormerTopic("old", 8, {1: CommittedRange(0, 2, 2)})
    ledger = Ledger(TOPIC, "id", 3, 41, Writer("h\xf6st", 7, 1.25), 99, {0: CommittedRange(5, 12, 6)}, (former,))
    assert read({KEY + "binance": text}, "binance", TOPIC) == ledger
    assert ledger.to_json() == text


def test_missing_ledger_is_empty() -> None:
    assert read({}, "binance", TOPIC) == Ledger(TOPIC)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"topic":"t","writer":null,"partitions":{},"unknown":1}',
        '{"topic": "t"}',
        '{"topic":"t","writer":null,"partitions":{"0":5}}',
    ],
)
def test_damaged_ledger_is_an_error(text: str) -> None:
    with pytest.raises(CommitError, match="is not a ledger") as error:
        read({KEY + "binance": text}, "binance", TOPIC)
    assert "\n" not in str(error.value)


def test_ledger_of_another_topic_is_an_error() -> None:
    with pytest.raises(CommitError, match="K2FLOW_BINANCE_TOPIC"):
        read({KEY + "binance": Ledger("old").to_json()}, "binance", TOPIC)


def test_flow_starts_at_the_smallest_next_offset_of_all_tables() -> None:
    ledgers = [
        Ledger(TOPIC, partitions={0: CommittedRange(2, 10, 1), 1: CommittedRange(0, 4, 1)}),
        Ledger(TOPIC, partitions={0: CommittedRange(2, 7, 1), 1: CommittedRange(0, 9, 1)}),
    ]
    assert start_offsets(ledgers) == {0: 7, 1: 4}


def test_empty_table_starts_at_the_first_offset_of_the_others() -> None:
    assert start_offsets([Ledger(TOPIC, partitions={0: CommittedRange(2, 10, 1)}), Ledger(TOPIC)]) == {0: 2}
    assert start_offsets([Ledger(TOPIC), Ledger(TOPIC)]) == {}


def test_fence_keeps_the_offsets_of_the_same_topic_only() -> None:
    ledger = Ledger(TOPIC, "one", 1, 5, partitions={0: CommittedRange(0, 4, 4)})
    writer = Writer.this()
    assert ledger.fenced(writer, "one").partitions == ledger.partitions
    assert ledger.fenced(writer, "").partitions == ledger.partitions
    assert ledger.fenced(writer, "two").partitions == {}
    assert ledger.fenced(writer, "one").writer_epoch == 2


def test_running_here_excludes_this_process_and_other_hosts() -> None:
    assert not Writer.this().running_here()
    assert not Writer("elsewhere", 1, 0).running_here()


def test_offsets_of_a_deleted_topic_are_kept() -> None:
    old = Ledger("t").fenced(Writer.this(), "one").advanced([OffsetRange(0, 0, 5, 4)])
    new = old.fenced(Writer.this(), "two")
    assert new.partitions == {}
    (former,) = new.former_topics
    assert (former.topic_id, former.until, former.partitions) == ("one", old.committed_at, old.partitions)
    assert read({KEY + "x": new.to_json()}, "x", "t") == new
    assert new.fenced(Writer.this(), "two").former_topics == new.former_topics


MARK = Mark(11, 1764000000000, "8b1a9953c4611296", 3)


def test_evidence_is_a_property_of_its_own() -> None:
    """An earlier version ignores it, and refuses a ledger with unknown keys."""
    ledger = Ledger(TOPIC, "id").fenced(Writer.this(), "id").advanced([OffsetRange(0, 0, 12, 9, MARK)]).in_snapshot()
    properties = ledger.properties("x")
    assert properties == {
        KEY + "x": ledger.to_json(),
        EVIDENCE_KEY
        + "x": '{"sequence":2,"appended":2,"marks":{"0":[11,1764000000000,"8b1a9953c4611296",3]},"lost":{}}',
    }
    assert "mark" not in ledger.to_json()
    again = read(properties, "x", TOPIC)
    assert again.evidence == Evidence(2, 2, {0: MARK})
    assert again == ledger


def test_commit_of_an_earlier_version_leaves_the_marks_but_not_the_last_append() -> None:
    ledger = Ledger(TOPIC).fenced(Writer.this(), "id").advanced([OffsetRange(0, 0, 12, 9, MARK)]).in_snapshot()
    later = ledger.advanced([OffsetRange(0, 12, 15, 3)])
    evidence = read({**ledger.properties("x"), KEY + "x": later.to_json()}, "x", TOPIC).evidence
    assert (evidence.appended, evidence.marks) == (None, {0: MARK})
    with pytest.raises(CommitError, match=r"is damaged .*: remove it"):
        read({**ledger.properties("x"), EVIDENCE_KEY + "x": '{"marks":{"0":[]}}'}, "x", TOPIC)


def test_range_without_a_message_keeps_the_mark() -> None:
    ledger = Ledger(TOPIC).advanced([OffsetRange(0, 0, 12, 9, MARK)]).advanced([OffsetRange(0, 12, 15, 0)])
    assert ledger.evidence.marks == {0: MARK}


def test_topic_that_is_back_continues_where_it_ended() -> None:
    """A process died between the fences of the new topic, and the old one was restored."""
    one = Ledger(TOPIC).fenced(Writer.this(), "one").advanced([OffsetRange(0, 0, 5, 4, MARK)])
    back = one.fenced(Writer.this(), "two").fenced(Writer.this(), "one")
    assert back.partitions == {0: CommittedRange(5, 5, 0)}
    assert [former.topic_id for former in back.former_topics] == ["one"]
    assert back.evidence.marks == {}


@pytest.mark.parametrize("no_id", ["", "AAAAAAAAAAAAAAAAAAAAAA", "None"])
def test_topic_id_of_a_broker_without_ids_is_unknown(no_id: str) -> None:
    text = Ledger(TOPIC, no_id, partitions={0: CommittedRange(0, 5, 4)}).to_json()
    ledger = read({KEY + "x": text}, "x", TOPIC)
    assert ledger.topic_id == ""
    assert ledger.fenced(Writer.this(), "now known").partitions == ledger.partitions


def test_replaced_log_becomes_a_former_topic() -> None:
    ledger = Ledger(TOPIC, "id", partitions={0: CommittedRange(0, 5, 4), 1: CommittedRange(0, 3, 3)})
    ledger = replace(ledger, evidence=Evidence(marks={0: MARK, 1: MARK}))
    begun = ledger.of_log({0: 9})
    assert begun.partitions == {0: CommittedRange(9, 9, 0), 1: CommittedRange(0, 3, 3)}
    assert begun.former_topics == (FormerTopic("id", 0, {0: CommittedRange(0, 5, 4)}),)
    assert begun.evidence.marks == {1: MARK}
    assert ledger.of_log({}) is ledger
