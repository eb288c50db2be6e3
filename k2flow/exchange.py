"""An exchange: its names, its settings, the rules that only it has; and how the ones in flows/ are found."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pyarrow as pa

from k2flow.config.settings import PREFIX, ExchangeSettings, load_exchange_settings
from k2flow.errors import UnknownExchangeError
from k2flow.layers import BRONZE, DLQ, LAYERS, SILVER, Layer


@dataclass(frozen=True)
class Rule:
    """A validation rule that only one exchange has.

    `valid` takes the decoded trades (n rows, the columns of Silver) and returns n booleans, true where the row passes;
    it must depend on nothing but them. `detail` names the column whose value the dead-letter row shows.
    """

    reason: str
    column: str
    valid: Callable[[pa.RecordBatch], pa.BooleanArray]


@dataclass(frozen=True)
class Exchange:
    """What flows/<name>.py declares.

    `name` is lower case (tables, settings, commands), `code` is what TradeV2's field `exchange` must hold to the
    letter.
    """

    name: str
    code: str
    declared: Mapping[str, Any]
    rules: tuple[Rule, ...] = ()
    dedup_key: tuple[str, ...] = ("message_id",)
    layers: tuple[Layer, ...] = LAYERS

    @cached_property
    def settings(self) -> ExchangeSettings:
        """`declared`, overridden by K2FLOW_<NAME>_* (read once). Raises SettingsError."""
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


def exchange_names() -> list[str]:
    """The names of the files in flows/, sorted. Does not import them."""
    import flows

    return sorted(module.name for module in pkgutil.iter_modules(flows.__path__))


def find_exchange(name: str) -> Exchange:
    """The exchange that flows/<name>.py declares as EXCHANGE. Raises UnknownExchangeError."""
    names = exchange_names()
    if name not in names:
        raise UnknownExchangeError(
            f"unknown exchange {name!r}: known are {', '.join(names)}; a new one is a new file flows/{name}.py"
        )
    module = importlib.import_module(f"flows.{name}")
    exchange = getattr(module, "EXCHANGE", None)
    if not isinstance(exchange, Exchange) or exchange.name != name:
        raise UnknownExchangeError(f"flows/{name}.py must declare EXCHANGE = Exchange(name={name!r}, ...)")
    return exchange


def all_exchanges() -> list[Exchange]:
    """Every exchange in flows/, sorted by name. Raises UnknownExchangeError."""
    return [find_exchange(name) for name in exchange_names()]
