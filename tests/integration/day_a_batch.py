"""`python -m tests.integration.day_a_batch DAYS EXCHANGE`: run a flow in which each batch is a day later than the last.

The last of DAYS batches is of today. The timestamps that move: ingestion, failure, and creation of the tables.
"""

import runpy
import sys
from datetime import UTC, datetime, timedelta, tzinfo
from types import SimpleNamespace

import pyiceberg.table.metadata

import k2flow.trades.decode
import k2flow.trades.messages


class Moved(datetime):
    """The clock of Bronze's ingestion time: each call moves it to the next day."""

    days = day = 0

    @classmethod
    def now(cls, tz: tzinfo | None = UTC) -> datetime:  # type: ignore[override]
        cls.day += 1
        return datetime.now(tz) - timedelta(days=cls.days - cls.day)


class SameDay(datetime):
    """The clock of everything else: it shows the day of the latest Bronze batch."""

    @classmethod
    def now(cls, tz: tzinfo | None = UTC) -> datetime:  # type: ignore[override]
        return datetime.now(tz) - timedelta(days=Moved.days - Moved.day)


if __name__ == "__main__":
    k2flow.trades.messages.datetime = Moved  # type: ignore[attr-defined]
    k2flow.trades.decode.datetime = SameDay  # type: ignore[attr-defined]
    pyiceberg.table.metadata.datetime = SimpleNamespace(datetime=SameDay)  # type: ignore[attr-defined]
    Moved.days, sys.argv = int(sys.argv[1]), ["bytewax.run", f"flows.{sys.argv[2]}"]
    runpy.run_module("bytewax.run", run_name="__main__", alter_sys=True)
