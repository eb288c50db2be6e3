"""`python -m tests.integration.older_tables EXCHANGE`: run a flow whose tables have fewer and narrower columns."""

import runpy
import sys
from dataclasses import replace

from pyiceberg.types import DecimalType, IntegerType

from k2flow import layers
from k2flow.layers import Layer

LATER = {"platform_sequence", "detail"}
NARROWER = {"source_sequence": IntegerType(), "price": DecimalType(15, 8)}


def older(layer: Layer) -> Layer:
    fields = (each._replace(type=NARROWER.get(each.name, each.type)) for each in layer.fields)
    return replace(layer, fields=tuple(each for each in fields if each.name not in LATER))


if __name__ == "__main__":
    # Before any other module imports them.
    layers.SILVER, layers.GOLD, layers.DLQ = older(layers.SILVER), older(layers.GOLD), older(layers.DLQ)
    layers.LAYERS = (layers.BRONZE, layers.SILVER, layers.DLQ, layers.GOLD)
    layers.COLUMNS_OF_STREAM = {each.stream: each.fields for each in (layers.BRONZE, layers.SILVER, layers.DLQ)}
    sys.argv = ["bytewax.run", f"flows.{sys.argv[1]}"]
    runpy.run_module("bytewax.run", run_name="__main__", alter_sys=True)
