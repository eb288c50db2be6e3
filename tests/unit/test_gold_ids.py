"""The keys of Gold by hour equal those that were written, in a real catalog."""

from datetime import UTC, datetime

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.catalog import Catalog
from pyiceberg.manifest import ManifestFile

from k2flow.trades.gold_ids import GoldIds
from tests.gold import EXCHANGES, HOUR, Gold

DAYS = 40


@pytest.fixture
def gold(catalog: Catalog) -> Gold:
    return Gold(catalog)


def loaded(ids: GoldIds, hour: int) -> list[str]:
    return sorted(pa.chunked_array([*ids.load(hour)], pa.string()).to_pylist())


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
    assert gold.ids("binance").newest_hour() is None
    gold.add("binance", np.array([NOW - 50, NOW - 30, NOW - 49]))
    gold.add("kraken", np.array([NOW, NOW - 90]))
    assert gold.ids("binance").newest_hour() == NOW - 30
    assert gold.ids("kraken").newest_hour() == NOW


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


def test_deletes_of_another_engine_are_applied(gold: Gold) -> None:
    """Then PyIceberg plans the files and their deletes. Hours without deletes are unchanged."""
    gold.add("binance", np.array([NOW, NOW - 1, NOW - 24, NOW]))
    gold.add("kraken", np.array([NOW]))
    ids = gold.ids("binance")
    expected = {hour: loaded(ids, hour) for hour in (NOW, NOW - 1, NOW - 2, NOW - 24)}
    assert len(expected[NOW]) == 2
    ids._has_deletes = True
    assert {hour: loaded(ids, hour) for hour in expected} == expected


def test_cached_file_entries_are_small(gold: Gold) -> None:
    gold.add("binance", np.array([NOW]))
    ids = gold.ids("binance")
    assert ids.newest_hour() == NOW
    (task,) = ids._tasks(NOW)
    assert task.file.lower_bounds is None
    assert task.file.record_count == 1
