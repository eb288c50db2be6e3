"""Deduplication: the key column, encoded keys, sorted runs, and the index over both."""

import re
import time
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pytest

from k2flow.dedup import SeenIds, index, loading, merging, owners_of, sorted_runs
from k2flow.dedup.keys import WORDS, encode_keys, key_column, owners_of_heads, share_of
from k2flow.dedup.sorted_runs import TAGS, WHOLE, SortedRun, SortedRuns, distinct_positions, joined
from k2flow.errors import DedupError, K2flowError

UUID = "0b9e8d1c-52a7-4f63-9d0a-7c3f1e2b4a58"
TRICKY = [
    *("", "\0", "\0" * 15, "\0" * 16, "a", "a\0", "a\0\0", "A", " a", "é", "e\u0301", "\U0001f600", "ÿ" * 8),
    *(UUID, UUID.upper(), UUID.replace("-", ""), "{" + UUID + "}", UUID[:-1], UUID + "\0", UUID[:-1] + "\0"),
    *(UUID.replace("-", "_"), UUID.replace("-", "0"), UUID[1:] + "-", UUID[:-1] + "é", "urn:uuid:" + UUID),
    *("g" + UUID[1:], "/" + UUID[1:], ":" + UUID[1:], "`" + UUID[1:], "@" + UUID[1:], UUID[:-2] + "é"),
    *("x" * size for size in range(1, 140)),
    *("x" * size + "\0" for size in range(1, 140)),
    *("y" + "x" * size for size in range(1, 140)),
    *("é" * size for size in range(2, 70)),
    *("x" * 100_000, "x" * 100_001, "x" * 99_999 + "y"),
]


def strings(values: Iterable[str | None]) -> pa.Array:
    return pa.array(list(values), pa.string())


def hours_of(*values: int) -> np.ndarray:
    return np.array(values, np.int64)


def key_tuples(ids: pa.Array | pa.ChunkedArray) -> list[tuple[int, ...]]:
    """Return each id's form and words, in the order of the ids."""
    found: list[tuple[int, ...]] = [()] * len(ids)
    for form, (rows, head, rest) in enumerate(encode_keys(ids)):
        assert rest.shape == (len(rows), WORDS[form] - 1)
        assert (np.diff(rows) > 0).all()
        for row, first, others in zip(rows.tolist(), head.tolist(), rest.tolist(), strict=True):
            assert found[row] == ()
            found[row] = (form, first, *others)
    assert () not in found
    return found


class Gold:
    """The rows of Gold, and the hours loaded from it."""

    def __init__(self) -> None:
        self.rows: list[tuple[str, int]] = []
        self.others: list[int] = []  # hours of rows of other workers
        self.loaded: list[int] = []

    def load(self, hours: Sequence[int]) -> Iterator[tuple[int, Iterator[pa.Array]]]:
        for hour in hours:
            self.loaded.append(hour)
            yield hour, self.read(hour)

    def read(self, hour: int) -> Iterator[pa.Array]:
        found = [text for text, at in self.rows if at == hour]
        for a in range(0, len(found), 3):
            yield strings(found[a : a + 3])

    def newest(self, until: Sequence[int]) -> list[int | None]:
        hours = [*self.others, *(at for _, at in self.rows)]
        return [max((at for at in hours if at <= hour), default=None) for hour in until]


class SeenAtHead(SeenIds):
    """An index whose messages all have the Kafka hour of the newest row so far, like those of a live topic."""

    head = -(2**40)

    def accept_new(self, ids: pa.Array, hours: np.ndarray, kafka_hours: Mapping[int, int] | None = None) -> np.ndarray:
        if kafka_hours is None:
            self.head = max([self.head, *hours.tolist()])
            kafka_hours = {self.head: len(hours)}
        return super().accept_new(ids, hours, kafka_hours)


def seen_at(head: int, gold: Gold, window_hours: int = 24, **more: int) -> SeenAtHead:
    """Return an index over a Gold with a row of another worker at `head`, where the topic is."""
    gold.others.append(head)
    seen = SeenAtHead(gold.load, gold.newest, window_hours, **more)
    seen.head = head
    return seen


