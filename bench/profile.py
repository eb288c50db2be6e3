"""Where the CPU of a catch-up goes, library by library, as perf samples it: the floor under a message's cost."""

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
from bench.report import Report, report
from bench.scale import PROCESSES, flow, missing, produced
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
"""What perf calls the libraries; what none of them matches is "others"."""
HERTZ = 499
_LINE = re.compile(r"^\s*([\d.]+)%\s+(.+?)\s*$")


def profile(
    messages: Annotated[int, typer.Option(help="Messages in the topic.")] = 4_000_000,
    processes: Annotated[list[int], typer.Option(help="Processes of the flow, may be given again.")] = PROCESSES,
) -> None:
    """CPU a message by library, of a catch-up by one, two and three processes: needs perf, and PostgreSQL.

    Start-up and imports are left out: a run that finds nothing to do is sampled after each and taken off.
    """
    programs = postgres_programs()
    if programs is None:
        typer.echo(f"several processes need PostgreSQL for the catalog: {missing()}", err=True)
        raise typer.Exit(1)
    if shutil.which("perf") is None:
        typer.echo("perf is not on PATH: install it (Debian: linux-perf)", err=True)
        raise typer.Exit(1)
    spent: dict[int, dict[str, float]] = {}
    with produced(messages, programs) as at:
        for n in processes:
            caught_up = sampled(flow(n), at.settings)
            idle = sampled(flow(n), at.settings)
            at.drop_tables()
            spent[n] = {name: (caught_up[name] - idle[name]) / messages * 1e6 for name in caught_up}
    _report(messages, spent)


def sampled(command: list[str], environment: Mapping[str, str]) -> dict[str, float]:
    """CPU seconds of `command`, with those it starts, by library. Raises subprocess.CalledProcessError."""
    with tempfile.TemporaryDirectory() as folder:
        samples = str(Path(folder) / "perf.data")
        used = run(["perf", "record", "-F", str(HERTZ), "-o", samples, "--", *command], environment)
        told = subprocess.run(
            ["perf", "report", "-i", samples, "--sort", "dso", "--stdio"], capture_output=True, text=True, check=True
        )
    shares = by_library(told.stdout)
    return {name: share * used.cpu for name, share in shares.items()}


def by_library(told: str) -> dict[str, float]:
    """Shares of 1 by library, of what `perf report --sort dso` has `told`."""
    shares = dict.fromkeys([*LIBRARIES, "others"], 0.0)
    for line in told.splitlines():
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
        axes.set_ylabel("us CPU a message")
        axes.legend(fontsize="small")

    columns = ["us CPU/message in", *(f"{n} process{'es' * (n > 1)}" for n in spent)]
    figures = {"messages": messages, "cpu_us_per_message": {n: dict(of) for n, of in spent.items()}}
    report(Report("profile", columns, rows, figures, plot))
