"""CPU of a catch-up by library, sampled with perf: the lower bound of a message's cost."""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from matplotlib.axes import Axes

from bench.measure import run
from bench.report import BenchResult, report
from bench.scale import PROCESSES, filled_topic, flow, missing
from torture.catalogs import postgres_programs

LIBRARIES = {
    "Arrow and Parquet": r"libarrow|libparquet|pyarrow|/lib\.cpython|^lib\.cpython",
    "Python": r"libpython|^python",
    "NumPy": r"_multiarray|openblas|numpy",
    "Bytewax": r"_bytewax",
    "librdkafka": r"librdkafka|cimpl|ffi|ctypes",
    "C library": r"libc\.|libstdc|ld-linux|libm\.|\[vdso\]",
    "kernel": r"^\[",
}
"""Patterns of the names in perf's report; a name that none of them matches counts as "others"."""
HERTZ = 499
_LINE = re.compile(r"^\s*([\d.]+)%\s+(.+?)\s*$")


def profile(
    messages: Annotated[int, typer.Option(help="Messages in the topic.")] = 4_000_000,
    processes: Annotated[list[int], typer.Option(help="Processes of the flow; repeatable.")] = PROCESSES,
) -> None:
    """Measure CPU per message by library, of a catch-up by one, two and three processes. Needs perf and PostgreSQL.

    A run with nothing to do is sampled after each, and subtracted: its time is start-up and imports.
    """
    programs = postgres_programs()
    if programs is None:
        typer.echo(f"several processes need PostgreSQL for the catalog: {missing()}", err=True)
        raise typer.Exit(1)
    if shutil.which("perf") is None:
        typer.echo("perf is not on PATH: install it (Debian: linux-perf)", err=True)
        raise typer.Exit(1)
    spent: dict[int, dict[str, float]] = {}
    with filled_topic(messages, programs) as at:
        for n in processes:
            caught_up = sampled(flow(n), at.settings)
            idle = sampled(flow(n), at.settings)
            at.drop_tables()
            spent[n] = {name: (caught_up[name] - idle[name]) / messages * 1e6 for name in caught_up}
    _report(messages, spent)


def sampled(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """Return the CPU seconds of `command` and its children, by library. Raise subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        samples = str(Path(folder) / "perf.data")
        used = run(["perf", "record", "-F", str(HERTZ), "-o", samples, "--", *command], environment)
        printed = subprocess.run(
            ["perf", "report", "-i", samples, "--sort", "dso", "--stdio"], capture_output=True, text=True, check=True
        )
    shares = by_library(printed.stdout)
    return {name: share * used.cpu for name, share in shares.items()}


def by_library(printed: str) -> dict[str, float]:
    """Return the share of each library, 0 to 1, from the output of `perf report --sort dso`."""
    shares = dict.fromkeys([*LIBRARIES, "others"], 0.0)
    for line in printed.splitlines():
        if found := _LINE.match(line):
            name = next((name for name, names in LIBRARIES.items() if re.search(names, found[2])), "others")
            shares[name] += float(found[1]) / 100
    return shares


def _report(messages: int, spent: Mapping[int, Mapping[str, float]]) -> None:
    totals = {n: sum(of.values()) for n, of in spent.items()}
    names = list(next(iter(spent.values())))
    rows = [[name, *(f"{of[name]:.2f}" for of in spent.values())] for name in names]
    rows.append(["total", *(f"{total:.2f}" for total in totals.values())])

    def plot(axes: Axes) -> None:
        bottom = [0.0] * len(spent)
        for name in names:
            heights = [of[name] for of in spent.values()]
            axes.bar([str(n) for n in spent], heights, bottom=bottom, label=name)
            bottom = [below + height for below, height in zip(bottom, heights, strict=True)]
        axes.set_xlabel("processes")
        axes.set_ylabel("us CPU per message")
        axes.legend(fontsize="small")

    columns = ["us CPU/message in", *(f"{n} process{'es' * (n > 1)}" for n in spent)]
    figures = {"messages": messages, "cpu_us_per_message": {n: dict(of) for n, of in spent.items()}}
    report(BenchResult("profile", columns, rows, figures, plot))
