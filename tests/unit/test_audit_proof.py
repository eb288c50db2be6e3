"""The proof of earlier audits: sums of row hashes, runs of ids, and every way in which the files may be damaged."""

import json
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from k2flow.audit import id_runs
from k2flow.audit.id_runs import MAX_RUNS, IdRun, damaged_run, found_in, merge_runs, write_run
from k2flow.audit.proof import (
    FILE,
    DroppedProofError,
    FileProof,
    NotProvenError,
    Proof,
    ProofStore,
    RowSum,
    digest,
    open_proofs,
)

IDS = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=50)
HASHES = st.lists(st.integers(0, 2**64 - 1), max_size=20)


def sum_of(hashes: list[int]) -> RowSum:
    return RowSum.of(len(hashes), sum(hashes), sum(h * h for h in hashes))


@given(st.lists(HASHES, max_size=6), HASHES)
def test_sums_of_files_are_the_sum_of_their_rows(files: list[list[int]], other: list[int]) -> None:
    """However rows are divided into files. Other rows have another sum."""
    total = RowSum()
    for each in files:
        total = total.plus(sum_of(each))
    rows = [row for each in files for row in each]
    assert total == sum_of(sorted(rows))
    assert (total == sum_of(other)) == (Counter(rows) == Counter(other))


def run_of(folder: Path, ids: list[int], pieces: int = 1) -> IdRun:
    run = write_run(folder, np.array_split(np.sort(np.array(ids, np.uint64)), pieces))
    assert run is not None
    return run


@given(IDS, IDS, st.integers(1, 7))
def test_ids_are_found_in_a_run(
    tmp_path_factory: pytest.TempPathFactory, stored: list[int], asked: list[int], chunk: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    run = run_of(folder, stored, 3)
    ids = np.unique(np.array([*asked, stored[0]], np.uint64))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_runs, "CHUNK", chunk)
        found = found_in(folder, run, ids)
        assert damaged_run(folder, [run]) is None
    assert ids[found].tolist() == sorted(set(ids.tolist()) & set(stored))


@settings(max_examples=20)
@given(st.lists(IDS, min_size=MAX_RUNS, max_size=MAX_RUNS + 2), st.integers(1, 50))
def test_many_runs_are_merged(tmp_path_factory: pytest.TempPathFactory, pieces: list[list[int]], chunk: int) -> None:
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(id_runs, "CHUNK", chunk)
        merged = merge_runs(folder, [run_of(folder, ids) for ids in pieces])
    assert len(merged) == (1 if len(pieces) > MAX_RUNS else len(pieces))
    stored = [i for run in merged for i in np.fromfile(folder / run.name, "<u8").tolist()]
    assert sorted(stored) == sorted(i for ids in pieces for i in ids)
    assert damaged_run(folder, merged) is None
    if len(merged) == 1:
        assert stored == sorted(stored)


def test_no_ids_need_no_run(tmp_path: Path) -> None:
    assert write_run(tmp_path, iter(())) is None
    assert list(tmp_path.iterdir()) == []


def saved(folder: Path) -> Proof:
    """Save a proof with a run, and return it."""
    run = run_of(folder, [3, 1, 2**64 - 1])
    proof = Proof(
        made_for="these tables",
        full_at=1_700_000_000.5,
        extents={"binance": {"id/0/0": {"bronze": (0, 5, 4)}}},
        tables={"gold": {"a/b.parquet": FileProof((20_000, 3), False, {"binance": RowSum(2, 2**64 - 1, 7)})}},
        newest={"binance": 480_003},
        ids={480_003: {"binance": [run]}, 480_002: {}},
    )
    ProofStore(folder).save(proof)
    return proof


def test_saved_proof_is_loaded(tmp_path: Path) -> None:
    """Files that it does not use are removed: a killed audit may have left them."""
    run_of(tmp_path, [1])
    proof = saved(tmp_path)
    assert ProofStore(tmp_path).load("these tables") == proof
    assert ProofStore(tmp_path).last_full() == "2023-11-14T22:13:20.500000+00:00"
    assert len(list(tmp_path.iterdir())) == 2
    assert proof.rows == 2


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(bytes(content))


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("pattern", [FILE, "*.ids"])
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink], ids=lambda damage: damage.__name__)
def test_damaged_proof_is_dropped(tmp_path: Path, pattern: str, damage: object) -> None:
    saved(tmp_path)
    (path,) = tmp_path.glob(pattern)
    assert callable(damage)
    damage(path)
    missing = pattern == FILE and not path.exists()
    with pytest.raises(NotProvenError if missing else DroppedProofError):
        ProofStore(tmp_path).load("these tables")


def test_proof_of_other_tables_is_dropped(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(DroppedProofError, match="other tables"):
        ProofStore(tmp_path).load("others")


@pytest.mark.parametrize("part", ["tables", "ids", "extents"])
def test_proof_in_another_format_is_dropped(tmp_path: Path, part: str) -> None:
    """As another version of k2flow may have written it, with a right checksum."""
    ProofStore(tmp_path).save(saved(tmp_path))
    content = json.loads((tmp_path / FILE).read_bytes().split(b"\n", 2)[2])
    text = b"1.0\n" + json.dumps(content | {part: []}).encode()
    (tmp_path / FILE).write_bytes(digest(text) + b"\n" + text)
    with pytest.raises(DroppedProofError, match="another format"):
        ProofStore(tmp_path).load("these tables")


@pytest.mark.parametrize("ahead", [{"full_at": 2e9}, {"newest": {"binance": 600_000}}], ids=["audit", "hour"])
def test_proof_from_the_future_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ahead: dict[str, object]
) -> None:
    """The clock was ahead when it was made: no real hour would be in the window any more."""
    monkeypatch.setattr(time, "time", lambda: 1_800_000_000.0)
    ProofStore(tmp_path).save(replace(saved(tmp_path), **ahead))
    with pytest.raises(DroppedProofError, match="from the future"):
        ProofStore(tmp_path).load("these tables")
    assert (ProofStore(tmp_path).last_full() is None) is ("full_at" in ahead)


def test_what_cannot_be_saved_is_removed(tmp_path: Path) -> None:
    """A full disk does not fill up with the runs of one audit after the other."""
    proof = saved(tmp_path)
    with open_proofs(tmp_path) as store:
        assert isinstance(store, ProofStore)
        run_of(tmp_path, [7])
        (tmp_path / f"{FILE}.new").touch()
        store.undo()
        assert store.load("these tables") == proof
        assert len(list(tmp_path.iterdir())) == 3  # with the lock


def test_two_audits_do_not_share_a_proof(tmp_path: Path) -> None:
    with open_proofs(tmp_path / "proofs") as first, open_proofs(tmp_path / "proofs") as second:
        assert isinstance(first, ProofStore)
        assert isinstance(second, str)
        assert "another audit uses" in second
    with open_proofs(tmp_path / "proofs") as again:
        assert isinstance(again, ProofStore)


def test_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with open_proofs(tmp_path / "file" / "proofs") as store:
        assert isinstance(store, str)
        assert "cannot be written" in store