def trades(*pairs: tuple[str | None, str | None]) -> pa.RecordBatch:
    symbols, trade_ids = zip(*pairs, strict=True)
    return pa.record_batch({"symbol": strings(symbols), "trade_id": strings(trade_ids), "sequence": [1] * len(pairs)})


class TestKeyColumn:
    def test_single_column_is_not_copied(self) -> None:
        rows = trades(("a", "1"), (None, "2"))
        column = key_column(rows[1:], ("trade_id",))
        assert column.to_pylist() == ["2"]
        assert column.buffers()[2].address == rows.column("trade_id").buffers()[2].address

    def test_several_columns_are_prefixed_with_their_length_in_bytes(self) -> None:
        rows = trades(("a", "bc"), ("ab", "c"), ("é", ""), ("", "1:abc"), ("a", None), (None, "a"))
        assert key_column(rows[1:], ("symbol", "trade_id")).to_pylist() == ["2:abc", "2:é", "0:1:abc", None, None]
        assert key_column(rows[:1], ("symbol", "trade_id", "symbol")).to_pylist() == ["1:a2:bca"]

    def test_wrong_columns(self) -> None:
        with pytest.raises(DedupError, match="no columns"):
            key_column(trades(("a", "1")), ())
        for columns in (("sequence",), ("symbol", "sequence")):
            with pytest.raises(DedupError, match="sequence is int64"):
                key_column(trades(("a", "1")), columns)

    def test_deduplication_by_symbol_and_trade_id(self) -> None:
        """Trade ids of one exchange may be unique only within a symbol."""
        key = ("symbol", "trade_id")
        rows = trades(("BTC", "1"), ("ETH", "1"), ("BTC", "1"), ("BTC", "11"), ("BTC1", "1"), ("BTC", "11"))
        gold = Gold()
        gold.rows = [(text, 7) for text in key_column(rows[1:2], key).to_pylist()]
        seen = seen_at(7, gold)
        accepted = seen.accept_new(key_column(rows, key), np.full(6, 7, np.int64))
        assert accepted.tolist() == [True, False, False, True, True, False]
        with pytest.raises(DedupError, match="null"):
            seen.accept_new(key_column(trades(("BTC", None)), key), hours_of(7))


class TestEncodedKeys:
    def test_keys_are_equal_only_for_equal_strings(self) -> None:
        assert len(set(TRICKY)) == len(TRICKY)
        assert len(set(key_tuples(strings(TRICKY)))) == len(TRICKY)
        assert key_tuples(strings(TRICKY)) == key_tuples(strings(TRICKY))

    def test_form_depends_on_length_and_format(self) -> None:
        texts = [UUID, "", "x" * 15, "x" * 16, "x" * 31, "x" * 32, UUID.upper(), "x" * 63, "x" * 64, "é" * 32]
        assert [key[0] for key in key_tuples(strings(texts))] == [0, 1, 1, 2, 2, 3, 3, 3, 4, 4]

    def test_every_one_byte_change_of_a_uuid_changes_the_key(self) -> None:
        changed = {UUID[:at] + chr(code) + UUID[at + 1 :] for at in range(36) for code in range(128)}
        found = key_tuples(strings(changed))
        assert len(set(found)) == len(changed)
        canonical = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
        for text, key in zip(changed, found, strict=True):
            assert (key[0] == 0) == (canonical.fullmatch(text) is not None), text

    def test_uuids_with_non_ascii_bytes_are_not_canonical(self) -> None:
        texts = [UUID[:at] + pair + UUID[at + 2 :] for at in range(35) for pair in ("é", "\u0430", "\u07ff")]
        assert {key[0] for key in key_tuples(strings(texts))} == {3}
        assert len(set(key_tuples(strings(texts)))) == len(texts)

    def test_random_uuids_in_several_blocks_have_distinct_keys(self) -> None:
        rng = np.random.default_rng(1)
        texts = [str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(10_000)]
        found = key_tuples(strings(texts))
        assert {key[0] for key in found} == {0}
        assert len(set(found)) == len(texts)

    @pytest.mark.parametrize("kind", [pa.string(), pa.large_string(), pa.string_view()])
    def test_any_string_type_may_be_sliced_or_chunked(self, kind: pa.DataType) -> None:
        expected = key_tuples(strings(TRICKY))
        whole = pa.array(TRICKY, kind)
        assert key_tuples(whole) == expected
        for a, b in ((0, 5), (1, 1), (3, 200), (100, len(TRICKY))):
            assert key_tuples(whole[a:b]) == expected[a:b]
            assert key_tuples(whole[a:][: b - a]) == expected[a:b]
        chunked = pa.chunked_array([whole[:7], whole[7:7], whole[7:300], whole[300:]])
        assert key_tuples(chunked) == expected
        assert key_tuples(chunked[5:310]) == expected[5:310]

    def test_dictionary_arrays_are_decoded(self) -> None:
        texts = ["a", UUID, "a", "x" * 70, UUID]
        assert key_tuples(strings(texts).dictionary_encode()[1:]) == key_tuples(strings(texts[1:]))

    def test_empty_arrays_have_no_keys(self) -> None:
        assert key_tuples(strings([])) == []
        assert key_tuples(pa.chunked_array([], pa.string())) == []

    @pytest.mark.parametrize("make", [encode_keys, lambda ids: owners_of(ids, 2)])
    def test_null_id_is_an_error(self, make: object) -> None:
        assert callable(make)
        for ids in (pa.array(["a", None]), pa.chunked_array([["a"], [None]]), pa.nulls(1)):
            with pytest.raises(DedupError, match="null"):
                make(ids)
        assert make(pa.array([None, "a"])[1:]) is not None
        assert issubclass(DedupError, K2flowError)


