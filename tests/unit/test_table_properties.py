"""The JSON that existing tables hold of replacements and leases, written by earlier versions."""

import pytest

from k2flow.errors import CommitError
from k2flow.exchange import find_exchange
from k2flow.iceberg.commit import STAGED_KEY
from k2flow.iceberg.ledger import Writer
from k2flow.iceberg.staging import CommittedReplacement, StagedTable, committed_replacement
from k2flow.maintain.lease import LEASE, read_lease

BINANCE = find_exchange("binance")
KEY = f"{STAGED_KEY}binance"


def test_committed_replacement() -> None:
    text = '{"what": "since 2026-03-01", "tables": {"t": {"branch": "b", "head": 5, "rows": {"0": -2, "11": 3}}}}'
    expected = CommittedReplacement("since 2026-03-01", {"t": StagedTable("b", 5, {0: -2, 11: 3})})
    assert committed_replacement({KEY: text}, BINANCE) == expected
    assert committed_replacement({}, BINANCE) is None


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"what": "x"}', '{"what": "x", "tables": {"t": {"branch": "b"}}}'])
def test_damaged_replacement_is_one_line(text: str) -> None:
    with pytest.raises(CommitError, match=r"k2flow.staged.binance cannot be read \(.*\): restore") as error:
        committed_replacement({KEY: text}, BINANCE)
    assert "\n" not in str(error.value)


def test_lease() -> None:
    text = '{"host": "h", "pid": 7, "started": 1.25, "until": 1900.5}'
    assert read_lease("t", {LEASE: text}) == (Writer("h", 7, 1.25), 1900.5)


@pytest.mark.parametrize("text", ["", "[]", '{"host": "h", "pid": 7, "started": 1.25}'])
def test_damaged_lease_is_free(text: str) -> None:
    assert read_lease("t", {LEASE: text}) == (None, 0)
