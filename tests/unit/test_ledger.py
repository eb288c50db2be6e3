"""The ledger: contiguity, starts, its text."""

import pytest

from k2flow.errors import CommitError, OffsetGapError
from k2flow.iceberg.ledger import KEY, Extent, Ledger, OffsetRange, Writer, read, start_offsets

TOPIC = "t"


def test_advances_only_over_contiguous_ranges() -> None:
    ledger = Ledger(TOPIC).advanced([OffsetRange(0, 5, 9, 4), OffsetRange(0, 9, 12, 2), OffsetRange(3, 0, 1, 0)])
    assert ledger.partitions == {0: Extent(5, 12, 6), 3: Extent(0, 1, 0)}
    assert ledger.next_offset(0) == 12
    assert ledger.next_offset(1) is None
    assert ledger.sequence == 1


def test_order_of_arrival_does_not_matter() -> None:
    assert Ledger(TOPIC).advanced([OffsetRange(0, 9, 12, 2), OffsetRange(0, 5, 9, 4)]).partitions == {0: Extent(5, 12, 6)}


@pytest.mark.parametrize("first", [11, 13, 0])
@pytest.mark.parametrize("accept", [False, True])
def test_refuses_gaps_and_overlaps(first: int, accept: bool) -> None:
    ledger = Ledger(TOPIC, partitions={0: Extent(0, 12, 12)})
    if accept and first > 12:
        assert ledger.advanced([OffsetRange(0, first, 20, 1)], accept_gaps=True).next_offset(0) == 20
    else:
        with pytest.raises(OffsetGapError, match=r"t\[0\]"):
            ledger.advanced([OffsetRange(0, first, 20, 1)], accept_gaps=accept)


def test_text_round_trip() -> None:
    ledger = Ledger(TOPIC, "id", 3, 41, Writer("host", 7, 1.25), 99, {0: Extent(5, 12, 6)})
    assert read({KEY + "binance": ledger.to_json()}, "binance", TOPIC) == ledger


def test_no_ledger_yet() -> None:
    assert read({}, "binance", TOPIC) == Ledger(TOPIC)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"topic": "t"}', '{"topic":"t","writer":null,"partitions":{"0":5}}'])
def test_damaged_ledger_is_an_error(text: str) -> None:
    with pytest.raises(CommitError, match="is not a ledger"):
        read({KEY + "binance": text}, "binance", TOPIC)


def test_another_topic_is_an_error() -> None:
    with pytest.raises(CommitError, match="K2FLOW_BINANCE_TOPIC"):
        read({KEY + "binance": Ledger("old").to_json()}, "binance", TOPIC)


def test_flow_starts_at_the_smallest_offset_over_the_tables() -> None:
    ledgers = [
        Ledger(TOPIC, partitions={0: Extent(2, 10, 1), 1: Extent(0, 4, 1)}),
        Ledger(TOPIC, partitions={0: Extent(2, 7, 1), 1: Extent(0, 9, 1)}),
    ]
    assert start_offsets(ledgers) == {0: 7, 1: 4}


def test_a_table_that_has_nothing_yet_starts_where_the_others_began() -> None:
    assert start_offsets([Ledger(TOPIC, partitions={0: Extent(2, 10, 1)}), Ledger(TOPIC)]) == {0: 2}
    assert start_offsets([Ledger(TOPIC), Ledger(TOPIC)]) == {}


def test_fence_keeps_offsets_of_the_same_topic_only() -> None:
    ledger = Ledger(TOPIC, "one", 1, 5, partitions={0: Extent(0, 4, 4)})
    writer = Writer.this()
    assert ledger.fenced(writer, "one").partitions == ledger.partitions
    assert ledger.fenced(writer, "").partitions == ledger.partitions
    assert ledger.fenced(writer, "two").partitions == {}
    assert ledger.fenced(writer, "one").epoch == 2


def test_this_process_is_no_other_that_runs() -> None:
    assert not Writer.this().running_here()
    assert not Writer("elsewhere", 1, 0).running_here()


def test_what_was_held_of_a_topic_that_was_made_again_is_kept() -> None:
    old = Ledger("t").fenced(Writer.this(), "one").advanced([OffsetRange(0, 0, 5, 4)])
    new = old.fenced(Writer.this(), "two")
    assert new.partitions == {}
    (earlier,) = new.earlier
    assert (earlier.topic_id, earlier.until, earlier.partitions) == ("one", old.committed_at, old.partitions)
    assert read({KEY + "x": new.to_json()}, "x", "t") == new
    assert new.fenced(Writer.this(), "two").earlier == new.earlier