class TestOwners:
    @pytest.mark.parametrize(
        "texts",
        [
            [str(number) for number in range(30_000)],
            [f"{number:>15}" for number in range(30_000)],
            [f"BINANCE-BTCUSDT-{number}" for number in range(30_000)],
            [str(uuid.UUID(int=number)) for number in range(30_000)],
            [str(uuid.UUID(int=number << 96)) for number in range(30_000)],
            [f"{number:0>80}" for number in range(30_000)],
        ],
        ids=["numbers", "padded numbers", "names", "low bits of UUIDs", "high bits of UUIDs", "long"],
    )
    def test_owners_and_the_heads_of_one_owner_are_uniform(self, texts: list[str]) -> None:
        owners = owners_of(strings(texts), 3)
        counts = np.bincount(owners, minlength=3)
        assert abs(counts - 10_000).max() < 500
        (heads,) = (form.head[owners[form.rows] == 1] for form in encode_keys(strings(texts)) if len(form.rows))
        assert abs(np.bincount(share_of(1, 3).cells(heads, 8), minlength=8) - 1250).max() < 200

    def test_owners_never_change_between_versions(self) -> None:
        """Processes of one flow must agree, so the owners are pinned."""
        texts = ["", "a", UUID, UUID.upper(), "x" * 20, "x" * 100]
        assert owners_of(strings(texts), 1000).tolist() == [0, 717, 176, 965, 720, 746]
        assert owners_of(strings(["-", *texts])[1:], 1).tolist() == [0] * len(texts)

    def test_shares_are_the_heads_of_their_owners(self) -> None:
        edges = np.array([0, 1, 1 << 31, (1 << 32) - 1, 1 << 32, 1 << 63, (1 << 64) - 1], np.uint64)
        for workers in (1, 2, 3, 7, 64):
            shares = [share_of(worker, workers) for worker in range(workers)]
            assert [share.first for share in shares] == [0, *(share.end for share in shares[:-1])]
            bounds = np.array([share.first << 32 for share in shares], np.uint64)
            heads = np.concatenate([edges, bounds, bounds - np.uint64(1)])
            for head, owner in zip(heads.tolist(), owners_of_heads(heads, workers).tolist(), strict=True):
                assert shares[owner].first <= head >> 32 < shares[owner].end
                for cells in (1, 16, 12_345_678):
                    (cell,) = shares[owner].cells(np.array([head], np.uint64), cells).tolist()
                    assert 0 <= cell < cells

    def test_zero_workers_is_an_error(self) -> None:
        with pytest.raises(DedupError, match="workers is 0"):
            owners_of(strings(["a"]), 0)


