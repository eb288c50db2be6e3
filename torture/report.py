"""Prints the results of a torture run."""

from collections import Counter
from collections.abc import Iterable, Mapping

from rich.console import Console
from rich.table import Table

from torture.verdict import TableDifference

console = Console(width=140)


def print_heading(what: str) -> None:
    console.rule(f"[bold]{what}", align="left")


def print_faults(done: Mapping[str, int], starts: Mapping[str, int], reasons: Counter[str]) -> None:
    table = Table("fault", "times")
    for kind, times in sorted(done.items()):
        table.add_row(kind, str(times))
    table.add_section()
    for exchange, times in starts.items():
        table.add_row(f"starts of {exchange}", str(times))
    console.print(table)
    ends = Table("why processes ended, other than by kill -9 or at the end of the work", "times")
    for reason, times in reasons.most_common():
        ends.add_row(reason, str(times))
    console.print(ends)


def print_differences(layers: Iterable[TableDifference]) -> None:
    table = Table("table", "rows", "lost", "duplicated or unaccounted for")
    for each in layers:
        table.add_row(each.table, f"{each.rows:,}", f"{each.lost:,}", f"{each.unexpected:,}")
    console.print(table)
