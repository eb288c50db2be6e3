"""`python -m tests.integration.other_rules MODULE ARGUMENTS`: run k2flow with the rules of another version.

In it, trades of more than LARGE are bad, those in ETH have another currency, and those in SOL are an hour older.
"""

import runpy
import sys
from dataclasses import replace
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from k2flow.exchange import Exchange, Rule
from k2flow.trades.decode import TradeDecoder
from k2flow.trades.validate import Validator

LARGE = Decimal("6")
HOUR_US = 3_600_000_000

validator, silver_rows = Validator.__init__, TradeDecoder._silver_rows


def with_one_more_rule(self: Validator, exchange: Exchange) -> None:
    small = Rule("quantity_too_large", "quantity", lambda trades: pc.less_equal(trades.column("quantity"), LARGE))
    validator(self, replace(exchange, rules=(*exchange.rules, small)))


def with_other_values(self: TradeDecoder, *arguments: Any) -> pa.RecordBatch:
    rows = silver_rows(self, *arguments)
    columns = {name: rows.column(name) for name in rows.schema.names}
    of_eth, of_sol = (pc.starts_with(columns["symbol"], pattern=base) for base in ("ETH", "SOL"))
    columns["currency"] = pc.if_else(of_eth, "EUR", columns["currency"])
    times = columns["timestamp"].cast(pa.int64())
    times = pc.if_else(of_sol, pc.subtract(times, HOUR_US), times).cast(columns["timestamp"].type)
    columns |= {"timestamp": times, "exchange_date": times.cast(pa.date32())}
    return pa.RecordBatch.from_pydict(columns, schema=rows.schema)


if __name__ == "__main__":
    Validator.__init__ = with_one_more_rule  # type: ignore[method-assign]
    TradeDecoder._silver_rows = with_other_values  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
