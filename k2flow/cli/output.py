"""What commands print on standard output."""

import json
import sys
from typing import Any

from rich.console import Console

PIPE_WIDTH = 240


def console() -> Console:
    """Return a console as wide as the terminal, or PIPE_WIDTH columns wide where output is no terminal."""
    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH)


def print_json(value: Any, *, indent: int | None = None) -> None:
    """Print one JSON value: on one line, unless `indent` is given. Values that JSON lacks are printed as text."""
    print(json.dumps(value, indent=indent, default=str), flush=True)
