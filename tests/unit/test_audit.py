"""The parts of the audit that need no tables: runs of offsets, ranges to read again, hashes, the verdict."""

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from k2flow.audit.bronze import runs
from k2flow.audit.report import SAMPLES, Report, Severity, Verdict
from k2flow.inspection.broker import CLOSE, _spans
from k2flow.inspection.files import ahead
from k2flow.inspection.row_hashes import ROW_HASH, hashable, open_store
from k2flow.layers import SILVER

SILVER = SILVER.arrow_schema


@given(st.lists(st.tuples(st.integers(0, 2), st.integers(0, 30)), min_size=1))
def test_runs_hold_each_offset_as_often_as_it_came(rows: list[tuple[int, int]]) -> None:
    part, offset = (np.array(column, np.int64) for column in zip(*rows, strict=True))
    found = [(run["part"], at) for run in runs(part, offset).to_pylist() for at in range(run["first"], run["next"])]
    assert sorted(found) == sorted(rows)


def test_near_gaps_are_read_together() -> None:
    near, far = (CLOSE + 1, CLOSE + 2), (3 * CLOSE, 3 * CLOSE + 5)
    assert _spans([(0, 1), near, far]) == [[(0, 1), near], [far]]
    assert _spans([]) == []


def trades(**columns: list[object]) -> pa.RecordBatch:
    n = len(next(iter(columns.values())))
    return pa.RecordBatch.from_arrays(
        [pa.array(columns.get(field.name, [None] * n), field.type) for field in SILVER], schema=SILVER
    )


def test_every_difference_changes_the_hash() -> None:
    """Null and empty maps and lists, order and boundaries of entries; a slice hashes as its rows do."""
    maps = [None, [], [("a", "b")], [("a", None)], [("ab", "")], [("a", "1"), ("b", "2")], [("a", "2"), ("b", "1")]]
    batch = trades(vendor_data=maps)
    with open_store() as store:
        whole = [row for (row,) in store.select(hashable(batch), f"SELECT {ROW_HASH} FROM batch")]
        sliced = [row for (row,) in store.select(hashable(batch.slice(3)), f"SELECT {ROW_HASH} FROM batch")]
        lists = trades(trade_conditions=[None, [], [""], ["a", "b"], ["b", "a"], ["ab"], [None]])
        conditions = [row for (row,) in store.select(hashable(lists), f"SELECT {ROW_HASH} FROM batch")]
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
    report = Report("now")
    for severity in severities:
        report.add("check", severity, "text", samples=[{}] * (SAMPLES + 5))
    assert report.verdict is verdict
    assert report.verdict.exit_code == code
    assert all(len(finding["samples"]) == SAMPLES for finding in report.to_dict()["findings"])


def test_ahead_gives_all_items_and_errors_in_order() -> None:
    assert list(ahead(iter(range(10)))) == list(range(10))

    def failing() -> "list[int]":
        raise ValueError("no")

    items = ahead(each() for each in (lambda: [1], failing))
    assert next(items) == [1]
    with pytest.raises(ValueError, match="no"):
        next(items)
