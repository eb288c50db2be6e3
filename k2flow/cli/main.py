"""The entry point of `k2flow`."""

from k2flow.cli.commands import app
from k2flow.cli.exits import exit_on_error
from k2flow.process_exit import EXIT_FAILED


def main() -> None:
    """Run the command line. An error is one line on standard error and exit code 1."""
    with exit_on_error(EXIT_FAILED):
        app()
