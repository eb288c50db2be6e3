"""The deduplication key of each exchange's rows in Gold, kept in the table itself.

Each exchange has one property of Gold, `k2flow.dedup-key.<exchange>`: the columns by name, with commas. Every commit of
its flow sets it, the first one too. A table of an earlier version has none: its key is `message_id`.
"""

from collections.abc import Mapping

from k2flow.errors import TableDiffersError
from k2flow.exchange import DEDUP_KEY, Exchange
from k2flow.iceberg.catalog import NAMESPACE
from k2flow.iceberg.ledger import KEY as LEDGER_KEY
from k2flow.layers import GOLD_TABLE

KEY = "k2flow.dedup-key."  # prefix of the property; the name of the exchange follows


def key_properties(exchange: Exchange, table: str) -> dict[str, str]:
    """Return the property that each commit of `exchange` sets in a table: none, except in Gold."""
    return {KEY + exchange.name: _text(exchange.dedup_key)} if table == GOLD_TABLE else {}


def recorded_key(gold: Mapping[str, str], exchange: str) -> tuple[str, ...] | None:
    """Return the key of an exchange's rows, given Gold's properties; None if it has committed nothing yet."""
    if (text := gold.get(KEY + exchange)) is not None:
        return tuple(text.split(","))
    return DEDUP_KEY if LEDGER_KEY + exchange in gold else None


def key_problem(gold: Mapping[str, str], exchange: Exchange) -> str | None:
    """Return how the declared key differs from that of the rows, and what to do; None if it does not."""
    recorded = recorded_key(gold, exchange.name)
    if recorded is None or _text(recorded) == _text(exchange.dedup_key):
        return None
    return (
        f"table {NAMESPACE}.{GOLD_TABLE} differs: its rows of {exchange.name} have the deduplication key "
        f"{' and '.join(recorded)} (property {KEY}{exchange.name}), and flows/{exchange.name}.py declares "
        f"{' and '.join(exchange.dedup_key)}: declare dedup_key={recorded} again, or stop the flow and run `k2flow "
        f"reprocess {exchange.name} --new-key`, which replaces these rows by those of the declared key"
    )


def check_key(gold: Mapping[str, str], exchange: Exchange) -> None:
    """Raise TableDiffersError if an exchange declares another key than that of its rows, given Gold's properties."""
    if problem := key_problem(gold, exchange):
        raise TableDiffersError(problem)


def _text(key: tuple[str, ...]) -> str:
    """Return a key as the property has it. The order of its columns does not matter."""
    return ",".join(sorted(key))
