"""`scripts/bench`."""

import typer

from bench.audit import audit
from bench.catchup import catchup
from bench.isolation import isolation

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False)
app.command("audit")(audit)
app.command("catchup")(catchup)
app.command("isolation")(isolation)


@app.callback()
def _bench() -> None:
    """Measure k2flow on this machine."""


app()
