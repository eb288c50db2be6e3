"""The guarantees of deduplication against a model in plain Python, with random batches, commits and restarts."""

import uuid
from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from k2flow.dedup import SeenIds, index, keys, loading, owners_of, sorted_runs
from tests.property import examples

WINDOW = 4
START = 500_000
TAGS = sorted_runs.TAGS
POOL = [
    *(str(uuid.UUID(int=number * 0x9E3779B97F4A7C15F39CC0605CEDC835 % (1 << 128))) for number in range(40)),
    *(str(uuid.UUID(int=number)).upper() for number in range(8, 14)),
    *(text * times for text in ("", "\0", "a", "é", "0g000000-0000-4000-8000-000000000000") for times in (1, 2, 20)),
]

# Ages of rows in hours: in the window, at its edge, far outside, and once or twice the modulus of tags away.
AGES = st.sampled_from([0, 0, 0, 1, 2, 3, 4, 9, -1, -48, TAGS, TAGS + 1, 2 * TAGS, START + 7, -70_000_000])
ROWS = st.lists(st.tuples(st.sampled_from(POOL), AGES), max_size=40)
# Kafka's time of a batch's messages: now, a lagging partition, producers with wrong clocks, and none at all.
KAFKA_AGES = st.lists(st.sampled_from([0, 0, 0, 2, 5, 9, -48, TAGS, -70_000_000]), max_size=4)
BATCHES = st.tuples(ROWS, KAFKA_AGES)
STEPS = st.lists(
    st.one_of(
        BATCHES,
        BATCHES,
        st.sampled_from(["commit", "commit", "restart"]),
        st.sampled_from([1, 2, 5, TAGS]).map(lambda hours: ("later by", hours)),
    ),
    min_size=8,
    max_size=60,
)


def weak_scramble(words: keys.Words) -> tuple[keys.Words, keys.Words]:
    """Scramble words into only 16 distinct heads, still without loss: each look-up meets other ids of the same head."""
    head, rest = STRONG_SCRAMBLE(words)
    return head & np.uint64(0xC0000000C0000000), np.column_stack([head, rest])


STRONG_SCRAMBLE = keys._scramble


class Flow:
    """A flow with its workers, and the Gold table that it commits to."""

    def __init__(self, gold: list[tuple[str, int]], workers: int, window: int) -> None:
        self.gold, self.accepted, self.workers, self.window = (list(gold), list[tuple[str, int]](), workers, window)
        self.restart()

    def restart(self) -> None:
        """Lose all uncommitted rows."""
        self.accepted.clear()
        self.seen = [
            SeenIds(self.load, self.newest, self.window, worker, self.workers) for worker in range(self.workers)
        ]

    def newest(self, until: Sequence[int]) -> list[int | None]:
        return [max((at for _, at in self.gold if at <= hour), default=None) for hour in until]

    def load(self, hours: Sequence[int]) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        return ((hour, self.read(hour)) for hour in hours)

    def read(self, hour: int) -> Iterator[pa.Array]:
        found = [text for text, at in self.gold if at == hour]
        for a in range(0, len(found), 5):
            yield pa.array(["-", *found[a : a + 5]], pa.string())[1:]

    def commit(self) -> None:
        self.gold += self.accepted
        self.accepted.clear()
        for seen in self.seen:
            seen.on_commit()

    def accept(self, rows: list[tuple[str, int]], kafka: list[int]) -> list[bool]:
        """Route each row to its worker, and check each result against the guarantees."""
        owners = owners_of(pa.array([text for text, _ in rows], pa.string()), self.workers)
        first = [False] * len(rows)
        for worker in range(self.workers):
            at = np.flatnonzero(owners == worker).tolist()
            for place, mark in zip(at, self.accept_own(worker, [rows[i] for i in at], kafka), strict=True):
                first[place] = mark
        return first

    def accept_own(self, worker: int, rows: list[tuple[str, int]], kafka: list[int]) -> list[bool]:
        seen, before = self.seen[worker], self.gold + self.accepted
        ids = pa.array(["-", *(text for text, _ in rows)], pa.string())[1:]
        marks = seen.accept_new(ids, np.array([hour for _, hour in rows], np.int64), Counter(kafka)).tolist()

        window: set[int] = set()
        if self.workers == 1:  # several may not know each other's latest commits yet
            for hour in kafka:
                newest = max((at for _, at in [*before, *rows] if at <= hour), default=None)
                window |= set() if newest is None else {*range(newest - self.window + 1, newest + self.window)}
        assert seen.hours >= window.union(hour for _, hour in rows)

        held = [(text, hour) for text, hour in self.gold + self.accepted if hour in seen.hours]
        known = {text for text, _ in held}
        for (text, hour), first in zip(rows, marks, strict=True):
            assert first == (text not in known)
            if first:
                everything = self.gold + self.accepted
                assert (text, hour) not in everything
                assert not any(text == t and h in window for t, h in everything)
                self.accepted.append((text, hour))
            known.add(text)
        mine = {
            (text, hour)
            for text, hour in self.gold + self.accepted
            if hour in seen.hours and owners_of(pa.array([text]), self.workers)[0] == worker
        }
        assert seen.ids >= len(mine)
        assert len(self.gold) != len(set(self.gold)) or seen.ids == len(mine)
        return [bool(mark) for mark in marks]


