"""Arguments and options that several commands share, and the settings of every group of commands."""

from enum import StrEnum
from typing import Annotated, Any

import typer

from k2flow.cli.repetition import parse_duration

HELP_WIDTH = 100

Exchanges = Annotated[list[str] | None, typer.Argument(metavar="EXCHANGE", help="Exchanges. Default: all.")]
StoppedExchange = Annotated[str, typer.Argument(metavar="EXCHANGE", help="Exchange. Its flow must be stopped.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


class Format(StrEnum):
    """A format of query results. `json` is one object per line, `arrow` an IPC stream."""

    TABLE = "table"
    CSV = "csv"
    JSON = "json"
    PARQUET = "parquet"
    ARROW = "arrow"


def command_group(name: str, text: str) -> typer.Typer:
    """Return an empty group of commands, whose help needs no slow import."""
    return typer.Typer(
        name=name,
        help=text,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,  # rich takes longer than all other imports together
        # Without a value for help, typer 0.29 imports pydantic to convert None before it runs a command's own help.
        context_settings={"max_content_width": HELP_WIDTH, "default_map": {"help": False}},
    )


def duration_option(text: str) -> Any:
    """Return an option that takes a duration such as 5m, and gives seconds. `text` names the default."""
    return typer.Option(parser=parse_duration, metavar="DURATION", show_default=False, help=text)


def day_option(name: str, text: str) -> Any:
    """Return an option that takes a day such as 2026-01-31."""
    return typer.Option(name, formats=["%Y-%m-%d"], metavar="DATE", help=text)
