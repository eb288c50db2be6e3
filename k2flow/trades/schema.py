"""TradeV2, the Avro record that every message must resolve to, and the text of any schema."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

Json = Any


@cache
def trade_schema() -> dict[str, Any]:
    """Return the Avro schema of TradeV2, from trade_v2.avsc beside this module."""
    schema: dict[str, Any] = json.loads(files("k2flow.trades").joinpath("trade_v2.avsc").read_text("utf-8"))
    return schema


def canonical(schema: Json) -> str:
    """Return the one text of a schema, JSON text or parsed JSON: without spaces and documentation, keys in order.

    Two schemas of one text decode alike. Raises ValueError or RecursionError if it is not JSON.
    """
    parsed = json.loads(schema) if isinstance(schema, str) else schema
    return json.dumps(_without_doc(parsed), separators=(",", ":"), sort_keys=True)


def _without_doc(schema: Json) -> Json:
    if isinstance(schema, list):
        return [_without_doc(each) for each in schema]
    if isinstance(schema, dict):
        return {key: _without_doc(value) for key, value in schema.items() if key != "doc"}
    return schema