@pytest.fixture(params=["strong", "weak"])
def small_thresholds(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make all thresholds so small that each is often exceeded."""
    monkeypatch.setattr(loading, "_SORT_ROWS", 6)
    monkeypatch.setattr(index, "_EVICTION_GROWTH", 3)
    monkeypatch.setattr(sorted_runs, "_CHUNK", 5)
    monkeypatch.setattr(sorted_runs, "_SIZE_RATIO", 2)
    monkeypatch.setattr(keys, "_BLOCK_ROWS", 7)
    if request.param == "weak":
        monkeypatch.setattr(keys, "_scramble", weak_scramble)


# The fixture patches the same constants for every example, so one call serves all examples.
QUICK = settings(
    max_examples=examples(80), suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.mark.usefixtures("small_thresholds")
@pytest.mark.parametrize("workers", [1, 3])
@QUICK
@given(gold=ROWS, steps=STEPS)
def test_guarantees_hold_for_any_batches_commits_and_restarts(
    workers: int, gold: list[tuple[str, int]], steps: list[object]
) -> None:
    now = START
    flow = Flow([(text, now - age) for text, age in gold], workers, WINDOW)
    for step in steps:
        match step:
            case "commit":
                flow.commit()
            case "restart":
                flow.restart()
            case ("later by", int(hours)):
                now += hours
            case (list(rows), list(kafka)):
                flow.accept([(text, now - age) for text, age in rows], [now - age for age in kafka])


@pytest.mark.usefixtures("small_thresholds")
@QUICK
@given(
    batches=st.lists(
        st.lists(st.tuples(st.sampled_from(POOL), st.integers(-3, 3)), max_size=40) | st.none(), max_size=12
    )
)
def test_three_workers_accept_the_same_rows_as_one(batches: list[list[tuple[str, int]] | None]) -> None:
    """All rows are in the hot window: outside it, each worker loads only the hours of its own rows."""
    one, three = Flow([("a", 0), (POOL[0], 2)], 1, 10), Flow([("a", 0), (POOL[0], 2)], 3, 10)
    for batch in batches:
        if batch is None:
            one.commit()
            three.commit()
        else:
            assert one.accept(batch, [3]) == three.accept(batch, [3])


TRADES = st.tuples(*[st.sampled_from(["", "a", "1", "1:", "ab", "b", "2:ab", "é" * 9, POOL[0]])] * 2)


@pytest.mark.usefixtures("small_thresholds")
@pytest.mark.parametrize("workers", [1, 3])
@QUICK
@given(
    steps=st.lists(st.lists(st.tuples(TRADES, st.integers(0, 3)), max_size=30) | st.sampled_from(["commit", "restart"]))
)
def test_keys_of_two_columns_are_new_as_in_a_plain_set(workers: int, steps: list[object]) -> None:
    """Some symbols and trade ids are equal when joined. A restart reads the keys back from Gold."""
    flow, gold, accepted = Flow([], workers, WINDOW), set[tuple[str, str]](), set[tuple[str, str]]()
    for step in steps:
        match step:
            case "commit":
                flow.commit()
                gold |= accepted
            case "restart":
                flow.restart()
                accepted = set(gold)
            case list(rows) if rows:
                columns = [pa.array(column, pa.string()) for column in zip(*(trade for trade, _ in rows), strict=True)]
                batch = pa.RecordBatch.from_arrays(columns, ["symbol", "trade_id"])
                ids = keys.key_column(batch, ("symbol", "trade_id")).to_pylist()
                marks = flow.accept([(text, hour) for text, (_, hour) in zip(ids, rows, strict=True)], [3])
                for (trade, _), first in zip(rows, marks, strict=True):
                    assert first == (trade not in accepted)
                    accepted.add(trade)


@given(
    ids=st.lists(
        st.one_of(
            st.text(max_size=80),
            st.uuids().map(str),
            st.text("0123456789abcdefABCDEFg-\0", min_size=36, max_size=36),
            st.text("ab\0", max_size=17),
        ),
        max_size=60,
    ),
    start=st.integers(0, 5),
)
@settings(max_examples=examples(100))
def test_keys_are_equal_only_for_equal_strings(ids: list[str], start: int) -> None:
    ids = [text.encode("utf-8", "replace").decode() for text in ids]
    found: dict[int, tuple[int, ...]] = {}
    for form, (rows, head, rest) in enumerate(keys.encode_keys(pa.array(ids, pa.string())[start:])):
        for row, first, others in zip(rows.tolist(), head.tolist(), rest.tolist(), strict=True):
            found[row] = (form, first, *others)
    texts = ids[start:]
    assert sorted(found) == list(range(len(texts)))
    by_key: dict[tuple[int, ...], str] = {}
    for row, text in enumerate(texts):
        assert by_key.setdefault(found[row], text) == text
    assert len(by_key) == len(set(texts))


@given(rows=st.lists(st.lists(st.text("a1:é\0", max_size=12), min_size=3, max_size=3), min_size=1, max_size=40))
@settings(max_examples=examples(100))
def test_key_columns_are_equal_only_for_equal_rows(rows: list[list[str]]) -> None:
    names = ("x", "y", "z")
    batch = pa.RecordBatch.from_arrays([pa.array(column, pa.string()) for column in zip(*rows, strict=True)], names)
    for columns in (names, names[:2], names[:1]):
        ids = keys.key_column(batch, columns).to_pylist()
        tuples = [tuple(row[: len(columns)]) for row in rows]
        assert len(set(ids)) == len(set(tuples)) == len(set(zip(ids, tuples, strict=True)))
