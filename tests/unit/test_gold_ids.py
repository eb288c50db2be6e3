"""The keys of Gold by hour equal those that were written, in a real catalog."""

from collections.abc import Sequence
from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import ManifestFile

from k2flow.iceberg.catalog import load_table
from k2flow.layers import GOLD_TABLE
from k2flow.trades import gold_ids
from k2flow.trades.gold_ids import GoldIds
from tests.gold import EXCHANGES, HOUR, Gold

DAYS = 40
FAR = 70_389_000  # of year 9999


@pytest.fixture
def gold(catalog: Catalog) -> Gold:
    return Gold(catalog)


def loaded(ids: GoldIds, hour: int) -> list[str]:
    return hours_of(ids, [hour])[hour]


def hours_of(ids: GoldIds, hours: Sequence[int]) -> dict[int, list[str]]:
    found = {}
    for hour, arrays in ids.load(hours):
        found[hour] = sorted(pa.chunked_array([*arrays], pa.string()).to_pylist())
    assert list(found) == list(hours)
    return found


def newest(ids: GoldIds, until: int) -> int | None:
    (found,) = ids.newest_hours([until])
    return found


NOW = int(datetime.now(UTC).timestamp()) // HOUR


def test_every_hour_is_complete_after_every_commit(gold: Gold) -> None:
    """Hours of many days, also before 1970, in commits whose manifests are merged in between."""
    chance = np.random.default_rng(3)
    ids = {name: gold.ids(name) for name in EXCHANGES}
    for commit in range(12):
        for name in EXCHANGES:
            early = -5 if commit == 5 else NOW - DAYS * 24
            gold.add(name, chance.integers(early, NOW - 24 * DAYS + (commit + 1) * DAYS, 10))
            hours = {hour for _, hour in gold.held}
            for hour in [*chance.choice(sorted(hours), 2).tolist(), gold.newest(name), NOW + 1]:
                assert loaded(ids[name], hour) == sorted(gold.held.get((name, hour), set()))
    for name in EXCHANGES:
        reloaded = gold.ids(name)
        for hour in sorted({hour for _, hour in gold.held})[::10]:
            assert loaded(reloaded, hour) == sorted(gold.held.get((name, hour), set()))


def test_newest_hour_is_of_the_exchange_only(gold: Gold) -> None:
    assert newest(gold.ids("binance"), NOW) is None
    gold.add("binance", np.array([NOW - 50, NOW - 30, NOW - 49]))
    gold.add("kraken", np.array([NOW, NOW - 90]))
    assert newest(gold.ids("binance"), NOW) == NOW - 30
    assert newest(gold.ids("kraken"), NOW) == NOW


def test_newest_hour_up_to_another(gold: Gold) -> None:
    """The hours of a far future, of one exchange or the other, hide no earlier one, and cost no search."""
    gold.add("binance", np.array([NOW - 30, NOW, FAR]))
    gold.add("kraken", np.array([NOW - 40, NOW - 2, FAR + 5]))
    gold.add("binance", np.array([NOW - 50_000]))
    asked = [FAR + 9, FAR, FAR - 1, NOW + 1, NOW, NOW - 1, NOW - 30, NOW - 31, NOW - 50_000, NOW - 50_001]
    wanted = [FAR, FAR, NOW, NOW, NOW, NOW - 30, NOW - 30, NOW - 50_000, NOW - 50_000, None]
    assert gold.ids("binance").newest_hours(asked) == wanted
    assert gold.ids("kraken").newest_hours(asked[3:6]) == [NOW - 2, NOW - 2, NOW - 2]


def test_many_hours_take_one_load_of_the_table(gold: Gold, monkeypatch: pytest.MonkeyPatch) -> None:
    for first in range(3):
        gold.add("binance", np.arange(NOW - 300 + first, NOW, 2))
    ids, tables = gold.ids("binance"), list[str]()
    load = gold_ids.load_table
    monkeypatch.setattr(gold_ids, "load_table", lambda catalog, name: tables.append(name) or load(catalog, name))
    found = hours_of(ids, range(NOW - 310, NOW + 10))
    assert len(tables) == 1
    assert found == {hour: sorted(gold.held.get(("binance", hour), ())) for hour in found}


def test_manifest_is_read_once_and_only_if_it_covers_the_hour(gold: Gold, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[str] = []
    fetch = ManifestFile.fetch_manifest_entry

    def spy(self: ManifestFile, *arguments: object, **named: object) -> object:
        read.append(self.manifest_path)
        return fetch(self, *arguments, **named)  # type: ignore[arg-type]

    ids = gold.ids("binance")
    gold.add("binance", np.array([NOW - 48, NOW - 47]))
    gold.add("binance", np.array([NOW]))
    monkeypatch.setattr(ManifestFile, "fetch_manifest_entry", spy)
    for _ in range(3):
        loaded(ids, NOW)
    assert len(read) == 1
    loaded(ids, NOW - 47)
    loaded(ids, NOW - 48)
    loaded(ids, NOW - 1000)
    assert len(read) == len(set(read)) == 2


def test_cached_file_entries_are_small(gold: Gold) -> None:
    gold.add("binance", np.array([NOW]))
    ids = gold.ids("binance")
    assert newest(ids, NOW) == NOW
    (task,) = ids._tasks(NOW)
    assert task.file.lower_bounds is None
    assert task.file.record_count == 1


def test_a_state_that_main_was_moved_away_from_is_none_of_gold(gold: Gold) -> None:
    """A cache of that state may have ids that Gold lacks: their messages would be dropped as duplicates."""
    ids = gold.ids("binance")
    assert ids.was_at(ids.reload())
    gold.add("binance", np.array([NOW]))
    earlier = ids.reload()
    gold.add("binance", np.array([NOW]))
    left = ids.reload()
    assert ids.was_at(earlier)
    assert ids.was_at(left)
    load_table(gold.catalog, GOLD_TABLE).manage_snapshots().rollback_to_snapshot(earlier.snapshot).commit()
    gold.start("binance", "accept")
    gold.add("binance", np.array([NOW]))
    ids.reload()
    assert ids.was_at(earlier)
    assert not ids.was_at(left)
