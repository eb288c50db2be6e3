"""An exchange: its names, its settings, the rules that only it has; and how the ones in flows/ are found."""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import pyarrow as pa

from k2flow.config.settings import ExchangeSettings, load_exchange_settings
from k2flow.errors import UnknownExchangeError


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
    rules: tuple[Rule, ...] = field(default=())

    @cached_property
    def settings(self) -> ExchangeSettings:
        """`declared`, overridden by K2FLOW_<NAME>_* (read once). Raises SettingsError."""
        return load_exchange_settings(self.name, self.declared)

    @property
    def bronze(self) -> str:
        return f"bronze_{self.name}_trades"

    @property
    def silver(self) -> str:
        return f"silver_{self.name}_trades"

    @property
    def dlq(self) -> str:
        return f"dlq_{self.name}_trades"

    @property
    def tables(self) -> tuple[str, str, str, str]:
        """The tables that this exchange's flow writes, in the order in which rows reach them."""
        return (self.bronze, self.dlq, self.silver, GOLD)


GOLD = "gold_crypto_trades"


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
