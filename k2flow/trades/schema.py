"""TradeV2, the Avro record that every message must resolve to."""

import json
from functools import cache
from importlib.resources import files
from typing import Any


@cache
def trade_schema() -> dict[str, Any]:
    """Return the Avro schema of TradeV2, from trade_v2.avsc beside this module."""
    schema: dict[str, Any] = json.loads(files("k2flow.trades").joinpath("trade_v2.avsc").read_text("utf-8"))
    return schema
