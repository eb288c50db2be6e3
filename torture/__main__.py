"""`scripts/torture`: exit code 0 only if nothing was lost and nothing doubled."""

import logging
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from torture.mutations import MUTATIONS
from torture.prove import prove
from torture.report import console
from torture.run import Torture


def main(
    minutes: Annotated[float, typer.Option(min=0.1, max=600, help="How long faults go on.")] = 2.0,
    seed: Annotated[int, typer.Option(min=0, help="Everything random comes from it.")] = 1,
    sqlite: Annotated[bool, typer.Option("--sqlite", help="Not PostgreSQL, even if it is there.")] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Files in a folder whose disk fills up, not in SeaweedFS, even if it is there."),
    ] = False,
    mutate: Annotated[
        str, typer.Option(help=f"Switch off a safeguard of k2flow, and show what notices: {', '.join(MUTATIONS)}.")
    ] = "",
) -> None:
    """Torture both flows."""
    if mutate:
        raise SystemExit(0 if prove(mutate) else 1)
    logging.getLogger("k2flow").setLevel(logging.CRITICAL)  # the producers say that the broker is down, as planned
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that what was started is ended
    folder = Path(tempfile.mkdtemp(prefix="k2flow-torture-"))
    kept = False
    try:
        kept = Torture(minutes, seed, sqlite, local, folder).run()
    finally:
        if kept:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"[bold red]failed[/]: the logs of the flows are in {folder / 'logs'}")
    raise SystemExit(0 if kept else 1)


typer.run(main)
