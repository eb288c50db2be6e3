"""`scripts/torture`: exit code 0 only if no row is lost and none is duplicated."""

import logging
import random
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from torture.mutations import MUTATIONS
from torture.plan import FaultKind
from torture.prove import tests_fail_without
from torture.report import console
from torture.run import Torture


def main(
    minutes: Annotated[float, typer.Option(min=0.1, max=600, help="Minutes of faults.")] = 2.0,
    seed: Annotated[
        int | None,
        typer.Option(
            min=0, help="Seed of everything random; a new one if not given. It is printed.", envvar="TEST_SEED"
        ),
    ] = None,
    sqlite: Annotated[bool, typer.Option("--sqlite", help="Use SQLite even if PostgreSQL is installed.")] = False,
    local: Annotated[
        bool,
        typer.Option("--local", help="Keep files in a folder whose disk fills up, even if SeaweedFS is installed."),
    ] = False,
    only: Annotated[
        list[str] | None,
        typer.Option(help=f"Only faults of this kind; may be repeated: {', '.join(FaultKind.__members__).lower()}."),
    ] = None,
    mutate: Annotated[
        str, typer.Option(help=f"Switch off a safeguard and show which tests fail: {', '.join(MUTATIONS)}.")
    ] = "",
) -> None:
    """Run both flows under faults, then compare every row with an oracle."""
    if mutate:
        raise SystemExit(0 if tests_fail_without(mutate) else 1)
    unknown = {name.upper() for name in only or ()} - FaultKind.__members__.keys()
    if unknown:
        raise typer.BadParameter(f"no fault is called {', '.join(sorted(unknown)).lower()}")
    kinds = [FaultKind[name.upper()] for name in only or FaultKind.__members__]
    if seed is None:
        seed = random.SystemRandom().randrange(2**32)
    logging.getLogger("k2flow").setLevel(logging.CRITICAL)  # producers log every outage of the broker, as planned
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the cleanups run
    folder = Path(tempfile.mkdtemp(prefix="k2flow-torture-"))
    passed = False
    try:
        passed = Torture(minutes, seed, sqlite, local, kinds, folder).run()
    finally:
        if passed:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            console.print(f"[bold red]failed[/] with seed {seed}: the logs of the flows are in {folder / 'logs'}")
    raise SystemExit(0 if passed else 1)


typer.run(main)
