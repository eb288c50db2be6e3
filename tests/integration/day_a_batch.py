"""`python -m tests.integration.day_a_batch DAYS EXCHANGE`: a flow whose every batch is a day later than the last one.

The last of DAYS batches is of today. What rows are stamped with moves: when they were ingested, or had failed; and when
the tables were made.
"""

import runpy
import sys
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace

import pyiceberg.table.metadata

import k2flow.flow.dataflow
import k2flow.trades.decode


class Moved(datetime):
    """The clock that Bronze's rows are stamped by: its day is over after each look at it."""

    days = day = 0

    @classmethod
    def now(cls, tz: tzinfo | None = UTC) -> datetime:  # type: ignore[override]
        cls.day += 1
        return datetime.now(tz) - timedelta(days=cls.days - cls.day)


class SameDay(datetime):
    """The clock of what comes after Bronze's rows, and of what came before the first."""

    @classmethod
    def now(cls, tz: tzinfo | None = UTC) -> datetime:  # type: ignore[override]
        return datetime.now(tz) - timedelta(days=Moved.days - Moved.day)


if __name__ == "__main__":
    k2flow.flow.dataflow.datetime = Moved  # type: ignore[attr-defined]
    k2flow.trades.decode.datetime = SameDay  # type: ignore[attr-defined]
    pyiceberg.table.metadata.datetime = SimpleNamespace(datetime=SameDay)  # type: ignore[attr-defined]
    Moved.days, sys.argv = int(sys.argv[1]), ["bytewax.run", f"flows.{sys.argv[2]}"]
    runpy.run_module("bytewax.run", run_name="__main__", alter_sys=True)
