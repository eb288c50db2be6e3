"""The declaration of the check that covers each column: no column of any layer is in no check."""

from dataclasses import replace
from typing import Any

import pytest
from pyiceberg.types import StringType

from k2flow.audit.coverage import columns_by_check, unchecked
from k2flow.inspection.row_hashes import content
from k2flow.layers import CANDLES, GOLD, LAYERS, SILVER, Field, Layer
from tests.audited_lake import COPY, RAW, add_field


@pytest.mark.parametrize("layer", [*LAYERS, CANDLES, COPY], ids=lambda layer: layer.name)
def test_every_column_is_in_a_check(layer: Layer) -> None:
    assert unchecked(layer) == []
    assert {name for columns in columns_by_check(layer).values() for name in columns} == set(layer.columns)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize("derive", [None, lambda rows: rows.column(0)], ids=["from the stream", "derived"])
def test_added_column_is_in_a_check(layer: Layer, derive: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    add_field(monkeypatch, layer, Field("added", StringType(), derive=derive))
    assert unchecked(layer) == []
    assert ("added" in content(layer)) == (derive is None)


def test_layer_without_row_checks_has_unchecked_columns() -> None:
    raw = [name for name in RAW.columns if name not in (RAW.event_time, RAW.date_column)]
    assert unchecked(RAW) == raw
    shared = replace(SILVER, name="shared", table_pattern="shared_trades")
    assert "price" in unchecked(shared)


def test_gold_and_silver_compare_the_same_columns() -> None:
    """Reprocessing finds the rows of Gold by the hashes of Silver's."""
    assert set(content(GOLD)) == set(content(SILVER))
