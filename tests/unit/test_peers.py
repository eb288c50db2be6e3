"""The verdict of `scripts/bench peers`: rows lost and duplicated, and tables that Iceberg's catalogs can read."""

from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from pyiceberg.types import DateType, TimestamptzType

from bench.peers.connect import transforms
from bench.peers.lake import Difference, create_tables, difference, keys_of, load, rows_in
from bench.peers.messages import position
from k2flow.exchange import find_exchange
from k2flow.iceberg.tables import definitions
from k2flow.layers import SILVER


@pytest.mark.parametrize("seed", range(20))
def test_difference_counts_each_copy(seed: int) -> None:
    random = np.random.default_rng(seed)
    expected, found = (random.integers(0, 30, random.integers(0, 60)) for _ in range(2))
    lost = Counter(expected.tolist()) - Counter(found.tolist())
    duplicated = Counter(found.tolist()) - Counter(expected.tolist())
    for kind in (pa.int64(), pa.string()):
        keys = [pa.chunked_array([pa.array(each, pa.int64()).cast(kind)]) for each in (found, expected)]
        assert difference(*keys) == Difference(lost.total(), duplicated.total())


def test_positions_of_two_partitions_differ() -> None:
    offsets = np.arange(3)
    assert len({*position(0, offsets).tolist(), *position(5, offsets).tolist()}) == 6


def test_created_tables_have_the_columns_of_k2flow_and_no_rows(tmp_path: Path) -> None:
    wanted = definitions(find_exchange("binance"))
    create_tables(tmp_path, wanted.values())
    for name, definition in wanted.items():
        assert [each.name for each in load(tmp_path, name).schema().fields] == list(definition.layer.columns)
        assert len(keys_of(load(tmp_path, name))) == 0
        assert rows_in(tmp_path, name) == 0


def test_kafka_connect_converts_each_time_and_date_of_silver() -> None:
    settings = transforms()
    copy, *converters = settings["transforms"].split(",")
    converted = {
        settings[f"transforms.{name}.field"]: settings[f"transforms.{name}.target.type"] for name in converters
    }
    types = {TimestamptzType(): "Timestamp", DateType(): "Date"}
    assert converted == {field.name: types[field.type] for field in SILVER.fields if field.type in types}
    assert settings[f"transforms.{copy}.target.field"] == SILVER.date_column
    assert settings[f"transforms.{copy}.source.field"] == SILVER.event_time
