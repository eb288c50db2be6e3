"""The output of commands: tables and JSON on standard output, progress bars on standard error."""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

PIPE_WIDTH = 240


def console() -> Console:
    """Return a console as wide as the terminal, or PIPE_WIDTH columns wide where output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON value: on one line, unless `indent` is given. Values that JSON lacks are printed as text."""
    print(json.dumps(value, indent=indent, default=str), flush=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar per name. Yields a function of the name, the items done since its last call, and all items."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=Console(stderr=True)) as bars:
        tasks = {}

        def advance(name: str, more: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.advance(tasks[name], more)

        yield advance
