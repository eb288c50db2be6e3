"""The parts of the audit that need no tables: runs of offsets, ranges to read again, row hashes, the verdict."""

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from filelock import FileLock
from hypothesis import given
from hypothesis import strategies as st

from k2flow.audit import id_runs
from k2flow.audit.bronze import runs
from k2flow.audit.report import SAMPLES, AuditReport, Severity, Verdict
from k2flow.audit.sorted_ids import ids_without, repeated_ids, sorted_ids
from k2flow.errors import AuditError
from k2flow.inspection.broker import MERGE_DISTANCE, merge_close
from k2flow.inspection.files import prefetch
from k2flow.inspection.row_hashes import FOLDER, LOCK, SETTLED_SECONDS, content_hash, hash_of, hashable, open_row_hashes
from k2flow.layers import SILVER


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1))
def test_runs_hold_each_offset_as_often_as_it_occurs(rows: list[tuple[int, int]]) -> None:
    number, offset = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    found = [(run["number"], at) for run in runs(number, offset).to_pylist() for at in range(run["first"], run["next"])]
    assert sorted(found) == sorted(rows)


def test_near_gaps_are_read_together() -> None:
    near, far = (MERGE_DISTANCE + 1, MERGE_DISTANCE + 2), (3 * MERGE_DISTANCE, 3 * MERGE_DISTANCE + 5)
    assert merge_close([(0, 1), near, far]) == [[(0, 1), near], [far]]
    assert merge_close([]) == []


def trades(**columns: list[object]) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    return pa.RecordBatch.from_arrays(
        [pa.array(columns.get(field.name, [None] * n), field.type) for field in SILVER.arrow_schema],
        schema=SILVER.arrow_schema,
    )


def test_every_difference_changes_the_hash() -> None:
    """Null and empty maps and lists, order and boundaries of entries. A slice hashes like its rows."""
    maps = [None, [], [("a", "b")], [("a", None)], [("ab", "")], [("a", "1"), ("b", "2")], [("a", "2"), ("b", "1")]]
    batch = trades(vendor_data=maps)
    row_hash = content_hash(SILVER)
    with open_row_hashes("SELECT 1") as store:
        whole = [row for (row,) in store.select(hashable(batch), f"SELECT {row_hash} FROM batch")]
        sliced = [row for (row,) in store.select(hashable(batch.slice(3)), f"SELECT {row_hash} FROM batch")]
        lists = trades(trade_conditions=[None, [], [""], ["a", "b"], ["b", "a"], ["ab"], [None]])
        conditions = [row for (row,) in store.select(hashable(lists), f"SELECT {row_hash} FROM batch")]
    assert len(set(whole)) == len(maps)
    assert whole[3:] == sliced
    assert len(set(conditions)) == 7


@pytest.mark.parametrize(
    ("severities", "verdict", "code"),
    [
        ([], Verdict.HOLDS, 0),
        ([Severity.NOTE], Verdict.HOLDS, 0),
        ([Severity.UNKNOWN, Severity.NOTE], Verdict.UNKNOWN, 2),
        ([Severity.UNKNOWN, Severity.BROKEN], Verdict.BROKEN, 1),
    ],
)
def test_the_worst_finding_is_the_verdict(severities: list[Severity], verdict: Verdict, code: int) -> None:
    report = AuditReport("now")
    for severity in severities:
        report.add("check", severity, "text", samples=[{}] * (SAMPLES + 5))
    assert report.verdict is verdict
    assert report.verdict.exit_code == code
    assert all(len(finding["samples"]) == SAMPLES for finding in report.to_dict()["findings"])


def test_prefetch_yields_all_items_and_errors_in_order() -> None:
    assert list(prefetch(iter(range(10)))) == list(range(10))

    def failing() -> "list[int]":
        raise ValueError("no")

    items = prefetch(each() for each in (lambda: [1], failing))
    assert next(items) == [1]
    with pytest.raises(ValueError, match="no"):
        next(items)


def test_prefetch_is_one_item_ahead() -> None:
    made: list[int] = []

    def each() -> Iterator[int]:
        for i in range(10):
            made.append(i)
            yield i

    for item in prefetch(each()):
        assert len(made) <= item + 2


@pytest.mark.parametrize("chunk", [1, 999, 1_000_000])
def test_ids_are_sorted_in_bounded_parts(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(id_runs, "CHUNK", chunk)
    rows = "SELECT hash(range // 2) AS id FROM range(2_000) UNION ALL SELECT unnest([0, 18446744073709551615])::UBIGINT"
    with open_row_hashes("SELECT 1") as store:
        found = list(sorted_ids(store, rows))
        expected = np.unique(store.arrays(rows)["id"])
    assert max(map(len, found)) <= 1.2 * chunk + 5
    ids = np.concatenate(found)
    assert ids.dtype == np.uint64
    assert ids.tolist() == expected.tolist()
    assert (ids[0], ids[-1]) == (0, 2**64 - 1)


@given(*[st.lists(st.integers(0, 9).map(lambda i: i * 2**64 // 9 - (i > 0)), max_size=30)] * 3)
def test_ids_that_are_repeated_or_in_no_other_rows(ids: list[int], one: list[int], other: list[int]) -> None:
    with pytest.MonkeyPatch.context() as patch, open_row_hashes("SELECT 1") as store:
        patch.setattr(id_runs, "CHUNK", 3)
        rows, *others = (f"SELECT unnest({each}::UBIGINT[]) AS id" for each in (ids, one, other))
        without = [id for part in ids_without(store, rows, *others) for id in part.tolist()]
        repeated = [id for part in repeated_ids(store, rows) for id in part.tolist()]
    assert without == sorted(id for id in ids if id not in one and id not in other)
    assert repeated == sorted({id for id in ids if ids.count(id) > 1})


def test_null_id_is_an_error() -> None:
    rows = "SELECT unnest([1, NULL]::UBIGINT[]) AS id"
    with open_row_hashes("SELECT 1") as store, pytest.raises(AuditError, match="has 1 rows without a hash"):
        list(ids_without(store, rows))


@pytest.mark.parametrize("row", [0, 2_900_000])
def test_failure_of_the_database_while_rows_are_fetched_is_an_audit_error(row: int) -> None:
    sql = f"SELECT CASE WHEN range = {row} THEN error('no space') ELSE range END AS id FROM range(3_000_000)"
    with (
        open_row_hashes("SELECT 1") as store,
        pytest.raises(AuditError, match=r"database of row hashes failed: .* no space"),
    ):
        store.arrays(sql)


def test_hash_of_columns_does_not_depend_on_their_order() -> None:
    assert hash_of(SILVER.columns, SILVER.arrow_schema) == hash_of(reversed(SILVER.columns), SILVER.arrow_schema)


def test_folders_of_killed_processes_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder that is in use, or too new to be locked yet, stays."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    dead, new, live = (tmp_path / f"{FOLDER}{name}" for name in ("dead", "new", "live"))
    for folder in (dead, new, live):
        folder.mkdir()
        (folder / LOCK).touch()
    with FileLock(live / LOCK):
        for folder in (dead, live):
            os.utime(folder, (time.time() - SETTLED_SECONDS - 1,) * 2)
        with open_row_hashes("SELECT 1"):
            assert sorted(each.name for each in tmp_path.iterdir() if each in (dead, new, live)) == [
                live.name,
                new.name,
            ]
