"""`python -m tests.integration.older_tables EXCHANGE`: a flow whose tables have fewer and narrower columns."""

import runpy
import sys

from pyiceberg.types import DecimalType, IntegerType

from k2flow.iceberg import tables

LATER = {"platform_sequence", "detail"}
NARROWER = {"source_sequence": IntegerType(), "price": DecimalType(15, 8)}


def older(fields: tables.Fields) -> tables.Fields:
    return tuple((name, NARROWER.get(name, kind)) for name, kind in fields if name not in LATER)


if __name__ == "__main__":
    # Before anything else takes them from there.
    tables.SILVER_FIELDS, tables.GOLD_FIELDS = older(tables.SILVER_FIELDS), older(tables.GOLD_FIELDS)
    tables.DLQ_FIELDS = older(tables.DLQ_FIELDS)
    sys.argv = ["bytewax.run", f"flows.{sys.argv[1]}"]
    runpy.run_module("bytewax.run", run_name="__main__", alter_sys=True)
