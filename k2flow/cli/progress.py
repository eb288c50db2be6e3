"""Progress bars on standard error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


@contextmanager
def progress_bars() -> Iterator[Callable[[str, int, int], None]]:
    """Show a bar per table or step. Yields a function of its name, the rows read since the last call, and all rows."""
    tasks: dict[str, TaskID] = {}
    with _bars(TimeElapsedColumn()) as bars:

        def advance(name: str, more: int, total: int) -> None:
            if name not in tasks:
                tasks[name] = bars.add_task(name, total=total)
            bars.advance(tasks[name], more)

        yield advance


@contextmanager
def progress_bar(description: str, total: int | None) -> Iterator[Callable[[int], None]]:
    """Show one bar. Yields a function that takes the number of items done since the last call."""
    with _bars(TimeRemainingColumn()) as bars:
        task = bars.add_task(description, total=total)
        yield lambda more: bars.advance(task, more)


def _bars(time: TimeElapsedColumn | TimeRemainingColumn) -> Progress:
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), time)
    return Progress(*columns, console=Console(stderr=True))
