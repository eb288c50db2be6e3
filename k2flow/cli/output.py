"""The output of commands: tables and JSON on standard output, progress bars on standard error.

A value is shown as it is, whatever it holds: neither as Rich's markup, nor as an emoji code, nor as a command to the
terminal. No value is cut: in a narrow column it continues on the next line.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text
from typing_extensions import override

from k2flow.printable import printable

PIPE_WIDTH = 1 << 16
"""Columns where output is no terminal: each row is one line, for other programs, unless it is longer than this."""
LEAST_WIDTH = 80
"""Columns of the narrowest layout: below, the terminal itself breaks the lines. Rich would drop whole columns."""


class PlainConsole(Console):
    """A console that shows each string as it is."""

    @override
    def render_str(self, text: str, *, style: Any = "", justify: Any = None, overflow: Any = None, **_: Any) -> Text:
        return Text(printable(text, self.encoding), style, justify=justify, overflow=overflow)

    @override
    def on_broken_pipe(self) -> None:
        raise


def console(*, least_width: int = LEAST_WIDTH) -> Console:
    """Return a console as wide as the terminal, or PIPE_WIDTH columns wide where output is no terminal."""
    if not sys.stdout.isatty():
        return PlainConsole(width=PIPE_WIDTH)
    terminal = PlainConsole()
    return terminal if terminal.width >= least_width else PlainConsole(width=least_width)


def new_table(*columns: Column | str, **options: Any) -> Table:
    """Return an empty table whose values continue on the next line where a column is too narrow."""
    table = Table(*columns, **options)
    for column in table.columns:
        column.overflow = "fold"
    return table


def styled(text: str, style: str = "") -> Text:
    """Return a text in a style, shown as `PlainConsole` shows strings."""
    return Text(printable(text), style)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON value: on one line, unless `indent` is given. Values that JSON lacks are printed as text."""
    print(json.dumps(value, indent=indent, default=str), flush=True)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int | None], None]]:
    """Show a bar per name. Yields a function of the name, the items done since its last call, and all items."""
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=PlainConsole(stderr=True)) as bars:
        tasks = {}

        def advance(name: str, more: int, total: int | None) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(printable(name), total=total)
            bars.advance(tasks[name], more)

        yield advance
