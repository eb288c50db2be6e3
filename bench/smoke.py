"""Runs every benchmark once, as small as possible while all of its code runs."""

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any
from unittest.mock import patch

import typer

from bench import report
from bench.age import age
from bench.audit import audit
from bench.candles import candles
from bench.catchup import catchup
from bench.commits import commits
from bench.decode import decode
from bench.dedup import dedup
from bench.endurance import endurance
from bench.freshness import freshness
from bench.isolation import isolation
from bench.maintain import maintain
from bench.profile import profile
from bench.query import query
from bench.scale import scale
from bench.soak import Variant, soak
from bench.stages import stages
from bench.window import window
from torture.catalogs import postgres_programs

BENCHMARKS: tuple[tuple[Callable[..., None], dict[str, Any]], ...] = (
    (age, {"hours": 100, "files": 24, "rows": 10, "commits": 2, "runs": 1}),
    (audit, {"messages": 20_000, "new": 10_000}),
    (candles, {"rows": 20_000, "symbols": 5, "days": 1, "seconds": 3, "runs": 1}),
    (catchup, {"messages": 20_000, "runs": 1}),
    (commits, {"commits": 20, "rows": 10}),
    (decode, {"records": 500, "runs": 1}),
    (dedup, {"ids": [200_000], "hour_ids": 10_000}),
    (endurance, {"messages": 20_000, "parts": 2, "kills": 1, "trigger": 0.5}),
    (freshness, {"seconds": 2, "binance_rate": 500, "kraken_rate": 100, "trigger": [1.0]}),
    (isolation, {"seconds": 2}),
    (maintain, {"files": 20, "rows": 2_000, "commits": 20, "seconds": 2}),
    (profile, {"messages": 20_000, "processes": [2]}),
    (query, {"files": 60, "rows": 50, "runs": 1}),
    (scale, {"messages": 20_000, "processes": [2], "runs": 1}),
    (soak, {"messages": 20_000, "variant": Variant.PAST}),
    (stages, {"messages": 40_000, "batch": 20_000}),
    (window, {"ids": [48_000], "gold_ids": 10_000}),
)
"""Each benchmark with its smallest arguments."""


def smoke(
    only: Annotated[list[str] | None, typer.Argument(help="Benchmarks to run; all if none is named.")] = None,
) -> None:
    """Run every benchmark at its smallest, to test its code: the figures mean nothing, the docs stay as they are."""
    if unknown := sorted({*(only or ())} - {*names()}):
        raise typer.BadParameter(f"unknown: {', '.join(unknown)}; known are {', '.join(names())}")
    took: dict[str, float] = {}
    with tempfile.TemporaryDirectory() as docs:
        performance = Path(docs) / report.PERFORMANCE.name
        shutil.copy(report.PERFORMANCE, performance)
        with (
            patch.dict(os.environ, {report.WRITE_DOCS: "1"}),
            patch.multiple(report, DOCS=Path(docs), PERFORMANCE=performance),
        ):
            for benchmark, small in BENCHMARKS:
                if only and benchmark.__name__ not in only:
                    continue
                if lacks := _lacks(benchmark):
                    typer.echo(f"{benchmark.__name__} skipped: {lacks} is not installed", err=True)
                    continue
                began = time.monotonic()
                benchmark(**small)
                took[benchmark.__name__] = time.monotonic() - began
    typer.echo(f"passed: {', '.join(f'{name} {seconds:.0f} s' for name, seconds in took.items())}")


def _lacks(benchmark: Callable[..., None]) -> str | None:
    """Return a program that `benchmark` needs and this machine lacks."""
    if benchmark in (scale, profile) and postgres_programs() is None:
        return "PostgreSQL"
    if benchmark is profile and shutil.which("perf") is None:
        return "perf"
    return None


def names() -> list[str]:
    """Return the names of the benchmarks, which are their commands."""
    return [benchmark.__name__ for benchmark, _ in BENCHMARKS]
