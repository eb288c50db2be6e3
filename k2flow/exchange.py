"""An exchange: its names, settings, rules and layers; and how to find the exchanges in flows/."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa
from pyiceberg.types import StringType

from k2flow.config.settings import PREFIX, ExchangeSettings, load_exchange_settings
from k2flow.errors import SettingsError, UnknownExchangeError
from k2flow.layers import BRONZE, CANDLES, COLUMNS_OF_STREAM, DLQ, LAYERS, SILVER, Layer

DEDUP_KEY = ("message_id",)  # the default deduplication key, and that of rows of earlier versions


@dataclass(frozen=True)
class Rule:
    """A validation rule that only one exchange has."""

    reason: str  # the reason code in the dead-letter table
    column: str  # the column whose value the dead-letter row shows
    valid: Callable[[pa.RecordBatch], pa.BooleanArray]
    """Takes n decoded trades (TradeV2's columns), returns n booleans, true for a row that passes. A pure function."""


@dataclass(frozen=True)
class Exchange:
    """The declaration in flows/<name>.py. Raises SettingsError if the layers or the deduplication key cannot work."""

    name: str  # lower case, in tables, settings and commands
    code: str  # the exact value of TradeV2's field `exchange`
    declared: Mapping[str, Any]  # settings by their field's name
    rules: tuple[Rule, ...] = ()  # validation rules after the common ones
    dedup_key: tuple[str, ...] = DEDUP_KEY  # the columns that identify a trade; Gold has each key once
    layers: tuple[Layer, ...] = LAYERS  # the tables: the four of every exchange, then any more
    dense_trade_ids: bool = False  # whether trade ids are <code>-<integer>, consecutive for each symbol

    def __post_init__(self) -> None:
        problem = _key_problem(self.dedup_key) or _layers_problem(self.layers)
        if problem:
            raise SettingsError(f"exchange {self.name}: {problem}")

    @cached_property
    def settings(self) -> ExchangeSettings:
        """The declared settings, overridden by K2FLOW_<NAME>_*, read once. Raises SettingsError."""
        return load_exchange_settings(self.name, self.declared)

    def setting(self, field: str) -> str:
        """Return the environment variable that overrides a field of its settings."""
        return f"{PREFIX}{self.name.upper()}_{field.upper()}"

    @property
    def bronze(self) -> str:
        """The name of its Bronze table."""
        return BRONZE.table(self.name)

    @property
    def silver(self) -> str:
        """The name of its Silver table."""
        return SILVER.table(self.name)

    @property
    def dlq(self) -> str:
        """The name of its dead-letter table."""
        return DLQ.table(self.name)

    @cached_property
    def layer_by_table(self) -> dict[str, Layer]:
        """The layers that its flow writes, by table name, in the order of the data."""
        return {layer.table(self.name): layer for layer in self.layers}

    @property
    def tables(self) -> tuple[str, ...]:
        """The names of the tables that its flow writes, in the order of the data."""
        return tuple(self.layer_by_table)


def _key_problem(key: tuple[str, ...]) -> str | None:
    types = {field.name: field.type for field in SILVER.fields}
    if not key or any(not isinstance(types.get(column), StringType) for column in key):
        return f"the deduplication key {key} must be one or more string columns of Silver"
    if len(set(key)) < len(key):
        return f"the deduplication key {key} names a column twice"
    return None


def _layers_problem(layers: tuple[Layer, ...]) -> str | None:
    missing = [layer.name for layer in LAYERS if layer not in layers]
    if missing:
        return f"the layers lack {', '.join(missing)}: keep the four of k2flow.layers.LAYERS and add to them"
    if len({layer.name for layer in layers}) < len(layers):
        return "two layers have the same name"
    for layer in layers:
        if layer.deduplicated and layer not in LAYERS:
            return f"layer {layer.name} cannot be deduplicated: Gold is the only deduplicated layer"
        if len(layer.sorted_by) > 1:
            return f"layer {layer.name}: its files can be sorted by one column only, a time"
        if not layer.table_pattern.startswith(f"{layer.name}_"):
            return f"layer {layer.name}: the name of its table must begin with {layer.name}_"
        types = {field.name: field.type for field in COLUMNS_OF_STREAM[layer.stream]}
        wrong = [field.name for field in layer.fields if field.derive is None and types.get(field.name) != field.type]
        if wrong:
            return (
                f"layer {layer.name}: its stream ({layer.stream.value}) has no columns {', '.join(wrong)} of this type"
            )
    return None


def exchange_names() -> list[str]:
    """Return the names of the exchanges' files in flows/, sorted. Do not import them."""
    import flows

    return sorted(module.name for module in pkgutil.iter_modules(flows.__path__) if module.name != CANDLES.name)


def find_exchange(name: str) -> Exchange:
    """Return the exchange that flows/<name>.py declares as EXCHANGE. Raises UnknownExchangeError."""
    names = exchange_names()
    if name not in names:
        raise UnknownExchangeError(
            f"unknown exchange {name!r}: known are {', '.join(names)}; to add one, create flows/{name}.py"
        )
    module = importlib.import_module(f"flows.{name}")
    exchange = getattr(module, "EXCHANGE", None)
    if not isinstance(exchange, Exchange) or exchange.name != name:
        raise UnknownExchangeError(f"flows/{name}.py must declare EXCHANGE = Exchange(name={name!r}, ...)")
    return exchange


def all_exchanges() -> list[Exchange]:
    """Return every exchange in flows/, sorted by name. Raises UnknownExchangeError."""
    return [find_exchange(name) for name in exchange_names()]
