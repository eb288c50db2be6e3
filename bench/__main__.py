"""`scripts/bench`."""

import typer

from bench.catchup import catchup

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("catchup")(catchup)


@app.callback()
def _bench() -> None:
    """Measure k2flow on this machine."""


app()
