"""TradeV2, the Avro record that every message must resolve to, and the text of any schema."""

import json
from functools import cache
from importlib.resources import files
from typing import Any

Json = Any
_FOR_READERS = ("doc", "default", "aliases", "order")  # attributes of a schema that do not matter in a writer's


@cache
def trade_schema() -> dict[str, Any]:
    """Return the Avro schema of TradeV2, from trade_v2.avsc beside this module."""
    schema: dict[str, Any] = json.loads(files("k2flow.trades").joinpath("trade_v2.avsc").read_text("utf-8"))
    return schema


def canonical(schema: Json) -> str:
    """Return the one text of a writer's schema, JSON text or parsed JSON: without spaces, keys in order.

    It lacks what does not matter for decoding, so schemas of one text decode alike. Raises ValueError or RecursionError
    if it is not JSON.
    """
    parsed = json.loads(schema) if isinstance(schema, str) else schema
    return json.dumps(_essence(parsed), separators=(",", ":"), sort_keys=True)


def _essence(schema: Json) -> Json:
    if isinstance(schema, list):
        return [_essence(each) for each in schema]
    if isinstance(schema, dict):
        return {key: _essence(value) for key, value in schema.items() if key not in _FOR_READERS}
    return schema
