"""Which layers and deduplication keys an exchange may declare."""

from dataclasses import replace

import pytest
from pyiceberg.types import LongType, StringType

from k2flow.errors import SettingsError
from k2flow.exchange import Exchange, find_exchange
from k2flow.layers import BRONZE, GOLD, LAYERS, SILVER, Field, Layer

COPY = replace(SILVER, name="copy", table_pattern="copy_{exchange}_trades")


def exchange(layers: tuple[Layer, ...] = LAYERS, dedup_key: tuple[str, ...] = ("message_id",)) -> Exchange:
    return Exchange("test", "TEST", find_exchange("binance").declared, dedup_key=dedup_key, layers=layers)


def test_more_layers_are_tables() -> None:
    assert exchange((*LAYERS, COPY)).tables[-1] == "copy_test_trades"
    hourly = replace(COPY, fields=GOLD.fields)  # one column is derived
    assert exchange((*LAYERS, hourly)).layer_by_table["copy_test_trades"].columns == GOLD.columns


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        (LAYERS[:-1], "the layers lack gold: keep the four"),
        ((*LAYERS[1:], COPY), "the layers lack bronze"),
        ((*LAYERS, replace(COPY, name="silver", table_pattern="silver_copy")), "two layers have the same name"),
        ((*LAYERS, replace(COPY, deduplicated=True)), "layer copy cannot be deduplicated"),
        ((*LAYERS, replace(COPY, table_pattern="{exchange}_copy")), "its table must begin with copy_"),
        ((*LAYERS, replace(COPY, fields=BRONZE.fields)), r"\(trades\) has no columns message_key, avro_payload"),
        ((*LAYERS, replace(COPY, fields=(Field("price", LongType()),))), r"\(trades\) has no columns price of this"),
    ],
)
def test_layers_that_cannot_work_are_an_error(layers: tuple[Layer, ...], message: str) -> None:
    with pytest.raises(SettingsError, match=f"^exchange test: .*{message}"):
        exchange(layers)


@pytest.mark.parametrize("key", [(), ("nothing",), ("message_id", "price"), ("exchange_hour",)])
def test_deduplication_key_must_be_strings_of_silver(key: tuple[str, ...]) -> None:
    with pytest.raises(SettingsError, match="must be one or more string columns of Silver"):
        exchange(dedup_key=key)


def test_any_strings_of_silver_are_a_deduplication_key() -> None:
    strings = [field.name for field in SILVER.fields if isinstance(field.type, StringType)]
    for key in (("symbol", "trade_id"), *((name,) for name in strings), tuple(strings)):
        assert exchange(dedup_key=key).dedup_key == key


def test_deduplication_key_names_each_column_once() -> None:
    with pytest.raises(SettingsError, match=r"\('symbol', 'symbol'\) names a column twice"):
        exchange(dedup_key=("symbol", "symbol"))