def run_of(pairs: Iterable[tuple[int, int]], tag: int = 0) -> SortedRun:
    """Build a run of keys of two words."""
    ordered = sorted(pairs)
    head = np.array([a for a, _ in ordered], np.uint64)
    rest = np.array([[b] for _, b in ordered], np.uint64)
    return SortedRun(head, rest, np.full(len(ordered), tag, np.uint16))


def found_in(held: SortedRun | SortedRuns, pairs: list[tuple[int, int]]) -> list[bool]:
    head = np.array([a for a, _ in pairs], np.uint64)
    return held.find(head, np.array([b for _, b in pairs], np.uint64).reshape(-1, 1)).tolist()


TOP = (1 << 64) - 1


class TestSortedRuns:
    def test_distinct_positions_are_the_earliest_of_each_key(self) -> None:
        head = np.array([5, 1, 5, 5, 1, 9, 5, 5], np.uint64)
        rest = np.array([[2, 0], [7, 7], [1, 0], [2, 0], [7, 7], [0, 0], [1, 0], [2, 1]], np.uint64)
        order = distinct_positions(head, rest)
        assert sorted(order.tolist()) == [0, 1, 2, 5, 7]
        assert head[order].tolist() == [1, 5, 5, 5, 9]
        assert distinct_positions(head[:0], rest[:0]).tolist() == []

    def test_find_compares_head_and_rest(self) -> None:
        here = [(0, 0), (0, 1), (3, 3), (3, 9), (1 << 63, 0), (TOP, 5), (TOP, TOP)]
        gone = [(0, 2), (1, 0), (3, 4), (1 << 62, 0), ((1 << 63) + 1, 0), (TOP - 1, 5), (TOP, 6)]
        assert found_in(run_of(here), here + gone) == [True] * 7 + [False] * 7
        assert found_in(run_of([(TOP, 1)]), [(TOP, 1), (0, 1), (TOP, 0)]) == [True, False, False]
        assert found_in(run_of([(0, 1)]), [(TOP, 1), (0, 1), (0, 0)]) == [False, True, False]
        assert found_in(run_of(here), []) == []

    def test_million_equal_keys_do_not_slow_a_find(self) -> None:
        many = 1_000_000
        held = SortedRun(np.full(many, 7 << 60, np.uint64), np.full((many, 1), 7, np.uint64), np.zeros(many, np.uint16))
        started = time.process_time()
        assert found_in(held, [(6 << 60, 7), (7 << 60, 7), (8 << 60, 7)]) == [False, True, False]
        assert time.process_time() - started < 1

    @pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 16])
    @pytest.mark.parametrize("spread", [3, 1 << 8, 1 << 40])
    def test_merge_and_evict_match_a_list(self, monkeypatch: pytest.MonkeyPatch, chunk: int, spread: int) -> None:
        monkeypatch.setattr(sorted_runs, "_CHUNK", chunk)
        rng = np.random.default_rng(chunk + spread)
        held, model = SortedRuns(), list[tuple[int, int, int]]()
        for turn in range(30):
            tag = int(rng.integers(4)) * 21_845
            heads = rng.integers(0, spread, int(rng.integers(1, 30)), np.uint64) * np.uint64(TOP // spread)
            pairs = [(head, int(rng.integers(3))) for head in heads.tolist()]
            held.add([run_of(pairs, tag)])
            model += [(*pair, tag) for pair in pairs]
            if turn % 7 == 6:
                keep = np.ones(TAGS, np.bool_)
                keep[tag] = False
                held.evict(keep)
                model = [entry for entry in model if entry[2] != tag]
            assert len(held) == len(model)
            known = {(a, b) for a, b, _ in model}
            asked = sorted([(a, b) for a, b, _ in model] + [(a, 3) for a, _ in pairs] + pairs + [(1, 1), (TOP, 0)])
            assert found_in(held, asked) == [pair in known for pair in asked]
            sizes = [len(run) for run in held]
            assert all(a >= 8 * b > 0 for a, b in pairwise(sizes))
        held.evict(np.zeros(TAGS, np.bool_))
        assert (len(held), held.nbytes, list(held)) == (0, 0, [])

    @pytest.mark.parametrize("threads", [1, 3])
    @pytest.mark.parametrize("spread", [3, 1 << 10, 1 << 40])
    def test_joined_runs_are_all_their_keys(self, monkeypatch: pytest.MonkeyPatch, threads: int, spread: int) -> None:
        monkeypatch.setattr(merging, "_BLOCK", 16)
        rng = np.random.default_rng(spread)
        model, runs = list[tuple[int, int]](), []
        for size in (1, 700, 3, 90):
            heads = rng.integers(0, spread, size, np.uint64) * np.uint64(TOP // spread)
            pairs = [(head, int(rng.integers(3))) for head in heads.tolist()]
            runs.append(run_of(pairs, size))
            model += pairs
        whole = joined(runs, WHOLE, threads)
        found = whole.records(0, len(whole))
        assert found["head"].tolist() == sorted(head for head, _ in model)
        assert sorted(zip(found["head"].tolist(), found["rest"][:, 0].tolist(), strict=True)) == sorted(model)
        assert [int((found["tag"] == size).sum()) for size in (1, 700, 3, 90)] == [1, 700, 3, 90]
        assert found_in(whole, model) == [True] * len(model)


class TestSeenIds:
    def test_first_row_of_each_id_is_accepted(self) -> None:
        seen = SeenAtHead(Gold().load, Gold().newest)
        ids = strings(["b", UUID, "a", "b", UUID, UUID.upper(), "x" * 99, "a", "x" * 99, ""])
        hours = np.full(10, 77, np.int64)
        assert seen.accept_new(ids, hours).tolist() == [True] * 3 + [False] * 2 + [True] * 2 + [False] * 2 + [True]
        assert not seen.accept_new(ids, hours).any()
        seen.on_commit()
        assert not seen.accept_new(pa.chunked_array([ids[3:], ids[:3]]), hours).any()
        assert seen.ids == 6
        assert seen.nbytes > 6 * 18

    def test_hours_of_the_window_and_of_the_rows_are_loaded(self) -> None:
        gold = Gold()
        gold.rows = [("old", 50), ("edge", 97), ("out", 96), ("new", 100)]
        seen = seen_at(100, gold, window_hours=4)
        assert gold.loaded == []
        ids = ["old", "edge", "out", "new", "old"]
        first = seen.accept_new(strings(ids), hours_of(51, 100, 98, 100, 50))
        assert first.tolist() == [False, False, True, False, False]
        assert gold.loaded == [50, 51, *range(97, 104)]
        assert seen.hours == frozenset(gold.loaded)
        assert seen.accept_new(strings(["out"]), hours_of(102)).tolist() == [False]
        assert gold.loaded[9:] == [104, 105]

    def test_empty_gold_starts_its_window_at_the_first_row(self) -> None:
        gold = Gold()
        seen = SeenAtHead(gold.load, gold.newest, window_hours=3)
        assert seen.accept_new(strings([]), hours_of()).tolist() == []
        assert gold.loaded == []
        seen.accept_new(strings(["a"]), hours_of(-1000))
        assert gold.loaded == [-1002, -1001, -1000, -999, -998]

    def test_row_ahead_of_kafkas_time_moves_no_window(self) -> None:
        """With no Kafka time, or one as far ahead, it is found in its own window, and the others in theirs."""
        gold = Gold()
        gold.rows = [("now", 100), ("absurd", 70_000_000)]
        for kafka_hours in ({100: 1}, {148: 1}, {148: 900, 100: 1}, {70_000_000: 5}):
            seen = SeenIds(gold.load, gold.newest, window_hours=4)
            assert seen.accept_new(strings(["ahead"]), hours_of(148), kafka_hours).all()
            seen.on_commit()
            assert seen.accept_new(strings(["now"]), hours_of(98), {101: 1}).tolist() == [False]
            assert seen.accept_new(strings(["now"]), hours_of(101), {102: 1}).tolist() == [False]
            assert seen.accept_new(strings(["ahead", "absurd"]), hours_of(148, 70_000_000), {100: 1}).sum() == 0

    def test_window_lies_around_the_most_rows_too(self) -> None:
        """A producer's clock is ahead, its trades are right, and one trade of another's lies in between."""
        gold = Gold()
        gold.rows = [("now", 98), ("ahead", 140)]
        seen = SeenIds(gold.load, gold.newest, window_hours=4)
        ids = strings(["now", "x", "y"])
        assert seen.accept_new(ids, hours_of(100, 100, 141), {148: 3}).tolist() == [False, True, True]

    def test_lagging_partition_is_compared_with_later_rows(self) -> None:
        """A window reaches after its newest row too: another partition may be ahead."""
        gold = Gold()
        gold.rows = [("later", 103), ("much later", 104), ("old", 100)]
        seen = SeenIds(gold.load, gold.newest, window_hours=4)
        ids = strings(["later", "much later", "old"])
        assert seen.accept_new(ids, np.full(3, 99), {100: 3}).tolist() == [False, True, False]

    def test_windows_are_bounded_and_those_of_most_messages_come_first(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "MAX_WINDOW_HOURS", 6)
        gold = Gold()
        gold.rows = [(f"{hour}", hour) for hour in range(0, 1000, 100)]
        seen = SeenIds(gold.load, gold.newest, window_hours=2)
        seen.accept_new(
            strings(["new"]), hours_of(7), {hour: hour if hour < 500 else 1 for hour in range(0, 1000, 100)}
        )
        assert seen.hours == {7, 399, 400, 401, 299, 300, 301}
        seen = SeenIds(gold.load, gold.newest, window_hours=20)
        seen.accept_new(strings(["new"]), hours_of(7), {500: 1, 400: 1})
        assert seen.hours == {7, *range(481, 520)}

    def test_empty_batch_loads_the_window(self) -> None:
        gold = Gold()
        seen_at(10, gold, window_hours=2).accept_new(strings([]), hours_of())
        assert gold.loaded == [9, 10, 11]

    def test_hours_from_year_1_to_9999_work(self) -> None:
        gold = Gold()
        gold.rows = [("a", -17_259_888), ("z", 70_389_527)]
        seen = seen_at(70_389_527, gold)
        ids, hours = strings(["a", "z", "a"]), hours_of(-17_259_888, 70_389_527, 0)
        assert seen.accept_new(ids, hours).tolist() == [False, False, False]
        assert seen.accept_new(strings(["b", "b"]), hours_of(-17_259_888, -17_259_887)).tolist() == [True, False]

    @pytest.mark.parametrize("broken", [0, 1, 2])
    def test_failed_load_accepts_no_row_and_is_retried(self, broken: int) -> None:
        gold = Gold()
        gold.rows = [(f"{hour}-{number}", hour) for hour in (8, 9, 10) for number in range(7)]

        def read(hour: int, arrays: Iterator[pa.Array]) -> Iterator[pa.Array]:
            for count, ids in enumerate(arrays):
                if failing and hour == 9 and count == broken:
                    raise OSError("unreachable")
                yield ids

        def load(hours: Sequence[int]) -> Iterator[tuple[int, Iterator[pa.Array]]]:
            return ((hour, read(hour, arrays)) for hour, arrays in gold.load(hours))

        failing = True
        seen = SeenAtHead(load, gold.newest, window_hours=3)
        seen.head = 10
        ids, hours = strings(["9-0", "9-6", "new"]), hours_of(9, 9, 5)
        for _ in range(2):
            with pytest.raises(OSError, match="unreachable"):
                seen.accept_new(ids, hours)
        assert seen.hours == {5, 7, 8}
        assert seen.ids == 7
        failing = False
        assert seen.accept_new(ids, hours).tolist() == [False, False, True]
        assert seen.hours == {5, 7, 8, 9, 10, 11, 12}
        assert (seen.ids, gold.loaded.count(8), gold.loaded.count(9)) == (22, 1, 3)

    def test_hours_of_a_failed_call_do_not_move_the_window(self) -> None:
        def load(hours: Sequence[int]) -> list[tuple[int, list[pa.Array]]]:
            if hours[-1] > 1000:
                raise OSError("unreachable")
            return [(hour, []) for hour in hours]

        seen = SeenIds(load, lambda until: [10 for _ in until], window_hours=2)
        with pytest.raises(OSError, match="unreachable"):
            seen.accept_new(strings(["a"]), hours_of(2000), {2000: 1})
        assert seen.accept_new(strings(["a"]), hours_of(10), {2000: 1}).tolist() == [True]
        assert seen.hours == {9, 10, 11}

    def test_duplicates_in_gold_are_stored_once_per_hour(self) -> None:
        gold = Gold()
        gold.rows = [(text, 10) for text in [UUID, "a"] * 20] + [(UUID, 9)]
        seen = seen_at(10, gold)
        assert seen.accept_new(strings([UUID, "a", "b"]), hours_of(10, 10, 10)).tolist() == [False, False, True]
        assert seen.ids == 4

    def test_id_of_two_hours_survives_eviction_of_one(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 0)
        gold = Gold()
        gold.rows = [("twice", 1), ("twice", 10), *((f"{number}", 1) for number in range(50))]
        seen = seen_at(10, gold, window_hours=2)
        assert not seen.accept_new(strings(["twice"]), hours_of(1)).any()
        seen.on_commit()
        assert seen.hours == {0, 1, 2, 9, 10, 11}
        assert not seen.accept_new(strings(["twice"]), hours_of(10)).any()
        seen.on_commit()
        assert seen.hours == {9, 10, 11}
        assert not seen.accept_new(strings(["twice"]), hours_of(10)).any()

    def test_uncommitted_rows_are_not_evicted(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 0)
        gold = Gold()
        seen = seen_at(100, gold, window_hours=1)
        for hour in range(100, 200, 3):
            assert seen.accept_new(strings(["a" * hour, f"old {hour}"]), hours_of(hour, 7)).all()
        assert not seen.accept_new(strings([f"old {hour}" for hour in range(100, 200, 3)]), np.full(34, 7)).any()
        assert seen.ids == 68

    def test_evicted_hour_is_loaded_again(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 0)
        gold = Gold()
        seen = seen_at(100, gold, window_hours=2)
        assert seen.accept_new(strings(["a", "b"]), hours_of(100, 5)).all()
        gold.rows += [("a", 100), ("b", 5)]
        seen.on_commit()
        assert seen.hours == {5, 99, 100, 101}
        assert seen.accept_new(strings(["c"]), hours_of(200)).all()
        gold.rows += [("c", 200)]
        seen.on_commit()
        assert (seen.hours, seen.ids) == ({199, 200, 201}, 1)
        assert seen.accept_new(strings(["b", "a", "a"]), hours_of(5, 100, 5)).tolist() == [False, False, False]
        assert gold.loaded.count(5) == 2

    def test_hours_of_one_tag_are_evicted_together(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Hours 65,536 apart share a tag: they are evicted together or not at all, and their ids are not confused."""
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 0)
        gold = Gold()
        now, twin, other = 500_000, 500_000 - 2 * TAGS, 500_000 - TAGS - 1
        gold.rows = [("now", now), ("twin", twin), ("other", other), *((f"{n}", other - 1) for n in range(9))]
        seen = seen_at(now, gold, window_hours=1)
        asked = strings(["now", "twin", "other", "0", "twin"])
        assert not seen.accept_new(asked, hours_of(now, twin, other, other - 1, now)).any()
        seen.on_commit()
        seen.on_commit()
        assert (seen.hours, seen.ids) == ({now, twin}, 2)
        assert seen.accept_new(strings(["new", "twin", "other"]), hours_of(twin, twin, now)).tolist() == [
            *(True, False, True)
        ]
        gold.rows += [("new", twin), ("other", now)]
        assert seen.accept_new(strings(["last"]), hours_of(now + 5)).all()
        gold.rows += [("last", now + 5)]
        seen.on_commit()
        seen.on_commit()
        assert seen.hours == {now + 5}
        assert not seen.accept_new(strings(["new", "twin", "now"]), hours_of(twin, twin, now)).any()

    def test_hours_used_in_every_commit_are_loaded_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 0)
        gold = Gold()
        gold.rows = [(f"{number}", 5) for number in range(100)]
        seen = seen_at(100, gold, window_hours=1)
        for number in range(10):
            assert not seen.accept_new(strings([f"{number}"]), hours_of(5)).any()
            assert not seen.accept_new(strings([f"{number}"]), hours_of(6)).any()
            seen.on_commit()
        assert (gold.loaded.count(5), gold.loaded.count(6)) == (1, 1)

    def test_memory_is_bounded_by_the_hours_in_use(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(index, "_EVICTION_GROWTH", 100)
        gold = Gold()
        seen = SeenAtHead(gold.load, gold.newest, window_hours=2)
        for hour in range(0, 200, 2):
            ids = [f"{hour}/{number}" for number in range(50)]
            assert seen.accept_new(strings(ids), np.repeat(hours_of(hour, hour + 1), 25)).all()
            gold.rows += zip(ids, [hour] * 25 + [hour + 1] * 25, strict=True)
            seen.on_commit()
            assert seen.ids <= 50 * 9 // 8 + 100 + 50
        assert len(seen.hours) < 10

    def test_each_worker_holds_only_its_own_ids(self) -> None:
        gold = Gold()
        gold.rows = [(f"{number}", 10) for number in range(999)]
        owners = owners_of(strings(text for text, _ in gold.rows), 3)
        for worker in range(3):
            seen = seen_at(10, gold, worker=worker, workers=3)
            own = [text for (text, _), of in zip(gold.rows, owners, strict=True) if of == worker]
            assert not seen.accept_new(strings(own), np.full(len(own), 9)).any()
            assert seen.ids == len(own)
            with pytest.raises(DedupError, match="owner"):
                seen.accept_new(strings(["0", "1", "2", "3", "4", "5"]), np.full(6, 10))

    def test_invalid_arguments_are_errors(self) -> None:
        for worker, workers in ((2, 2), (-1, 2), (0, 0)):
            with pytest.raises(DedupError, match="worker"):
                SeenIds(Gold().load, Gold().newest, worker=worker, workers=workers)
        with pytest.raises(DedupError, match="window_hours"):
            SeenIds(Gold().load, Gold().newest, window_hours=0)
        seen = SeenAtHead(Gold().load, Gold().newest)
        with pytest.raises(DedupError, match="2 ids and 1 hours"):
            seen.accept_new(strings(["a", "b"]), hours_of(0))
        with pytest.raises(DedupError, match="null"):
            seen.accept_new(pa.array(["a", None]), hours_of(0, 0))
        assert (seen.ids, seen.hours) == (0, frozenset())

    def test_large_hours_are_loaded_in_parts(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loading, "_SORT_ROWS", 10)
        texts = [f"{number}" * (1 + number % 20) for number in range(500)]
        parts = [strings(texts[:3]), pa.chunked_array([texts[3:90], texts[90:]])]
        seen = SeenAtHead(lambda hours: [(hour, parts) for hour in hours], Gold().newest, 1)
        assert not seen.accept_new(strings(texts), np.zeros(500, np.int64)).any()
        assert seen.ids == len(set(texts))

    def test_memory_per_uuid_is_below_22_bytes(self) -> None:
        rng = np.random.default_rng(3)
        ids = strings(str(uuid.UUID(bytes=rng.bytes(16))) for _ in range(50_000))
        seen = SeenAtHead(Gold().load, Gold().newest)
        for a in range(0, 50_000, 2_000):
            assert seen.accept_new(ids[a : a + 2_000], np.zeros(2_000, np.int64)).all()
        assert seen.nbytes / seen.ids < 22
