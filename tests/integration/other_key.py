"""`python -m tests.integration.other_key MODULE ARGUMENTS`: run k2flow with exchanges that declare KEY."""

import runpy
import sys
from typing import Any

from k2flow.exchange import Exchange

KEY = ("symbol", "trade_id")

declare = Exchange.__init__


def with_key(self: Exchange, *arguments: Any, **fields: Any) -> None:
    declare(self, *arguments, **{"dedup_key": KEY, **fields})


if __name__ == "__main__":
    Exchange.__init__ = with_key  # type: ignore[method-assign]
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
