"""Reports the result of a benchmark: a table for people, a line of JSON for programs and, for the docs, a plot."""

import json
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from bench.measure import machine

matplotlib.use("Agg")  # draw into files only

DOCS = Path(__file__).parents[1] / "docs"
PERFORMANCE = DOCS / "performance.md"
WRITE_DOCS = "BENCH_WRITE_DOCS"
"""Environment variable: if it is set, `report` replaces the plot in docs/bench and the table in docs/performance.md."""


@dataclass(frozen=True)
class BenchResult:
    """One benchmark's result. `figures` go into the JSON line; `plot` draws them."""

    benchmark: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    figures: dict[str, Any]
    plot: Callable[[Axes], None]
    notes: Sequence[str] = field(default=())


def report(result: BenchResult) -> None:
    """Print `result`; if WRITE_DOCS is set, write it into the docs too."""
    table = Table(*result.columns)
    for row in result.rows:
        table.add_row(*row)
    console = Console(width=140)
    console.print(table)
    for note in result.notes:
        console.print(note, highlight=False)
    print(machine())
    print(json.dumps({"benchmark": result.benchmark, **result.figures, "machine": machine()}))
    if os.environ.get(WRITE_DOCS):
        save_plot(result, DOCS / "bench" / f"{result.benchmark}.png")
        PERFORMANCE.write_text(with_section(PERFORMANCE.read_text(), result.benchmark, markdown(result)))


def save_plot(result: BenchResult, path: Path) -> None:
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    result.plot(figure.add_subplot())
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def markdown(result: BenchResult) -> str:
    """Return the section of the docs: command, machine, table, notes and plot."""
    command = f"`scripts/bench {shlex.join([result.benchmark, *sys.argv[2:]])}`"
    lines = [_cells(result.columns), _cells(["---"] * len(result.columns)), *map(_cells, result.rows)]
    notes = [f"{note}\n" for note in result.notes]
    picture = f"![{result.benchmark}](bench/{result.benchmark}.png)"
    return "\n".join([f"{command} on {machine()}:\n", *lines, "", *notes, picture])


def with_section(text: str, name: str, content: str) -> str:
    """Replace the content between the two marks of `name` in `text`. Raise ValueError if it has none."""
    begin, end = f"<!-- {name} -->\n", f"<!-- end of {name} -->"
    if begin not in text or end not in text:
        raise ValueError(f"{PERFORMANCE.name} has no marks {begin.strip()} and {end}")
    before, rest = text.split(begin, 1)
    return f"{before}{begin}{content}\n{end}{rest.split(end, 1)[1]}"


def _cells(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"
