"""Runs every benchmark at full size, for the figures and plots of the docs."""

import os
import subprocess
import sys

import typer

from bench.report import PERFORMANCE, WRITE_DOCS, with_section
from bench.smoke import names


def all_() -> None:
    """Run every benchmark at full size, one after the other; renew docs/performance.md and its plots. Takes hours."""
    for name in names():
        with_section(PERFORMANCE.read_text(), name, "")  # fail now, not after the measurement
    failed = []
    for name in names():
        typer.echo(f"--- {name}")
        command = [sys.executable, "-m", "bench", name]
        if subprocess.run(command, env={**os.environ, WRITE_DOCS: "1"}, check=False).returncode:
            failed.append(name)
    if failed:
        typer.echo(f"failed: {', '.join(failed)}", err=True)
        raise typer.Exit(1)
